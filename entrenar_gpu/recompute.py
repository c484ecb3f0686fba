"""Trading arithmetic for memory: which forward tensors the backward pass computes again instead of keeping.

A graph rewrite after differentiation. Forward nodes whose outputs a level drops are cloned in front of the first
backward node that needs them (Chen et al., arXiv 1604.06174). Dequantised weights (`transient` ops) are always
computed again; the levels say what else is, layer by layer from the first, whose tensors would be kept longest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from entrenar_gpu.errors import UserError
from entrenar_gpu.graph import Caps, Graph, Node, Tensor
from entrenar_gpu.ops.registry import OPS
from entrenar_gpu.plan import Plan, make_plan


@dataclass(frozen=True)
class Recompute:
    """How many layers, counted from the first, compute `cheap` elementwise tensors or the `whole` layer again."""

    cheap_layers: int = 0
    whole_layers: int = 0

    def describe(self) -> str:
        parts = []
        if self.whole_layers:
            parts.append(f"whole layers: {self.whole_layers}")
        if self.cheap_layers > self.whole_layers:
            parts.append(f"elementwise tensors of layers: {self.cheap_layers - self.whole_layers}")
        return ", ".join(parts) or "nothing"


def rewrite(graph: Graph, level: Recompute) -> Graph:
    """A graph that computes the same and keeps less; `graph` itself is left as it is."""
    forward = [n for n in graph.nodes if n.phase == "forward"]
    made_by = {t.id: n for n in forward for t in n.outputs}
    # What one layer hands to the next is kept: it is where recomputation starts.
    handed_on = {t.id for n in forward for t in n.inputs if t.id in made_by and made_by[t.id].layer != n.layer}
    clones: dict[int, Tensor] = {}
    nodes: list[Node] = []

    def dropped(tensor: Tensor, node: Node) -> bool:
        op = OPS[node.op]
        if op.transient:
            return True
        if node.layer is None or tensor.id in handed_on or tensor.updates is not None:
            return False
        return node.layer < level.whole_layers or (op.cheap and node.layer < level.cheap_layers)

    def again(tensor: Tensor) -> Tensor:
        """`tensor`, or the clone of it that this backward pass reads."""
        node = made_by.get(tensor.id)
        if node is None or not dropped(tensor, node):
            return tensor
        # A dequantised weight is scratch: every reader gets its own, so that none waits in memory for the next.
        if tensor.id not in clones or OPS[node.op].transient:
            clone = Node(node.op, tuple(again(t) for t in node.inputs), node.attrs, scope=node.scope)
            clone.layer, clone.phase, clone.recomputed = node.layer, "backward", True
            clone.outputs = tuple(
                Tensor(t.graph, f"{t.name}.again", t.shape, t.dtype, "temp", clone) for t in node.outputs
            )
            clones.update({t.id: c for t, c in zip(node.outputs, clone.outputs, strict=True)})
            nodes.append(clone)
        return clones[tensor.id]

    for node in graph.nodes:
        if node.phase == "forward":
            nodes.append(node)
            continue
        inputs = tuple(again(t) for t in node.inputs)
        if inputs != node.inputs:
            # The node and its outputs are shared with the original graph: only this copy reads the clones.
            copy = Node(node.op, inputs, node.attrs, node.outputs, scope=node.scope, layer=node.layer)
            copy.phase, copy.recomputed = node.phase, node.recomputed
            node = copy
        nodes.append(node)
    return replace(graph, nodes=nodes)


def fit(
    graphs: Mapping[str, Graph], layers: int, caps: Caps, budget_bytes: int, trace_level: str = "step"
) -> tuple[Recompute, Plan, Mapping[str, Graph]]:
    """The least recomputation whose plan stays within `budget_bytes`.

    In order of cost: nothing, elementwise tensors of ever more layers, then whole layers. Returns the level, the
    full plan and the rewritten graphs. Raises UserError when even recomputing every layer does not fit.
    """

    def planned(level: Recompute) -> tuple[int, dict[str, Graph]]:
        rewritten = {name: rewrite(g, level) for name, g in graphs.items()}
        return make_plan(rewritten, caps, launches=False, trace_level=trace_level).peak_bytes, rewritten

    def least(make: Callable[[int], Recompute]) -> Recompute | None:
        """The smallest number of layers that fits, by bisection; None when neither all nor all but one do.

        The last layer's tensors are needed at once: computing them again can cost more than it saves.
        """
        enough = [n for n in (layers - 1, layers) if planned(make(n))[0] <= budget_bytes]
        if not enough:
            return None
        low, high = 0, enough[0]
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if planned(make(middle))[0] <= budget_bytes else (middle + 1, high)
        return make(low)

    level = least(lambda n: Recompute(n, 0)) or least(lambda n: Recompute(layers, n))
    if level is None:
        raise MemoryBudgetError(min(planned(Recompute(layers, n))[0] for n in (layers - 1, layers)), budget_bytes)
    _, rewritten = planned(level)
    return level, make_plan(rewritten, caps, trace_level=trace_level), rewritten


class MemoryBudgetError(UserError):
    """The smallest plan does not fit: `needed` and `budget` in bytes."""

    def __init__(self, needed: int, budget: int) -> None:
        self.needed, self.budget = needed, budget
        super().__init__(f"needs {needed / 2**30:.2f} GiB, over the budget of {budget / 2**30:.2f} GiB")
