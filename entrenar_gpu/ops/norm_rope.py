"""RMS normalisation of each head followed by its rotary embedding, in one pass: queries and keys of Qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, grid_of, literal, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.elementwise import mul
from entrenar_gpu.ops.norm import WORKGROUP, lanes, offset_literal
from entrenar_gpu.ops.reduce import sum_rows
from entrenar_gpu.ops.registry import OPS, GradientContext, Gradients, Op, Placement, Spec, record, register


def norm_rope(x: Tensor, weight: Tensor, eps: float, table: Tensor, positions: Tensor, offset: float = 0.0) -> Tensor:
    """rope(rms_norm(x, weight, eps, offset), table, positions), for heads that are rotated whole, by halves.

    x [T, H*E], weight [E], table [P, E], positions u32 [T].
    """
    return record("norm_rope", x=x, weight=weight, table=table, positions=positions, eps=eps, offset=offset or None)[0]


def _infer(node: Node) -> Sequence[Spec]:
    x, weight, table, _ = node.inputs.values()
    if x.columns % weight.size or table.columns != weight.size:
        raise ValueError(f"{node.label()}: {weight!r} and {table!r} are not a head of {x!r}")
    return [(x.shape, "f32"), ((x.size // weight.size,), "f32")]


def _rotated(x: np.ndarray, table: np.ndarray, positions: np.ndarray, like: Node, inverse: bool) -> np.ndarray:
    node = Node("rope", like.inputs, {"inverse": inverse})
    return OPS["rope"].reference(node, x, table, positions)[0]


def _reference(
    node: Node, x: np.ndarray, weight: np.ndarray, table: np.ndarray, positions: np.ndarray
) -> Sequence[np.ndarray]:
    y, rstd = OPS["rms_norm"].reference(node, x, weight)
    return [_rotated(y, table, positions, node, False), rstd]


def _grad_reference(
    node: Node,
    x: np.ndarray,
    weight: np.ndarray,
    table: np.ndarray,
    positions: np.ndarray,
    dy: np.ndarray,
    rstd: np.ndarray,
) -> Sequence[np.ndarray]:
    rotated = _rotated(dy, table, positions, node, True)
    return OPS["norm_grad"].reference(node, x, weight, rotated, rstd)


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    x, weight, table, positions, *given = node.inputs.values()
    half = weight.size // 2
    width = 4 if half % 4 == 0 else 1
    shared = lanes(half // width)
    constants: dict[str, Any] = {"mode": node.op, "ROWS": x.size // weight.size, "HEADS": x.columns // weight.size}
    constants |= {"HALF": half // width, "N": weight.size, "VEC": width, "SUMMED": shared}
    constants |= {"eps": literal(node.attrs["eps"]), "offset": offset_literal(node)}
    bindings = [reads("x", x, width), reads("weight", weight, width), reads("table", table, width)]
    bindings.append(reads("positions", positions))
    if given:
        bindings += [reads("dy", given[0], width), reads("rstd", given[1]), writes("dx", node.output, width)]
    else:
        bindings += [writes("y", node.output, width), writes("rstd", node.outputs[1])]
    grid = grid_of(ceil_div(constants["ROWS"] * shared, WORKGROUP), caps)
    return [Launch("norm_rope", tuple(bindings), constants, grid)]


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    """A rotation's transpose is the rotation back; then the norm's own rule."""
    (x, weight, table, positions), dy, rstd = node.inputs.values(), upstream[0], node.outputs[1]
    dx = dweight = None
    if context.wanted(x):
        dx = record("norm_rope_grad", **node.inputs, dy=dy, rstd=rstd, **node.attrs)[0]
    if context.wanted(weight):
        back = record("rope", x=dy, table=table, positions=positions, inverse=True)[0]
        xhat = record("norm_hat", x=x, rstd=rstd, length=weight.size)[0]
        dweight = sum_rows(mul(back, xhat), weight.shape)
    return {"x": dx, "weight": dweight}


register(Op("norm_rope", _infer, _reference, _launch, _gradient, flops=lambda node: 8 * node.output.size))
register(
    Op(
        "norm_rope_grad",
        lambda node: [(node.inputs["x"].shape, "f32")],
        _grad_reference,
        _launch,
        flops=lambda node: 11 * node.output.size,
    )
)
