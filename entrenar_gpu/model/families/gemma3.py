"""Gemma 3 (arXiv 2503.19786): as Gemma 2, but norms over each head's queries and keys instead of caps, five layers with
a window to one without, and a rotation of their own for the five."""

from dataclasses import replace

from entrenar_gpu.model.blocks import Layer
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import FULL, SLIDING, ConfigFile
from entrenar_gpu.model.families.gemma2 import DEFAULTS, gemma_layer, gemma_model
from entrenar_gpu.model.rope import Rope

ARCHITECTURES = ("Gemma3ForCausalLM",)
GEMMA3 = {"vocab_size": 262208, "max_position_embeddings": 131072}


def read(file: ConfigFile) -> ModelConfig:
    file = file.completed(**GEMMA3, **DEFAULTS)
    file.refuse("use_bidirectional_attention")
    period = file.count("sliding_window_pattern", file.count("_sliding_window_pattern", 6))
    kinds = file.layer_kinds([SLIDING if (index + 1) % period else FULL for index in range(file.num_layers)])
    layer, windows = gemma_layer(file, qk_norm="heads"), file.windows(kinds)
    made = [_turned(file, layer.windowed(window), kind) for window, kind in zip(windows, kinds, strict=True)]
    return gemma_model(file, made)


def _turned(file: ConfigFile, layer: Layer, kind: str) -> Layer:
    """With the rotation of its kind; the old layout gives the windowed layers' apart, which no scaling touches."""
    head_dim, theta = layer.attention.head_dim, 1e4 if kind == SLIDING else 1e6
    rope = Rope.read(file, head_dim, kind, theta=theta)
    if kind == SLIDING and "rope_parameters" not in file.raw:
        rope = Rope(head_dim, file.real("rope_local_base_freq", theta))
    return replace(layer, attention=replace(layer.attention, rope=rope))
