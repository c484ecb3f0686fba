"""Gemma 2 (arXiv 2408.00118): norms around each block, soft caps, a window in every other layer."""

import math
from collections.abc import Sequence
from dataclasses import replace

from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, Normed, NormNames, RmsNorm
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import FULL, SLIDING, ConfigFile

ARCHITECTURES = ("Gemma2ForCausalLM",)
# What Gemma's configuration classes take for keys that a file lacks, as a `text_config` lacks most.
DEFAULTS = {
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
GEMMA2 = {"vocab_size": 256000, "max_position_embeddings": 8192}
NORMS = NormNames(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def read(file: ConfigFile) -> ModelConfig:
    file = file.completed(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, **GEMMA2, **DEFAULTS)
    kinds = [FULL if index % 2 else SLIDING for index in range(file.num_layers)]
    layer = gemma_layer(file)
    return gemma_model(file, [layer.windowed(window) for window in file.windows(kinds)])


def gemma_layer(file: ConfigFile, qk_norm: Normed | None = None) -> Layer:
    """A layer of any Gemma, without its window and with the rotation that the file speaks of first."""
    norm, bias = RmsNorm.read(file, offset=1.0), file.flag("attention_bias")
    attention = replace(
        Attention.read(file, bias, bias, qk_norm, norm),
        scale=file.real("query_pre_attn_scalar") ** -0.5,
        softcap=file.cap("attn_logit_softcapping"),
    )
    return Layer(attention, FeedForward.read(file, "hidden_activation"), norm, NORMS)


def gemma_model(file: ConfigFile, layers: Sequence[Layer]) -> ModelConfig:
    """Embeddings times the root of their width, and capped logits."""
    return ModelConfig.read(
        file, layers, math.sqrt(file.count("hidden_size")), softcap=file.cap("final_logit_softcapping")
    )
