"""The training loop and what surrounds it: data in order, evaluation, checkpoints, records."""

from entrenar_gpu.train.control import RunControl
from entrenar_gpu.train.evaluate import evaluate_data
from entrenar_gpu.train.results import plot_run
from entrenar_gpu.train.run_data import DataReader
from entrenar_gpu.train.trainer import Trainer

__all__ = ["DataReader", "RunControl", "Trainer", "evaluate_data", "plot_run"]
