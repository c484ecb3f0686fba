"""Granite 3, the dense models: multipliers of embeddings, attention, residuals and logits."""

from collections.abc import Sequence
from dataclasses import replace

from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, RmsNorm
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile

ARCHITECTURES = ("GraniteForCausalLM",)


def read(file: ConfigFile) -> ModelConfig:
    return granite_model(file, [granite_layer(file, FeedForward.read(file))] * file.num_layers)


def granite_layer(file: ConfigFile, mlp: FeedForward) -> Layer:
    """A layer of Granite 3 or 4."""
    bias = file.flag("attention_bias")
    attention = replace(Attention.read(file, bias, bias), scale=file.real("attention_multiplier", 1.0))
    return Layer(attention, mlp, RmsNorm.read(file), residual_multiplier=file.real("residual_multiplier", 1.0))


def granite_model(file: ConfigFile, layers: Sequence[Layer]) -> ModelConfig:
    """Multiplied embeddings, divided logits."""
    return ModelConfig.read(file, layers, file.real("embedding_multiplier", 1.0), 1 / file.real("logits_scaling", 1.0))
