"""Every option of a run, declared once, and the shapes of well-known models."""

from entrenar_gpu.config.presets import SHAPES
from entrenar_gpu.config.train_config import PROJECTIONS, flag, known_keys, load_yaml
from entrenar_gpu.config.train_config import TrainConfig as TrainConfig

__all__ = [
    "PROJECTIONS",
    "SHAPES",
    "TrainConfig",
    "TrainConfig as TrainConfig",
    "flag",
    "known_keys",
    "load_yaml",
]
