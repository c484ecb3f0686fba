"""One file for each family of models, named as its `model_type`: what its layers have, what its config.json means."""
