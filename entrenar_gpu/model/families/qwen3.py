"""Qwen3, the dense models (arXiv 2505.09388): a norm over each head's queries and keys."""

from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, RmsNorm
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile
from entrenar_gpu.model.families.qwen2 import windows

ARCHITECTURES = ("Qwen3ForCausalLM",)


def read(file: ConfigFile) -> ModelConfig:
    bias = file.flag("attention_bias")
    attention = Attention.read(file, qkv_bias=bias, out_bias=bias, qk_norm="heads")
    layer = Layer(attention, FeedForward.read(file), RmsNorm.read(file))
    return ModelConfig.read(file, [layer.windowed(window) for window in windows(file)])
