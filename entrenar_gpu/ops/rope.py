"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, grid_of, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.registry import GradientContext, Gradients, Op, Placement, Spec, record, register


def rope(x: Tensor, table: Tensor, positions: Tensor, head_dim: int | None = None, interleaved: bool = False) -> Tensor:
    """Rotate pairs (i, i + R/2) of every head by the angle of its position (RoFormer, arXiv 2104.09864, eq. 34).

    x [T, H*E]; table [P, R]: cosines of the R/2 angles of a position, then their sines; positions u32 [T], below P.
    Where heads are longer than the table, `head_dim` E says so, and the columns from R on stay as they are.
    `interleaved` pairs (2i, 2i + 1) instead, as the paper does.
    """
    partial = head_dim if head_dim not in (None, table.columns) else None
    turned = {"head_dim": partial, "interleaved": interleaved or None}
    return record("rope", x=x, table=table, positions=positions, inverse=False, **turned)[0]


def rope_table(frequencies: Sequence[float], positions: int, factor: float = 1.0) -> np.ndarray:
    """[positions, R] f32: cos | sin of position * frequency, both times `factor`, from float64 angles."""
    angles = np.arange(positions, dtype=np.float64)[:, None] * np.asarray(frequencies, np.float64)
    return (factor * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32)


def _infer(node: Node) -> Sequence[Spec]:
    x, table = node.inputs["x"], node.inputs["table"]
    head_dim = node.attrs.get("head_dim", table.columns)
    if x.columns % head_dim or table.columns > head_dim or table.columns % 2:
        raise ValueError(f"{node.label()}: {table!r} does not rotate heads of {head_dim} of {x!r}")
    return [(x.shape, x.dtype)]


def _reference(node: Node, x: np.ndarray, table: np.ndarray, positions: np.ndarray) -> Sequence[np.ndarray]:
    rotary = table.shape[1]
    heads = x.reshape(len(positions.reshape(-1)), -1, node.attrs.get("head_dim", rotary))
    rotation = table[positions.reshape(-1)].astype(x.dtype)[:, None]
    cos, sin = rotation[..., : rotary // 2], rotation[..., rotary // 2 :]
    if node.attrs["inverse"]:
        sin = -sin
    interleaved = node.attrs.get("interleaved", False)
    pairs = (
        [slice(0, rotary, 2), slice(1, rotary, 2)] if interleaved else [slice(rotary // 2), slice(rotary // 2, rotary)]
    )
    first, second = (heads[..., columns] for columns in pairs)
    turned = heads.copy()
    turned[..., pairs[0]], turned[..., pairs[1]] = first * cos - second * sin, second * cos + first * sin
    return [turned.reshape(x.shape)]


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    x, table, positions = node.inputs.values()
    head_dim = node.attrs.get("head_dim", table.columns)
    shared = placed.aliased(node.output, x)
    pairs = x.size // head_dim * (table.columns if shared else head_dim) // 2
    constants = {
        "PAIRS": pairs,
        "HALF": table.columns // 2,
        "E": head_dim,
        "INTERLEAVED": node.attrs.get("interleaved", False),
        "WIDTH": x.columns,
        "source": "y" if shared else "x",
        "sign": "-" if node.attrs["inverse"] else "",
    }
    bindings = [] if shared else [reads("x", x)]
    bindings += [reads("table", table), reads("positions", positions), writes("y", node.output)]
    return [Launch("rope", tuple(bindings), constants, grid_of(ceil_div(pairs, 256), caps))]


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    """A rotation's transpose is the rotation back."""
    inputs, attrs = {**node.inputs, "x": upstream[0]}, {**node.attrs, "inverse": not node.attrs["inverse"]}
    return {"x": record("rope", **inputs, **attrs)[0]}


register(
    Op(
        "rope",
        _infer,
        _reference,
        _launch,
        _gradient,
        flops=lambda node: 3 * node.output.size,
        inplace=lambda node: [(0, "x")],
    )
)
