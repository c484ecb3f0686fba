"""Every option of a run, declared once, and the shapes of well-known models."""

from entrenar_gpu.config.train_config import TrainConfig

__all__ = ["TrainConfig"]
