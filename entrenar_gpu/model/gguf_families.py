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
    keys are written in that order. `windows`: it knows layers with a window; where not, a model with one is refused."""

    architecture: str
    pairs: bool = False
    windows: bool = False


# By the file of families/. Those that are missing here llama.cpp computes otherwise, or not at all.
FAMILIES = {
    "llama": GgufFamily("llama", pairs=True),
    "mistral": GgufFamily("llama", pairs=True),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "gemma2": GgufFamily("gemma2", windows=True),
    "gemma3": GgufFamily("gemma3", windows=True),
    "phi3": GgufFamily("phi3"),
    "granite": GgufFamily("granite", pairs=True),
    "olmo2": GgufFamily("olmo2"),
    "glm4": GgufFamily("glm4"),
    "smollm3": GgufFamily("smollm3", pairs=True),
    "arcee": GgufFamily("arcee", pairs=True),
}


def family_of(model: ModelConfig, source: str) -> GgufFamily:
    """The row of a model. Raises UserError naming `source` where llama.cpp would compute something else."""
    family = FAMILIES.get(model.architecture)
    if family is None:
        raise UserError(f"{source}: {model.architecture} cannot be written as GGUF; can be: {', '.join(FAMILIES)}")
    if not family.windows and any(layer.attention.window for layer in model.layers):
        raise UserError(f"{source}: a window of attention in {model.architecture} is nothing that GGUF can say")
    attention = model.layers[0].attention
    scale = attention.head_dim**-0.5
    if model.architecture != "granite" and abs((attention.scale or scale) - scale) > 1e-6 * scale:
        raise UserError(f"{source}: attention is scaled otherwise than by 1/sqrt(head_dim), which GGUF cannot say")
    return family


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
