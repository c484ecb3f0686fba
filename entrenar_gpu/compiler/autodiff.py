"""Reverse-mode differentiation: extends a graph by the gradient of a scalar, through each op's own rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from entrenar_gpu import ops
from entrenar_gpu.compiler.fuse import fuse_sums
from entrenar_gpu.graph import Graph, Tensor, flat
from entrenar_gpu.ops.registry import OPS


class _Reverse:
    """The gradients summed so far during one reverse walk (a `GradientContext` for the rules)."""

    def __init__(self, wanted: set[int]) -> None:
        self._wanted = wanted
        self._sums: dict[int, Tensor] = {}

    def wanted(self, tensor: Tensor) -> bool:
        return tensor.id in self._wanted

    def get(self, tensor: Tensor) -> Tensor | None:
        return self._sums.get(tensor.id)

    def drop(self, tensor: Tensor) -> None:
        self._sums.pop(tensor.id, None)

    def take(self, tensor: Tensor) -> Tensor:
        old = self._sums.pop(tensor.id, None)
        if old is not None:
            return old
        held = _accumulator(tensor)
        return ops.zeros(tensor) if held is None else held

    def add(self, tensor: Tensor, gradient: Tensor) -> None:
        """Add one more contribution to the gradient of `tensor`."""
        if not self.wanted(tensor):
            return
        held = _accumulator(tensor)
        if held is not None and gradient.updates is held:  # the rule has added onto it already
            self._sums[tensor.id] = gradient
            return
        previous = self._sums.pop(tensor.id, held)
        total = gradient if previous is None else ops.add(previous, gradient)
        self._sums[tensor.id] = total if held is None else ops.in_place(total, held)


def _accumulator(tensor: Tensor) -> Tensor | None:
    """The gradient of `tensor` that lives on the device between runs and is added to, if it has one."""
    return tensor.grad if tensor.grad is not None and tensor.grad.role == "grad" else None


def backward(loss: Tensor, wrt: Iterable[Tensor], upstream: Tensor | None = None) -> dict[Tensor, Tensor]:
    """`differentiate`, then `fuse_sums` over what it recorded."""
    start = len(loss.graph.nodes)
    gradients = differentiate(loss, wrt, upstream)
    fuse_sums(loss.graph, gradients.values(), start)
    return gradients


def differentiate(loss: Tensor, wrt: Iterable[Tensor], upstream: Tensor | None = None) -> dict[Tensor, Tensor]:
    """Append the gradient of `loss` with respect to each tensor of `wrt`; returns them.

    Parameters with a persistent gradient (`Graph.parameter`) accumulate into it, in place. Others get a fresh
    tensor. `upstream` is d(objective)/d(loss), ones by default. Tensors that `loss` does not depend on are left out.
    """
    graph = loss.graph
    if not graph.differentiable:
        raise ValueError(f"{graph.name}: recorded without gradients")
    targets = list(wrt)
    wanted = _dependents(graph, targets)
    kept = {t.id for t in targets}
    reverse = _Reverse(wanted)
    # The forward nodes are fixed before the walk: the rules append to the same list.
    forward = list(graph.nodes)
    with graph.within(phase="backward"):
        reverse.add(loss, upstream if upstream is not None else ops.ones(loss))
        for node in reversed(forward):
            gradients: Sequence[Tensor | None] = [reverse.get(t) for t in node.outputs]
            if all(g is None for g in gradients) or not any(reverse.wanted(t) for t in node.inputs.values()):
                continue
            rule = OPS[node.op].gradient
            if rule is None:
                raise ValueError(f"op {node.op} has no gradient rule, but {node.label()} needs one")
            graph.scope, graph.layer = node.scope, node.layer
            for tensor in node.outputs:
                if tensor.id not in kept:
                    reverse.drop(tensor)
            parts = flat(rule(node, gradients, reverse))
            if not parts.keys() <= node.inputs.keys():
                raise ValueError(f"{node.label()}: gradients of {', '.join(parts)}, not all of which are inputs")
            for name, tensor in node.inputs.items():
                if (gradient := parts.get(name)) is not None:
                    reverse.add(tensor, gradient)
    return {t: g for t in targets if (g := reverse.get(t)) is not None}


def _dependents(graph: Graph, targets: list[Tensor]) -> set[int]:
    """Ids of the targets and of everything computed from them."""
    wanted = {t.id for t in targets}
    for node in graph.nodes:
        if any(t.id in wanted for t in node.inputs.values()):
            wanted.update(t.id for t in node.outputs if t.dtype in ("f32", "f16"))
    return wanted
