"""GLM-4 9B as of 2024 (arXiv 2406.12793): half of each head rotated, by neighbouring pairs; gate and up fused."""

from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, RmsNorm
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile

ARCHITECTURES = ("GlmForCausalLM",)
DEFAULTS = {"head_dim": 128, "num_key_value_heads": 2, "attention_bias": True, "rms_norm_eps": 1.5625e-07}


def read(file: ConfigFile) -> ModelConfig:
    file = file.completed(**DEFAULTS)
    return ModelConfig.read(file, [glm_layer(file)] * file.num_layers)


def glm_layer(file: ConfigFile) -> Layer:
    """A layer of GLM-4."""
    attention = Attention.read(file, qkv_bias=file.flag("attention_bias"), interleaved=True, share=0.5)
    return Layer(attention, FeedForward.read(file, gate_up_path="mlp.gate_up_proj"), RmsNorm.read(file))
