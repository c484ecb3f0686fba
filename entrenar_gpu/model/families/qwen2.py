"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): biases on queries, keys and values."""

from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, RmsNorm
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import FULL, SLIDING, ConfigFile

ARCHITECTURES = ("Qwen2ForCausalLM",)


def read(file: ConfigFile) -> ModelConfig:
    layer = Layer(Attention.read(file, qkv_bias=True), FeedForward.read(file), RmsNorm.read(file))
    return ModelConfig.read(file, [layer.windowed(window) for window in windows(file)])


def windows(file: ConfigFile) -> list[int | None]:
    """Windows from a layer on, where the file switches them on."""
    if not file.flag("use_sliding_window") or file.raw.get("sliding_window", 4096) is None:
        return [None] * file.num_layers
    first = file.count("max_window_layers", 28)
    return file.completed(sliding_window=4096).windows(
        [SLIDING if index >= first else FULL for index in range(file.num_layers)]
    )
