"""Qwen3, the dense models (arXiv 2505.09388): a norm over each head's queries and keys, no biases."""

from entrenar_gpu.model.blocks import Attention, Layer, RmsNorm, SwiGlu
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile

ARCHITECTURES = ("Qwen3ForCausalLM",)


def read(file: ConfigFile) -> ModelConfig:
    file.refuse("attention_bias")
    layer = Layer(Attention.read(file, qk_norm=True), SwiGlu.read(file), RmsNorm.read(file))
    return ModelConfig.read(file, [layer] * file.num_layers)
