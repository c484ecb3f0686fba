"""Trading arithmetic and precision for memory: what becomes of forward tensors that the backward pass reads.

A graph rewrite after differentiation. By node, its outputs are kept as they are, kept as binary16 (ops/half.py), or
dropped and computed again by clones in front of the first backward node that needs them (Chen et al., arXiv
1604.06174). Dequantised weights (`transient` ops) are always computed again. What fits a budget is memory.py's choice.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from entrenar_gpu.graph import Graph, Node, Tensor
from entrenar_gpu.ops.half import half_specs
from entrenar_gpu.ops.registry import OPS, Spec

Fate = Literal["keep", "fp16", "recompute"]


@dataclass(frozen=True)
class Recompute:
    """The fate of forward nodes; those not named are kept. `share` is the predicted part of a step that it costs.

    "fp16" is for a node's first output: statistics beside it stay f32.
    """

    fates: Mapping[Node, Fate] = field(default_factory=dict)
    share: float = 0.0

    def counts(self, fate: Fate) -> dict[str, int]:
        """How many nodes of each name, less their layer's number, meet this fate."""
        return dict(Counter(re.sub(r"^layers[.]\d+[.]?", "", n.label()) for n, f in self.fates.items() if f == fate))

    def describe(self) -> str:
        fp16, again = (sum(self.counts(fate).values()) for fate in ("fp16", "recompute"))
        if not fp16 and not again:
            return "nothing"
        kept = f", {fp16} kept as fp16" if fp16 else ""
        return f"{again} tensors{kept} ({self.share:.1%} of a step, predicted)"


def handed_on(graph: Graph) -> set[int]:
    """Ids of forward tensors that another layer reads: they are kept, as recomputation starts from them."""
    forward = [n for n in graph.nodes if n.phase == "forward"]
    made_by = {t.id: n for n in forward for t in n.outputs}
    return {t.id for n in forward for t in n.inputs.values() if t.id in made_by and made_by[t.id].layer != n.layer}


def rewrite(graph: Graph, choice: Recompute) -> Graph:
    """A graph that computes the same and keeps less; `graph` itself is left as it is."""
    forward = [n for n in graph.nodes if n.phase == "forward"]
    rewriting = _Rewriting(forward, choice)
    backward: list[Node] = []
    for node in graph.nodes:
        if node.phase == "forward":
            continue
        inputs = {name: rewriting.read(t, backward) for name, t in node.inputs.items()}
        if inputs != node.inputs:
            # The node and its outputs are shared with the original graph: only this copy reads the clones.
            copy = Node(node.op, inputs, node.attrs, node.outputs, scope=node.scope, layer=node.layer)
            copy.phase, copy.recomputed = node.phase, node.recomputed
            node = copy
        backward.append(node)
    return replace(graph, nodes=[*rewriting.with_halves(forward), *backward])


class _Rewriting:
    """The clones and half-precision copies made so far while a graph is rewritten."""

    def __init__(self, forward: list[Node], choice: Recompute) -> None:
        self._made_by = {t.id: n for n in forward for t in n.outputs}
        self._fates = choice.fates
        self._clones: dict[int, Tensor] = {}
        self._halves: dict[int, Node] = {}  # by the id of the tensor they halve

    def read(self, tensor: Tensor, nodes: list[Node]) -> Tensor:
        """`tensor`, or what the backward pass reads in its place; the nodes that make that are appended."""
        node = self._made_by.get(tensor.id)
        if node is None:
            return tensor
        if OPS[node.op].transient:  # scratch: every reader gets its own, so that none waits in memory for the next
            return self._again(node, nodes)[0]
        fate = self._fates.get(node, "keep")
        if fate == "keep" or (fate == "fp16" and tensor is not node.output):
            return tensor
        if tensor.id not in self._clones:
            made = self._again(node, nodes) if fate == "recompute" else (self._widened(node, nodes),)
            self._clones.update({t.id: c for t, c in zip(node.outputs, made, strict=False)})
        return self._clones[tensor.id]

    def _again(self, node: Node, nodes: list[Node]) -> tuple[Tensor, ...]:
        inputs = {name: self.read(t, nodes) for name, t in node.inputs.items()}
        specs = [(t.shape, t.dtype) for t in node.outputs]
        clone = _made(node, node.op, inputs, node.attrs, specs, "recompute")
        nodes.append(clone)
        return clone.outputs

    def _widened(self, node: Node, nodes: list[Node]) -> Tensor:
        half = _made(node, "to_half", {"x": node.output}, {}, half_specs(node.output), "fp16")
        half.phase, half.recomputed = "forward", False
        self._halves[node.output.id] = half
        codes = dict(zip(("codes", "scales"), half.outputs, strict=True))
        wide = _made(node, "from_half", codes, {}, [(node.output.shape, "f32")], "wide")
        nodes.append(wide)
        return wide.output

    def with_halves(self, forward: list[Node]) -> list[Node]:
        """The forward nodes, each followed by the copy of its output that is kept.

        Right behind it: a later place would stop the tensor's last reader from working in place.
        """
        found = ((n, self._halves.get(n.outputs[0].id)) for n in forward)
        return [n for pair in found for n in pair if n is not None]


def _made(
    like: Node, op: str, inputs: Mapping[str, Tensor], attrs: Mapping[str, Any], specs: Sequence[Spec], suffix: str
) -> Node:
    """A node for the backward pass in the place of `like`."""
    node = Node(op, inputs, attrs, scope=like.scope, layer=like.layer, phase="backward", recomputed=True)
    names = [f"{like.output.name}.{suffix}" + (f".{i}" if i else "") for i in range(len(specs))]
    node.outputs = tuple(
        Tensor(like.output.graph, name, tuple(shape), dtype, "temp", node)
        for name, (shape, dtype) in zip(names, specs, strict=True)
    )
    return node
