"""RMS and layer normalisation over the last axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, grid_of, literal, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.elementwise import mul
from entrenar_gpu.ops.reduce import sum_rows
from entrenar_gpu.ops.registry import GradientContext, Gradients, Op, Placement, Spec, record, register, same_as

WORKGROUP = 256
_STATISTICS = ("rstd", "average")  # what a norm leaves for its gradient; RMS norms have no average


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last axis (Zhang & Sennrich, arXiv 1910.07467, eq. 4).

    x [.., N]; weight [W] with N a multiple of W: the axis that is normalised is W long, so that a [T, H*E] tensor is
    normalised head by head with a weight of E. Gemma's weights are stored less the `offset` of 1.
    """
    return record("rms_norm", x=x, weight=weight, eps=eps, offset=offset or None)[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (Ba et al., arXiv 1607.06450, eq. 4)."""
    return record("layer_norm", x=x, weight=weight, bias=bias, eps=eps)[0]


def _groups(node: Node) -> tuple[int, int]:
    """(rows, length) of the runs that are normalised."""
    x, weight = node.inputs["x"], node.inputs["weight"]
    return x.size // weight.size, weight.size


def _infer(node: Node) -> Sequence[Spec]:
    x, weight = node.inputs["x"], node.inputs["weight"]
    if x.columns % weight.size:
        raise ValueError(f"{node.label()}: {weight!r} does not divide the last axis of {x!r}")
    rows, _ = _groups(node)
    statistics = [((rows,), "f32")] * (1 if node.op == "rms_norm" else 2)
    return [(x.shape, x.dtype), *statistics]


def _rms_reference(node: Node, x: np.ndarray, weight: np.ndarray) -> Sequence[np.ndarray]:
    rows = x.reshape(-1, weight.size)
    rstd = 1 / np.sqrt((rows * rows).mean(axis=-1) + x.dtype.type(node.attrs["eps"]))
    return [(rows * rstd[:, None] * offset_weight(node, weight)).reshape(x.shape), rstd]


def offset_weight(node: Node, weight: np.ndarray) -> np.ndarray:
    """What is multiplied by: the weight as stored and the node's offset."""
    return weight + weight.dtype.type(node.attrs["offset"]) if "offset" in node.attrs else weight


def offset_literal(node: Node) -> str:
    """The same for shaders, empty where there is no offset."""
    return literal(node.attrs["offset"]) if "offset" in node.attrs else ""


def _layer_reference(node: Node, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> Sequence[np.ndarray]:
    rows = x.reshape(-1, weight.size)
    average = rows.mean(axis=-1)
    centred = rows - average[:, None]
    rstd = 1 / np.sqrt((centred * centred).mean(axis=-1) + x.dtype.type(node.attrs["eps"]))
    return [(centred * rstd[:, None] * weight + bias).reshape(x.shape), rstd, average]


def _blocking(node: Node) -> dict[str, int]:
    """Rows and their length, the width of vectors, and how many invocations of a workgroup's 256 share a row."""
    rows, length = _groups(node)
    width = 4 if length % 4 == 0 else 1
    return {"ROWS": rows, "N": length, "VEC": width, "SUMMED": lanes(length // width)}


def lanes(steps: int) -> int:
    """Invocations for so many steps: a power of two, 256 at most."""
    return min(1 << (steps - 1).bit_length(), WORKGROUP)


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    constants: dict[str, Any] = {**_blocking(node), "mode": node.op, "eps": literal(node.attrs["eps"])}
    constants["offset"] = offset_literal(node)
    width = constants["VEC"]
    bindings = [reads(name, tensor, width) for name, tensor in node.inputs.items()]
    bindings += [writes("y", node.output, width)]
    bindings += [writes(n, t) for n, t in zip(_STATISTICS, node.outputs[1:], strict=False)]
    grid = grid_of(ceil_div(constants["ROWS"] * constants["SUMMED"], WORKGROUP), caps)
    return [Launch("norm", tuple(bindings), constants, grid)]


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    """dx = rstd (g - xhat mean(g xhat) [- mean(g]) with g = dy weight; dweight = sum dy xhat; dbias = sum dy."""
    dy, x, weight, bias = upstream[0], node.inputs["x"], node.inputs["weight"], node.inputs.get("bias")
    statistics = dict(zip(_STATISTICS, node.outputs[1:], strict=False))
    dx = dweight = dbias = None
    if context.wanted(x):
        dx = record("norm_grad", x=x, weight=weight, dy=dy, **statistics, offset=node.attrs.get("offset"))[0]
    if context.wanted(weight):
        xhat = record("norm_hat", x=x, **statistics, length=weight.size)[0]
        dweight = sum_rows(mul(dy, xhat), weight.shape)
    if bias is not None and context.wanted(bias):
        dbias = sum_rows(dy, bias.shape)
    return {"x": dx, "weight": dweight, "bias": dbias}


def _hat(x: np.ndarray, length: int, rstd: np.ndarray, average: np.ndarray | None) -> np.ndarray:
    rows = x.reshape(-1, length)
    return (rows if average is None else rows - average[:, None]) * rstd[:, None]


def _grad_reference(
    node: Node,
    x: np.ndarray,
    weight: np.ndarray,
    dy: np.ndarray,
    rstd: np.ndarray,
    average: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> Sequence[np.ndarray]:
    xhat = _hat(x, weight.size, rstd, average)
    g = dy.reshape(xhat.shape) * offset_weight(node, weight)
    dx = g - xhat * (g * xhat).mean(axis=-1, keepdims=True)
    if average is not None:
        dx -= g.mean(axis=-1, keepdims=True)
    dx = (dx * rstd[:, None]).reshape(x.shape)
    return [dx if residual is None else dx + residual]


def _grad_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    """With a residual, which is added to where it lies if it is not read again."""
    constants: dict[str, Any] = {**_blocking(node), "eps": "", "residual": "", "offset": offset_literal(node)}
    width, residual = constants["VEC"], node.inputs.get("residual")
    bindings = [reads(name, node.inputs[name], width) for name in ("x", "weight", "dy")]
    if residual is not None:
        constants["residual"] = "dx" if placed.aliased(node.output, residual) else "residual"
        bindings += [] if constants["residual"] == "dx" else [reads("residual", residual, width)]
    bindings += [reads(name, node.inputs[name]) for name in _STATISTICS if name in node.inputs]
    constants["mode"] = "layer_norm_grad" if "average" in node.inputs else "rms_norm_grad"
    grid = grid_of(ceil_div(constants["ROWS"] * constants["SUMMED"], WORKGROUP), caps)
    return [Launch("norm", (*bindings, writes("dx", node.output, width)), constants, grid)]


def _hat_reference(
    node: Node, x: np.ndarray, rstd: np.ndarray, average: np.ndarray | None = None
) -> Sequence[np.ndarray]:
    return [_hat(x, node.attrs["length"], rstd, average).reshape(x.shape)]


def _hat_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    x, average = node.inputs["x"], "average" in node.inputs
    row = f"i / {node.attrs['length']}u"
    loads = [("a", "x[i]"), ("r", f"rstd[{row}]"), ("m", f"average[{row}]" if average else "0.0")]
    constants = {"size": x.size, "loads": loads, "stores": [("out0", "(a - m) * r")], "functions": ""}
    bindings = [reads(name, tensor) for name, tensor in node.inputs.items()]
    return [
        Launch("elementwise", (*bindings, writes("out0", node.output)), constants, grid_of(ceil_div(x.size, 256), caps))
    ]


def _ops_an_element(count: int) -> Callable[[Node], int]:
    return lambda node: count * node.output.size


for _name, _ref in (("rms_norm", _rms_reference), ("layer_norm", _layer_reference)):
    register(Op(_name, _infer, _ref, _launch, _gradient, flops=_ops_an_element(5)))
register(
    Op(
        "norm_grad",
        same_as("x"),
        _grad_reference,
        _grad_launch,
        flops=_ops_an_element(8),
        inplace=lambda node: [(0, "residual")] if "residual" in node.inputs else [],
    )
)
register(Op("norm_hat", same_as("x"), _hat_reference, _hat_launch))
