"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): biases on queries, keys and values."""

from entrenar_gpu.model.blocks import Attention, Layer, RmsNorm, SwiGlu
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile

ARCHITECTURES = ("Qwen2ForCausalLM",)


def read(file: ConfigFile) -> ModelConfig:
    layer = Layer(Attention.read(file, qkv_bias=True), SwiGlu.read(file), RmsNorm.read(file))
    return ModelConfig.read(file, [layer] * file.num_layers)
