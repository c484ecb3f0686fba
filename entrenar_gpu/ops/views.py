"""Ops that move elements without computing: another order of axes, another shape, repetition, a part by strides.

On the GPU each is a copy: a tensor is a whole buffer, row-major, whatever it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, grid_of, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.reduce import sum_all, sum_columns, sum_rows
from entrenar_gpu.ops.registry import GradientContext, Gradients, Op, Placement, Spec, record, register

WORKGROUP = 256


def transpose(x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """The axes of x in another order (all of them, each once); reversed by default."""
    order = tuple(axes) if axes is not None else tuple(reversed(range(len(x.shape))))
    return record("transpose", x=x, axes=order)[0]


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The elements of x, in their order, in another shape of as many."""
    return record("reshape", x=x, shape=tuple(shape))[0]


def broadcast(x: Tensor, shape: Sequence[int]) -> Tensor:
    """x repeated to `shape` along the axes that it lacks or has one element in, by NumPy's rules."""
    return record("broadcast", x=x, shape=tuple(shape))[0]


def part(x: Tensor, starts: Sequence[int], steps: Sequence[int], shape: Sequence[int]) -> Tensor:
    """x[starts[0] : : steps[0], starts[1] : : steps[1], ...], `shape` of it: a step may be negative, and never 0."""
    return record("part", x=x, starts=tuple(starts), steps=tuple(steps), shape=tuple(shape))[0]


def sum_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """x summed over what broadcasting `shape` to x's shape repeats."""
    shape = tuple(shape)
    padded = (1,) * (len(x.shape) - len(shape)) + shape
    summed = tuple(d for d, (n, to) in enumerate(zip(x.shape, padded, strict=True)) if n != to)
    if not summed:
        return x if x.shape == shape else reshape(x, shape)
    if math.prod(shape) == 1:
        return sum_all(x, shape)
    kept = tuple(d for d in range(len(x.shape)) if d not in summed)
    lengths = tuple(x.shape[d] for d in kept)
    if summed == (len(x.shape) - 1,):
        total = sum_columns(x)
    else:
        total = sum_rows(x if max(summed) < min(kept) else transpose(x, (*summed, *kept)), lengths)
    return total if total.shape == shape else reshape(total, shape)


def _strides(shape: Sequence[int]) -> list[int]:
    """Elements between neighbours along each axis of a row-major array."""
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def _coordinate(shape: Sequence[int], axis: int) -> str:
    """WGSL for the coordinate of element i along an axis."""
    stride = _strides(shape)[axis]
    inner = f"i / {stride}u" if stride > 1 else "i"
    return f"({inner})" if axis == 0 else f"(({inner}) % {shape[axis]}u)"


def _copy(node: Node, caps: Caps, index: str, value: str = "source[{index}]") -> list[Launch]:
    """out[i] = source[index], as WGSL over i. Indices are u32 and wrap: a negative stride is one of 2^32 more."""
    (source,), out = node.inputs.values(), node.output
    loads = [("a", value.format(index=index))]
    constants = {"size": out.size, "loads": loads, "stores": [("out0", "a")], "functions": ""}
    bindings = (reads("source", source), writes("out0", out))
    return [Launch("elementwise", bindings, constants, grid_of(ceil_div(out.size, WORKGROUP), caps))]


def _strided(shape: Sequence[int], strides: Sequence[int], offset: int) -> str:
    """WGSL for offset + the sum of coordinate times stride over the axes of an output of `shape`."""
    terms = [
        f"{_coordinate(shape, d)} * {stride % 2**32}u" for d, stride in enumerate(strides) if stride and shape[d] > 1
    ]
    return " + ".join([f"{offset}u", *terms])


def _transpose_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    strides = _strides(node.inputs["x"].shape)
    index = _strided(node.output.shape, [strides[d] for d in node.attrs["axes"]], 0)
    return _copy(node, caps, index)


def _transpose_infer(node: Node) -> Sequence[Spec]:
    x, axes = node.inputs["x"], node.attrs["axes"]
    if sorted(axes) != list(range(len(x.shape))):
        raise ValueError(f"{node.label()}: {list(axes)} are not the axes of {x!r}")
    return [(tuple(x.shape[d] for d in axes), x.dtype)]


def _transpose_gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    axes = node.attrs["axes"]
    return {"x": transpose(upstream[0], sorted(range(len(axes)), key=axes.__getitem__))}


register(
    Op(
        "transpose",
        _transpose_infer,
        lambda node, x: [np.ascontiguousarray(x.transpose(node.attrs["axes"]))],
        _transpose_launch,
        _transpose_gradient,
        flops=lambda node: 0,
    )
)


