"""Arcee AFM: Llama with a squared ReLU (arXiv 2109.08668) instead of a gate."""

from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, RmsNorm
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile

ARCHITECTURES = ("ArceeForCausalLM",)


def read(file: ConfigFile) -> ModelConfig:
    file, bias = file.completed(hidden_act="relu2", rms_norm_eps=1e-5), file.flag("attention_bias")
    layer = Layer(Attention.read(file, bias, bias), FeedForward.read(file, gated=False), RmsNorm.read(file))
    return ModelConfig.read(file, [layer] * file.num_layers)
