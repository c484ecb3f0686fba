"""Sums of gradients inside the ops that make their terms: a pass over memory and a launch less each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from entrenar_gpu.graph import Node, Tensor
from entrenar_gpu.ops.gemm.matmul import matmul_sizes
from entrenar_gpu.ops.registry import place

LONGEST_PAIR = 256  # inner length up to which a product may ride along in another


def fuse_sum(old: Tensor, new: Tensor, free: Callable[[Tensor], bool]) -> Tensor | None:
    """old + new as an epilogue, where either may be recorded anew to add the other; None where that cannot be done.

    A skinny product joins another as its low rank; otherwise one becomes the residual of the other, which is a
    product or the gradient of a norm. `free(t)` tells that nobody else reads or holds t.
    """
    if old is new:
        return None

    def made_by(t: Tensor, *ops: str) -> Node | None:
        plain = t.node is not None and t.node.op in ops and not t.persistent and t.updates is None and free(t)
        return t.node if plain else None

    skinny, main = made_by(new, "matmul"), made_by(old, "matmul", "linear")
    if skinny is not None and main is not None:
        attrs = _as_low_rank(skinny, main)
        if attrs is not None:
            new.graph.nodes.remove(skinny)
            return _anew(main, {"low_rank.0": skinny.inputs["a"], "low_rank.1": skinny.inputs["b"]}, attrs)
    for made, addend in ((new, old), (old, new)):
        node = made_by(made, "matmul", "linear", "norm_grad")
        if node is None or "residual" in node.inputs:
            continue
        if "lora_a" in node.inputs:  # others read its second output: it stays where it is
            if _made_before(addend, node):
                node.inputs = {**node.inputs, "residual": addend}
                return made
            continue
        return _anew(node, {"residual": addend}, {})
    return None


def _made_before(tensor: Tensor, node: Node) -> bool:
    for other in reversed(node.output.graph.nodes):
        if other is node or other is tensor.node:
            return other is node
    return True


def _as_low_rank(skinny: Node, main: Node) -> dict[str, Any] | None:
    """The attributes that make the product `skinny` the low rank of `main`; None where it cannot be."""
    if set(skinny.inputs) != {"a", "b"} or "lora_a" in main.inputs or "low_rank.0" in main.inputs:
        return None
    if matmul_sizes(skinny)[2] > LONGEST_PAIR or any(t.dtype != "f32" for t in skinny.inputs.values()):
        return None
    if skinny.attrs["transpose_a"] != main.attrs.get("transpose_a", False):
        return None
    return {"lora_scale": skinny.attrs["alpha"], "low_rank_transposed": skinny.attrs["transpose_b"]}


def _anew(node: Node, inputs: Mapping[str, Tensor], attrs: Mapping[str, Any]) -> Tensor:
    """The output of a node recorded anew, with these inputs and attributes besides its own."""
    node.output.graph.nodes.remove(node)
    changed = ({**node.inputs, **inputs}, {**node.attrs, **attrs})
    return place(Node(node.op, *changed, scope=node.scope, layer=node.layer, phase=node.phase))[0]
