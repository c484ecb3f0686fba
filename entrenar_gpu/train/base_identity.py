"""What tells one base model from another, for a run that goes on from a checkpoint."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import numpy as np

from entrenar_gpu.model import HFCheckpoint, ModelConfig

# The tensors of a layer that are sampled, in the order in which the first release read them.
SAMPLED = (
    "input_layernorm.weight",
    *(f"self_attn.{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias")),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *("self_attn.q_norm.weight", "self_attn.k_norm.weight", "post_attention_layernorm.weight"),
)

_known: weakref.WeakKeyDictionary[HFCheckpoint, dict[str, Any]] = weakref.WeakKeyDictionary()


def model_identity(checkpoint: HFCheckpoint) -> dict[str, Any]:
    """A hash of the configuration and a sample of the weights, as in all checkpoints since the first release."""
    if checkpoint in _known:  # every save asks, and the files may be gone by then
        return _known[checkpoint]
    model, wanted = checkpoint.config, {spec.name for spec in checkpoint.config.weights}
    digest = hashlib.sha256(_release_repr(model).encode())
    layers = range(len(model.layers))
    names = [f"model.layers.{layer}.{name}" for layer in layers for name in SAMPLED] + ["model.norm.weight"]
    for name in names:
        if name in wanted:
            digest.update(checkpoint.stored(name).reshape(-1)[:64].read().view(np.uint8).tobytes())
    _known[checkpoint] = {"sha256": digest.hexdigest()}
    return _known[checkpoint]


def _release_repr(model: ModelConfig) -> str:
    """A configuration as `repr` wrote it in the first release, when it was flat and all layers were alike."""
    layer = model.layers[0]
    attention, mlp = layer.attention, layer.mlp
    rope = next(iter(model.rope_tables.values()), None)
    values = {
        "architecture": model.architecture,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": mlp.intermediate_size,
        "num_layers": len(model.layers),
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": model.norm.eps,
        "rope_theta": rope and rope.theta,
        "rope_scaling": rope and rope.scaling,
        "tie_word_embeddings": model.tie_word_embeddings,
        "qkv_bias": attention.qkv_bias,
        "qk_norm": attention.qk_norm is not None,
        "max_positions": model.max_positions,
    }
    return f"ModelConfig({', '.join(f'{key}={value!r}' for key, value in values.items())})"
