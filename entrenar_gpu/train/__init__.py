"""The training loop and what surrounds it: graphs, weights on an executor, checkpoints, evaluation."""
