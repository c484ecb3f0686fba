"""Mistral 7B (arXiv 2310.06825), Nemo and Small: a window in all layers, or in none."""

from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, RmsNorm
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile

ARCHITECTURES = ("MistralForCausalLM",)


def read(file: ConfigFile) -> ModelConfig:
    layer = Layer(Attention.read(file), FeedForward.read(file), RmsNorm.read(file))
    return ModelConfig.read(file, [layer.windowed(file.window(4096))] * file.num_layers)
