"""Ops that compute each element from the same element of their inputs.

A row is a WGSL expression over the loaded values and a NumPy function; binary ops broadcast `b` over leading
dimensions, or from a single value.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Binding, Caps, Launch, Node, Tensor, grid_of, literal, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.reduce import sum_all, sum_rows
from entrenar_gpu.ops.registry import (
    GradientContext,
    Gradients,
    Op,
    Placement,
    Spec,
    not_differentiable,
    record,
    register,
    same_as,
)

WORKGROUP = 256


def elementwise_launch(
    node: Node,
    caps: Caps,
    placed: Placement,
    expressions: Sequence[str],
    functions: str = "",
    names: Sequence[str] | None = None,
    by_row: Collection[str] = (),
) -> list[Launch]:
    """The launch of a node whose k-th output is expressions[k] over its inputs, by their names or `names` in order.

    An input that is shorter than the output is repeated; those named in `by_row` have a value for each row. An input
    that shares storage with an output is read through the output's binding. An invocation takes four values where all
    tensors are as long, and that in fours.
    """
    size = node.output.size
    wide = size % 4 == 0 and all(t.size == size for t in node.inputs.values())
    width = 4 if wide else 1
    bindings: list[Binding] = []
    loads = []
    outs = [f"out{k}" for k in range(len(expressions))]
    for name, tensor in zip(names or node.inputs, node.inputs.values(), strict=True):
        shared = [out for out, made in zip(outs, node.outputs, strict=True) if placed.aliased(made, tensor)]
        source = shared[0] if shared else f"in_{name}"
        if not shared and all(b.name != source for b in bindings):
            bindings.append(reads(source, tensor, width))
        index = "i" if tensor.size == size else "0" if tensor.size == 1 else f"i % {tensor.size}u"
        index = f"i / {node.output.columns}u" if name in by_row else index
        loads.append((name, f"{source}[{index}]"))
    bindings += [writes(out, tensor, width) for out, tensor in zip(outs, node.outputs, strict=True)]
    constants = {
        "size": size,
        "loads": loads,
        "stores": list(zip(outs, expressions, strict=True)),
        "functions": functions,
        "wide": wide,
    }
    return [Launch("elementwise", tuple(bindings), constants, grid_of(ceil_div(size, width * WORKGROUP), caps))]


def first_as_large(node: Node) -> Sequence[tuple[int, str]]:
    """The first input that is as large as the output."""
    out = node.output
    return [(0, name) for name, t in node.inputs.items() if (t.size, t.dtype) == (out.size, out.dtype)][:1]


def _binary(name: str, expression: str, function: Any, gradient: Any) -> None:
    def infer(node: Node) -> Sequence[Spec]:
        a, b = node.inputs["a"], node.inputs["b"]
        if not (b.shape == a.shape or b.size == 1 or b.shape == a.shape[len(a.shape) - len(b.shape) :]):
            raise ValueError(f"{node.label()}: {b!r} does not broadcast to {a!r}")
        return [(a.shape, a.dtype)]

    def reference(node: Node, a: np.ndarray, b: np.ndarray) -> Sequence[np.ndarray]:
        return [function(a, b.reshape(()) if b.size == 1 else b).astype(a.dtype, copy=False)]

    def launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
        return elementwise_launch(node, caps, placed, [expression])

    register(Op(name, infer, reference, launch, gradient, inplace=first_as_large))


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b; b has a's shape, its trailing dimensions, or one element."""
    return record("add", a=a, b=b)[0]


def sub(a: Tensor, b: Tensor) -> Tensor:
    """a - b, broadcast as `add`."""
    return record("sub", a=a, b=b)[0]


def mul(a: Tensor, b: Tensor) -> Tensor:
    """a * b, broadcast as `add`."""
    return record("mul", a=a, b=b)[0]


def div(a: Tensor, b: Tensor) -> Tensor:
    """a / b, broadcast as `add`."""
    return record("div", a=a, b=b)[0]


