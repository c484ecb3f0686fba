"""Sums of gradients inside the ops that make their terms: a pass over memory and a launch less each.

A pass over a differentiated graph. The reverse walk (autodiff.py) records a plain `add` where a tensor gets gradients
from more than one reader, or adds onto one that persists. Where a term of such a sum is made for it alone, by an op
that can add as it writes, the op takes the sum in and stands in its place:

- a product of short inner length (an adapter's) becomes the low rank of another product;
- any other term becomes the residual of a product or of a norm's gradient.

The contract, for this pass and those written after it:

- `graph.nodes` is rewritten in place and stays in an order in which everything is made before it is read.
- A node that replaces an `add` makes the add's own output tensor: whoever holds that tensor need not know of the pass.
- What a replaced node made is gone. Tensors that somebody outside the graph will read are named in `keep`.
- Only additions are moved: values change by rounding alone.
- Nodes of the forward pass are left alone, and so are those before `start`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from entrenar_gpu.graph import Graph, Node, Tensor
from entrenar_gpu.ops.gemm.matmul import matmul_sizes

LONGEST_RANK = 256  # inner length up to which a product may ride along in another as its low rank


def fuse_sums(graph: Graph, keep: Iterable[Tensor] = (), start: int = 0) -> None:
    """Fuses the sums of the backward pass from the node at `start` on; tensors of `keep` are made as they are."""
    fusing = _Fusing(graph, {t.id for t in keep}, start)
    for node in graph.nodes:
        fusing.take(node)
    graph.nodes[:] = fusing.nodes


class _Fusing:
    """The nodes of the fused graph so far, in order, each with its place."""

    def __init__(self, graph: Graph, kept: set[int], start: int) -> None:
        self._kept, self._start = kept, start
        self._readers = Counter(t.id for node in graph.nodes for t in node.inputs.values())
        self.nodes: dict[Node, int] = {}
        self._places = 0  # given so far: those of replaced nodes are not given again

    def take(self, node: Node) -> None:
        """Appends a node, or what replaces it where it is a sum of gradients that can be fused."""
        a_sum = node.op == "add" and node.phase == "backward" and self._places >= self._start
        if not (a_sum and self._fused(node)):
            self._append(node)

    def _append(self, node: Node) -> None:
        self.nodes[node] = self._places
        self._places += 1

    def _fused(self, total: Node) -> bool:
        """Whether a term of the sum old + new has taken the other in."""
        old, new = total.inputs["a"], total.inputs["b"]
        if old.shape != new.shape:
            return False
        skinny, main = self._maker(new, "matmul"), self._maker(old, "matmul", "linear")
        if skinny is not None and main is not None and (attrs := _as_low_rank(skinny, main)) is not None:
            del self.nodes[skinny]
            self._replace(total, main, {"low_rank.0": skinny.inputs["a"], "low_rank.1": skinny.inputs["b"]}, attrs)
            return True
        for made, addend in ((new, old), (old, new)):
            node = self._maker(made, "matmul", "linear", "norm_grad")
            if node is None or "residual" in node.inputs:
                continue
            if "lora_a" not in node.inputs:
                self._replace(total, node, {"residual": addend}, {})
                return True
            if self._made_before(addend, node):  # others read its second output: it stays where it is
                node.inputs = {**node.inputs, "residual": addend}
                node.outputs = (total.output, *node.outputs[1:])
                total.output.node = node
                return True
        return False

    def _maker(self, term: Tensor, *ops: str) -> Node | None:
        """The node of the backward pass that makes a term for this sum alone, if it is one of these ops."""
        node = term.node
        if node is None or node.op not in ops or node.phase != "backward" or self.nodes[node] < self._start:
            return None
        shared = self._readers[term.id] > 1 or term.id in self._kept or term.updates is not None
        return None if shared else node

    def _replace(self, total: Node, node: Node, inputs: Mapping[str, Tensor], attrs: Mapping[str, Any]) -> None:
        """Puts `node` with these inputs and attributes besides its own in the place of the sum."""
        del self.nodes[node]
        inputs, attrs = {**node.inputs, **inputs}, {**node.attrs, **attrs}
        made = Node(node.op, inputs, attrs, total.outputs, scope=node.scope, layer=node.layer, phase=node.phase)
        total.output.node = made
        self._append(made)

    def _made_before(self, tensor: Tensor, node: Node) -> bool:
        return tensor.node is None or self.nodes[tensor.node] < self.nodes[node]


def _as_low_rank(skinny: Node, main: Node) -> dict[str, Any] | None:
    """The attributes that make the product `skinny` the low rank of `main`; None where it cannot be."""
    if set(skinny.inputs) != {"a", "b"} or "lora_a" in main.inputs or "low_rank.0" in main.inputs:
        return None
    if matmul_sizes(skinny)[2] > LONGEST_RANK or any(t.dtype != "f32" for t in skinny.inputs.values()):
        return None
    if skinny.attrs["transpose_a"] != main.attrs.get("transpose_a", False):
        return None
    return {"lora_scale": skinny.attrs["alpha"], "low_rank_transposed": skinny.attrs["transpose_b"]}
