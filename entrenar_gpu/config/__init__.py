"""Every option of a run, declared once, and the shapes of well-known models."""

from entrenar_gpu.config.options import (
    MOST,
    SEVERAL,
    flag,
    is_union,
    known_keys,
    load_yaml,
    path_text,
    refuse_named_pipe,
    whole_number,
)
from entrenar_gpu.config.presets import SHAPES, shape_file
from entrenar_gpu.config.sampling_options import SamplingOptions
from entrenar_gpu.config.train_config import EVERY_TARGET, TrainConfig

__all__ = [
    "EVERY_TARGET",
    "MOST",
    "SEVERAL",
    "SHAPES",
    "SamplingOptions",
    "TrainConfig",
    "flag",
    "is_union",
    "known_keys",
    "load_yaml",
    "path_text",
    "refuse_named_pipe",
    "shape_file",
    "whole_number",
]