def _reshape_infer(node: Node) -> Sequence[Spec]:
    x, shape = node.inputs["x"], node.attrs["shape"]
    if math.prod(shape) != x.size or any(n < 1 for n in shape):
        raise ValueError(f"{node.label()}: {x!r} does not have the elements of {list(shape)}")
    return [(shape, x.dtype)]


register(
    Op(
        "reshape",
        _reshape_infer,
        lambda node, x: [x.reshape(node.attrs["shape"]).copy()],
        lambda node, caps, placed: _copy(node, caps, "i"),
        lambda node, upstream, context: {"x": reshape(upstream[0], node.inputs["x"].shape)},
        flops=lambda node: 0,
    )
)


def _broadcast_infer(node: Node) -> Sequence[Spec]:
    x, shape = node.inputs["x"], node.attrs["shape"]
    padded = (1,) * (len(shape) - len(x.shape)) + x.shape
    if len(padded) != len(shape) or any(n not in (1, to) for n, to in zip(padded, shape, strict=True)):
        raise ValueError(f"{node.label()}: {x!r} does not broadcast to {list(shape)}")
    return [(shape, x.dtype)]


def _broadcast_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    x, shape = node.inputs["x"], node.output.shape
    missing = len(shape) - len(x.shape)
    strides = [s if n > 1 else 0 for n, s in zip(x.shape, _strides(x.shape), strict=True)]
    return _copy(node, caps, _strided(shape, [0] * missing + strides, 0))


register(
    Op(
        "broadcast",
        _broadcast_infer,
        lambda node, x: [np.broadcast_to(x, node.attrs["shape"]).copy()],
        _broadcast_launch,
        lambda node, upstream, context: {"x": sum_to(upstream[0], node.inputs["x"].shape)},
        flops=lambda node: 0,
    )
)


def _slices(node: Node) -> tuple[slice, ...]:
    """The part that a "part" or "placed" node speaks of, for NumPy."""
    found = []
    for start, step, n in zip(node.attrs["starts"], node.attrs["steps"], node.attrs["shape"], strict=True):
        stop = start + step * n
        found.append(slice(start, stop if stop >= 0 else None, step))
    return tuple(found)


def _part_infer(node: Node) -> Sequence[Spec]:
    x, shape = node.inputs["x"], node.attrs["shape"]
    parts = zip(x.shape, node.attrs["starts"], node.attrs["steps"], shape, strict=True)
    for length, start, step, n in parts:
        if n < 1 or step == 0 or not (0 <= start < length and 0 <= start + step * (n - 1) < length):
            raise ValueError(f"{node.label()}: {_slices(node)} is not a part of {x!r}")
    return [(shape, x.dtype)]


def _part_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    strides = _strides(node.inputs["x"].shape)
    offset = sum(start * stride for start, stride in zip(node.attrs["starts"], strides, strict=True))
    steps = [step * stride for step, stride in zip(node.attrs["steps"], strides, strict=True)]
    return _copy(node, caps, _strided(node.output.shape, steps, offset))


def _part_gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    return {"x": record("placed", x=upstream[0], **node.attrs, into=node.inputs["x"].shape)[0]}


register(
    Op(
        "part",
        _part_infer,
        lambda node, x: [x[_slices(node)].copy()],
        _part_launch,
        _part_gradient,
        flops=lambda node: 0,
    )
)


def _placed_reference(node: Node, x: np.ndarray) -> Sequence[np.ndarray]:
    out = np.zeros(node.attrs["into"], x.dtype)
    out[_slices(node)] = x
    return [out]


def _placed_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    """Element i of the output is one of x's where, along each axis, it is a whole number of steps from the start."""
    shape, part_shape = node.output.shape, node.attrs["shape"]
    index, inside = ["0u"], ["true"]
    for d, stride in enumerate(_strides(part_shape)):
        start, step, n = node.attrs["starts"][d], node.attrs["steps"][d], part_shape[d]
        at = _coordinate(shape, d)
        away = f"({at} - {start}u)" if step > 0 else f"({start}u - {at})"  # wraps to far outside before the start
        inside += [f"{away} % {abs(step)}u == 0u", f"{away} / {abs(step)}u < {n}u"]
        index.append(f"{away} / {abs(step)}u * {stride}u")
    # Both sides of a select are computed: outside of the part, element 0 is read and dropped.
    chosen = " && ".join(f"({term})" for term in inside)
    at = f"select(0u, {' + '.join(index)}, {chosen})"
    return _copy(node, caps, at, value="select(0.0, source[{index}], " + chosen + ")")


register(
    Op(
        "placed",
        lambda node: [(node.attrs["into"], node.inputs["x"].dtype)],
        _placed_reference,
        _placed_launch,
        lambda node, upstream, context: {
            "x": part(upstream[0], node.attrs["starts"], node.attrs["steps"], node.attrs["shape"])
        },
        flops=lambda node: 0,
    )
)