def scale(a: Tensor, factor: float) -> Tensor:
    """a * factor, for a factor known when the graph is traced."""
    return record("scale", a=a, factor=float(factor))[0]


def _reduced(gradient: Tensor, b: Tensor) -> Tensor:
    """`gradient` summed over what broadcasting `b` repeated."""
    if b.shape == gradient.shape:
        return gradient
    if b.size == 1:
        return sum_all(gradient, b.shape)
    return sum_rows(gradient, b.shape)


def _add_gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    (dy,) = upstream
    b = node.inputs["b"]
    return {"a": dy, "b": _reduced(dy, b) if context.wanted(b) else None}


def _sub_gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    (dy,) = upstream
    b = node.inputs["b"]
    return {"a": dy, "b": _reduced(scale(dy, -1.0), b) if context.wanted(b) else None}


def _mul_gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    (dy,) = upstream
    a, b = node.inputs["a"], node.inputs["b"]
    return {
        "a": mul(dy, b) if context.wanted(a) else None,
        "b": _reduced(mul(dy, a), b) if context.wanted(b) else None,
    }


def _div_gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    (dy,) = upstream
    b = node.inputs["b"]
    db = scale(mul(div(dy, b), node.output), -1.0) if context.wanted(b) else None
    return {
        "a": div(dy, b) if context.wanted(node.inputs["a"]) else None,
        "b": None if db is None else _reduced(db, b),
    }


_binary("add", "a + b", np.add, _add_gradient)
_binary("sub", "a - b", np.subtract, _sub_gradient)
_binary("mul", "a * b", np.multiply, _mul_gradient)
_binary("div", "a / b", np.divide, _div_gradient)


register(
    Op(
        "scale",
        same_as("a"),
        lambda node, a: [a * a.dtype.type(node.attrs["factor"])],
        lambda node, caps, placed: elementwise_launch(node, caps, placed, [f"a * {literal(node.attrs['factor'])}"]),
        lambda node, upstream, context: {"a": scale(upstream[0], node.attrs["factor"])},
        inplace=first_as_large,
    )
)


def _softcapped(cap: float) -> str:
    return f"tanh(clamp(x * {literal(1 / cap)}, -20.0, 20.0)) * {literal(cap)}"


def softcapped(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap) (Bello et al., arXiv 1611.09940). Of what is not differentiated."""
    return record("softcapped", x=x, cap=cap)[0]


register(
    Op(
        "softcapped",
        same_as("x"),
        lambda node, x: [x.dtype.type(node.attrs["cap"]) * np.tanh(x / x.dtype.type(node.attrs["cap"]))],
        lambda node, caps, placed: elementwise_launch(node, caps, placed, [_softcapped(node.attrs["cap"])]),
        inplace=first_as_large,
    )
)


def fill(like: Tensor, value: float) -> Tensor:
    """A tensor of `like`'s shape holding `value` everywhere."""
    return record("fill", like=like, value=float(value), shape=like.shape)[0]


def copy_launch(source: Tensor, out: Tensor, caps: Caps) -> Launch:
    """out = source."""
    constants = {"size": out.size, "loads": [("a", "source[i]")], "stores": [("out0", "a")], "functions": ""}
    bindings = (reads("source", source), writes("out0", out))
    return Launch("elementwise", bindings, constants, grid_of(ceil_div(out.size, WORKGROUP), caps))


def zeros(like: Tensor) -> Tensor:
    return fill(like, 0.0)


def ones(like: Tensor) -> Tensor:
    return fill(like, 1.0)


def _fill_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    size = node.output.size
    constants = {"size": size, "loads": [], "stores": [("out0", literal(node.attrs["value"]))], "functions": ""}
    bindings = (writes("out0", node.output),)
    return [Launch("elementwise", bindings, constants, grid_of(ceil_div(size, WORKGROUP), caps))]


register(
    Op(
        "fill",
        same_as("like"),
        lambda node, like: [np.full(like.shape, node.attrs["value"], like.dtype)],
        _fill_launch,
        not_differentiable,
    )
)
