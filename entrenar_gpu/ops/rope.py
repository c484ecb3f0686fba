"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, grid_of, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.registry import GradientContext, Gradients, Op, Placement, record, register, same_as


def rope(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Rotate pairs (i, i + E/2) of every head by the angle of its position (RoFormer, arXiv 2104.09864, eq. 34).

    x [T, H*E]; table [P, E]: cosines of the E/2 angles of a position, then their sines; positions u32 [T], below P.
    """
    return record("rope", x=x, table=table, positions=positions, inverse=False)[0]


def rope_table(frequencies: Sequence[float], positions: int) -> np.ndarray:
    """[positions, E] f32: cos | sin of position * frequency, from float64 angles."""
    angles = np.arange(positions, dtype=np.float64)[:, None] * np.asarray(frequencies, np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _reference(node: Node, x: np.ndarray, table: np.ndarray, positions: np.ndarray) -> Sequence[np.ndarray]:
    half = table.shape[1] // 2
    heads = x.reshape(len(positions.reshape(-1)), -1, 2, half)
    rotation = table[positions.reshape(-1)].astype(x.dtype)[:, None]
    cos, sin = rotation[..., :half], rotation[..., half:]
    if node.attrs["inverse"]:
        sin = -sin
    first, second = heads[:, :, 0], heads[:, :, 1]
    return [np.stack([first * cos - second * sin, second * cos + first * sin], axis=2).reshape(x.shape)]


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    x, table, positions = node.inputs.values()
    pairs = x.size // 2
    shared = placed.aliased(node.output, x)
    constants = {
        "PAIRS": pairs,
        "HALF": table.columns // 2,
        "WIDTH": x.columns,
        "source": "y" if shared else "x",
        "sign": "-" if node.attrs["inverse"] else "",
    }
    bindings = [] if shared else [reads("x", x)]
    bindings += [reads("table", table), reads("positions", positions), writes("y", node.output)]
    return [Launch("rope", tuple(bindings), constants, grid_of(ceil_div(pairs, 256), caps))]


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    """A rotation's transpose is the rotation back."""
    inputs = {**node.inputs, "x": upstream[0]}
    return {"x": record("rope", **inputs, inverse=not node.attrs["inverse"])[0]}


register(
    Op(
        "rope",
        same_as("x"),
        _reference,
        _launch,
        _gradient,
        flops=lambda node: 3 * node.output.size,
        inplace=lambda node: [(0, "x")],
    )
)
