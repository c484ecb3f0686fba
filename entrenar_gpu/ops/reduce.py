"""Sums, means and softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, grid_of, literal, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.registry import GradientContext, Gradients, Op, Placement, Spec, record, register, same_as

CHUNK = 4096  # elements a workgroup sums in the first of two passes
ROWS_CHUNK = 128  # rows an invocation sums in the first of two passes


def sum(x: Tensor) -> Tensor:
    """Sum of all elements, shape [1]."""
    return sum_all(x, (1,))


def mean(x: Tensor) -> Tensor:
    """Mean of all elements, shape [1]."""
    return sum_all(x, (1,), 1.0 / x.size)


def sum_all(x: Tensor, shape: tuple[int, ...], factor: float = 1.0) -> Tensor:
    """factor * sum of all elements, as a tensor of one element with this shape."""
    return record("sum", x=x, axis="all", shape=shape, factor=factor)[0]


def sum_columns(x: Tensor) -> Tensor:
    """Sum over the last axis, [.., N] -> [..]."""
    return record("sum", x=x, axis="last", shape=x.shape[:-1], factor=1.0)[0]


def sum_rows(x: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Sum over the leading axes down to the trailing `shape` (default: the last axis)."""
    return record("sum", x=x, axis="leading", shape=shape or x.shape[-1:], factor=1.0)[0]


def _reference(node: Node, x: np.ndarray) -> Sequence[np.ndarray]:
    shape = node.attrs["shape"]
    kind = x.dtype.type
    if node.attrs["axis"] == "leading":
        total = x.reshape(-1, *shape).sum(axis=0, dtype=kind)
    elif node.attrs["axis"] == "last":
        total = x.sum(axis=-1, dtype=kind)
    else:
        total = x.sum(dtype=kind).reshape(shape)
    return [np.asarray(total * kind(node.attrs["factor"]))]


def rows_launch(source: Tensor, out: Tensor, outer: int, chunk: int, caps: Caps, factor: float = 1.0) -> Launch:
    """out[r] = factor * sum of the r-th run of `chunk` elements of source."""
    constants = {"mode": "rows", "OUTER": outer, "CHUNK": chunk, "TOTAL": source.size}
    constants |= {"factor": literal(factor), "accumulate": False}
    return Launch("reduce", (reads("source", source), writes("out", out)), constants, grid_of(outer, caps))


def columns_launch(source: Tensor, out: Tensor, parts: int, chunk: int, rows: int, inner: int, caps: Caps) -> Launch:
    """out[p, i] = sum over the p-th `chunk` of rows of source [rows, inner]."""
    constants = {"mode": "columns", "PARTS": parts, "CHUNK": chunk, "LENGTH": rows, "INNER": inner}
    constants |= {"factor": "1.0", "accumulate": False}
    grid = grid_of(ceil_div(parts * inner, 64), caps)
    return Launch("reduce", (reads("source", source), writes("out", out)), constants, grid)


def _workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    x = node.inputs["x"]
    if node.attrs["axis"] == "all" and x.size > CHUNK:
        return [((ceil_div(x.size, CHUNK),), "f32")]
    if node.attrs["axis"] == "leading" and x.size // node.output.size > ROWS_CHUNK:
        parts = ceil_div(x.size // node.output.size, ROWS_CHUNK)
        return [((parts, node.output.size), "f32")]
    return ()


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    x, out = node.inputs["x"], node.output
    if node.attrs["axis"] == "last":
        return [rows_launch(x, out, out.size, x.columns, caps, node.attrs["factor"])]
    if node.attrs["axis"] == "all":
        if not placed.workspace:
            return [rows_launch(x, out, 1, x.size, caps, node.attrs["factor"])]
        (partial,) = placed.workspace
        first = rows_launch(x, partial, partial.size, CHUNK, caps)
        return [first, rows_launch(partial, out, 1, partial.size, caps, node.attrs["factor"])]
    rows = x.size // out.size
    if not placed.workspace:
        return [columns_launch(x, out, 1, rows, rows, out.size, caps)]
    (partial,) = placed.workspace
    parts = partial.shape[0]
    return [
        columns_launch(x, partial, parts, ROWS_CHUNK, rows, out.size, caps),
        columns_launch(partial, out, 1, parts, parts, out.size, caps),
    ]


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    attrs = {**node.attrs, "shape": node.inputs["x"].shape}
    return {"x": record("expand", dy=upstream[0], **attrs)[0]}


register(
    Op(
        "sum",
        lambda node: [(node.attrs["shape"], node.inputs["x"].dtype)],
        _reference,
        _launch,
        _gradient,
        workspace=_workspace,
        flops=lambda node: node.inputs["x"].size,
    )
)


def _expand_reference(node: Node, dy: np.ndarray) -> Sequence[np.ndarray]:
    shape = node.attrs["shape"]
    dy = dy[..., None] if node.attrs["axis"] == "last" else dy.reshape(()) if node.attrs["axis"] == "all" else dy
    return [np.broadcast_to(dy * dy.dtype.type(node.attrs["factor"]), shape).copy()]


def _expand_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    dy, out = node.inputs["dy"], node.output
    index = {"last": f"i / {out.columns}u", "all": "0", "leading": f"i % {dy.size}u"}[node.attrs["axis"]]
    constants = {
        "size": out.size,
        "loads": [("a", f"source[{index}]")],
        "stores": [("out0", f"a * {literal(node.attrs['factor'])}")],
        "functions": "",
    }
    bindings = (reads("source", dy), writes("out0", out))
    return [Launch("elementwise", bindings, constants, grid_of(ceil_div(out.size, 256), caps))]


def _expand_gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    attrs = {**node.attrs, "shape": node.inputs["dy"].shape}
    return {"dy": record("sum", x=upstream[0], **attrs)[0]}


register(
    Op(
        "expand",
        lambda node: [(node.attrs["shape"], node.inputs["dy"].dtype)],
        _expand_reference,
        _expand_launch,
        _expand_gradient,
    )
)


def softmax(x: Tensor) -> Tensor:
    """exp(x - max) / sum over the last axis, [.., N]."""
    return record("softmax", x=x)[0]


def _softmax_reference(node: Node, x: np.ndarray) -> Sequence[np.ndarray]:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return [e / e.sum(axis=-1, keepdims=True)]


def _softmax_gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    return {"x": record("softmax_grad", y=node.output, dy=upstream[0])[0]}


def _softmax_grad_reference(node: Node, y: np.ndarray, dy: np.ndarray) -> Sequence[np.ndarray]:
    return [y * (dy - (y * dy).sum(axis=-1, keepdims=True))]


def _per_row(mode: str) -> Callable[[Node, Caps, Placement], Sequence[Launch]]:
    def launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
        bindings = [reads(name, tensor) for name, tensor in node.inputs.items()]
        constants = {"mode": mode, "ROWS": node.output.rows, "N": node.output.columns}
        grid = grid_of(node.output.rows, caps)
        return [Launch("softmax", (*bindings, writes("out", node.output)), constants, grid)]

    return launch


def _ops_an_element(count: int) -> Callable[[Node], int]:
    return lambda node: count * node.output.size


register(
    Op(
        "softmax",
        same_as("x"),
        _softmax_reference,
        _per_row("softmax"),
        _softmax_gradient,
        flops=_ops_an_element(5),
    )
)
register(Op("softmax_grad", same_as("y"), _softmax_grad_reference, _per_row("softmax_grad"), flops=_ops_an_element(4)))
