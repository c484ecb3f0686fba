"""Sums of gradients inside the ops that make their terms: a pass over memory and a launch less each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from entrenar_gpu.graph import Node, Tensor
from entrenar_gpu.ops.gemm.matmul import matmul_sizes, operands
from entrenar_gpu.ops.registry import place

LONGEST_PAIR = 256  # inner length up to which a product may ride along in another


def fuse_sum(old: Tensor, new: Tensor, free: Callable[[Tensor], bool]) -> Tensor | None:
    """old + new as an epilogue, where either may be recorded anew to add the other; None where that cannot be done.

    A skinny product joins another as its low-rank pair; otherwise one becomes the residual of the other, which is a
    product or the gradient of a norm. `free(t)` tells that nobody else reads or holds t.
    """
    if old is new:
        return None

    def made_by(t: Tensor, *ops: str) -> Node | None:
        plain = t.node is not None and t.node.op in ops and not t.persistent and t.updates is None and free(t)
        return t.node if plain else None

    skinny, main = made_by(new, "matmul"), made_by(old, "matmul", "linear")
    if skinny is not None and main is not None:
        pair = _as_pair(skinny, main)
        if pair is not None:
            new.graph.nodes.remove(skinny)
            return _rebuilt(main, pair=skinny.inputs, attrs=pair)
    for made, addend in ((new, old), (old, new)):
        node = made_by(made, "matmul", "linear", "norm_grad")
        if node is None or node.attrs["residual"]:
            continue
        if node.attrs.get("down", False):  # others read its second output: it stays where it is
            if _made_before(addend, node):
                node.inputs, node.attrs = (*node.inputs, addend), {**node.attrs, "residual": True}
                return made
            continue
        if node.op != "norm_grad":
            return _rebuilt(node, residual=addend)
        node.output.graph.nodes.remove(node)
        return _anew(node, (*node.inputs, addend), {**node.attrs, "residual": True})
    return None


def _made_before(tensor: Tensor, node: Node) -> bool:
    for other in reversed(node.output.graph.nodes):
        if other is node or other is tensor.node:
            return other is node
    return True


def _as_pair(skinny: Node, main: Node) -> dict[str, Any] | None:
    """The attributes that make the product `skinny` the low-rank pair of `main`; None where it cannot be."""
    s, m = skinny.attrs, main.attrs
    if skinny.op != "matmul" or s["pair"] or s["bias"] or s["residual"] or m["pair"]:
        return None
    if matmul_sizes(skinny)[2] > LONGEST_PAIR or any(t.dtype != "f32" for t in skinny.inputs):
        return None
    if s["transpose_a"] != m.get("transpose_a", False):
        return None
    return {"beta": s["alpha"], "pair_transposed": s["transpose_b"]}


def _rebuilt(
    node: Node,
    pair: Sequence[Tensor] | None = None,
    residual: Tensor | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Tensor:
    """The product recorded anew, with a pair or a residual it did not have."""
    node.output.graph.nodes.remove(node)
    o = operands(node)
    p, q = pair if pair is not None else (o.p, o.q)
    residual = o.residual if residual is None else residual
    changed = {**node.attrs, **(attrs or {}), "pair": p is not None, "residual": residual is not None}
    head = node.inputs[: node.attrs.get("head", 2)]
    inputs = (*head, *(t for t in (p, q, o.bias, residual) if t is not None))
    return _anew(node, inputs, changed)


def _anew(node: Node, inputs: tuple[Tensor, ...], attrs: Mapping[str, Any]) -> Tensor:
    return place(Node(node.op, inputs, attrs, scope=node.scope, layer=node.layer, phase=node.phase))[0]
