"""Which families llama.cpp computes, under which name, and what their files say of them (as its converter has it)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from entrenar_gpu.errors import UserError
from entrenar_gpu.model.blocks import Attention
from entrenar_gpu.model.config import ModelConfig

Floats = np.ndarray


@dataclass(frozen=True)
class GgufFamily:
    """`architecture` as llama.cpp calls it. `pairs`: it rotates neighbouring columns of a head, so that queries and
    keys are written in that order. What it takes for granted, and a model that has it otherwise is refused for: each
    layer has a window but every `full_every`th; every `plain_every`th does not rotate; 0 stands for no such layer."""

    architecture: str
    pairs: bool = False
    full_every: int = 0
    plain_every: int = 0


# By the file of families/. Those that are missing here llama.cpp computes otherwise, or not at all.
FAMILIES = {
    "llama": GgufFamily("llama", pairs=True),
    "mistral": GgufFamily("llama", pairs=True),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "gemma2": GgufFamily("gemma2", full_every=2),
    "gemma3": GgufFamily("gemma3", full_every=6),
    "phi3": GgufFamily("phi3"),
    "granite": GgufFamily("granite", pairs=True),
    "olmo2": GgufFamily("olmo2"),
    "glm4": GgufFamily("glm4"),
    "smollm3": GgufFamily("smollm3", pairs=True, plain_every=4),
    "arcee": GgufFamily("arcee", pairs=True),
}


# Attention of Gemma's largest models is scaled by the root of hidden / heads: llama.cpp knows them by their layers.
SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}
_LOCAL_THETA = 10000.0  # of gemma3's layers with a window


def family_of(model: ModelConfig, source: str) -> GgufFamily:
    """The row of a model. Raises UserError naming `source` where llama.cpp would compute something else."""
    family = FAMILIES.get(model.architecture)
    if family is None:
        raise UserError(f"{source}: {model.architecture} cannot be written as GGUF; can be: {', '.join(FAMILIES)}")
    for index, layer in enumerate(model.layers):
        _check_layer(layer.attention, index, family, model, source)
    attention = model.layers[0].attention
    by_hidden = len(model.layers) == SCALED_BY_HIDDEN.get(model.architecture)
    scale = (model.hidden_size / attention.num_heads if by_hidden else attention.head_dim) ** -0.5
    if model.architecture != "granite" and abs((attention.scale or scale) - scale) > 1e-6 * scale:
        raise UserError(f"{source}: attention is scaled otherwise than by {scale:g}, which GGUF cannot say")
    return family


def window_of(attention: Attention, model: ModelConfig) -> int | None:
    """The window of a layer, where there are positions beyond it."""
    return attention.window if attention.window is not None and attention.window < model.max_positions else None


def _check_layer(attention: Attention, index: int, family: GgufFamily, model: ModelConfig, source: str) -> None:
    """Raise UserError for a layer that llama.cpp would compute otherwise."""

    def every(period: int) -> bool:
        return period > 0 and (index + 1) % period == 0

    where = f"{source}: layer {index} of {model.architecture}"
    window = window_of(attention, model)
    if window is not None and (not family.full_every or window != window_of(model.layers[0].attention, model)):
        raise UserError(f"{where}: its window of attention is nothing that GGUF can say")
    if family.full_every and (window is None) != every(family.full_every) and model.max_positions > (window or 0):
        raise UserError(f"{where}: llama.cpp has windows in all layers but each {family.full_every}th")
    if (attention.rope is None) != every(family.plain_every):
        other = f"each {family.plain_every}th layer and no other" if family.plain_every else "no layer"
        raise UserError(f"{where}: llama.cpp leaves {other} without rotation")
    rope = attention.rope
    if model.architecture == "gemma3" and window and rope and (rope.theta != _LOCAL_THETA or rope.scaling):
        raise UserError(f"{where}: llama.cpp rotates layers with a window by rope_theta {_LOCAL_THETA:g}, unscaled")


def as_pairs(weight: Floats, heads: int) -> Floats:
    """Rows [out, ...] of a projection whose heads rotate columns i and i + E/2, for one that rotates 2i and 2i + 1."""
    head_dim = weight.shape[0] // heads
    turned = weight.reshape(heads, 2, head_dim // 2, *weight.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(turned.reshape(weight.shape))


def from_pairs(weight: Floats, heads: int) -> Floats:
    """The other way round."""
    head_dim = weight.shape[0] // heads
    turned = weight.reshape(heads, head_dim // 2, 2, *weight.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(turned.reshape(weight.shape))


def heads_of(module: str, attention: Attention) -> int | None:
    """How many heads the rows of a module are, where they are rotated; None for other modules."""
    return {"q_proj": attention.num_heads, "k_proj": attention.num_kv_heads}.get(module.rpartition(".")[2])
