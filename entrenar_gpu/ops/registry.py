"""The table of ops. A row holds everything the system knows of one op; a missing rule is an error, never a guess.

The gradient contract: `gradient(node, upstream, context)` gets one upstream gradient per output (None where nothing
depends on that output) and returns the gradients of inputs by name, of a group as a list; inputs without one are left
out or None. Every rule multiplies by the upstream gradient; a rule may never assume that it is one. Rules are recorded
as ordinary nodes, so they run, fuse and plan like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, flat

Spec = tuple[tuple[int, ...], str]  # shape, dtype
Gradients = Mapping[str, Tensor | Sequence[Tensor | None] | None]  # by the names of inputs


class GradientContext(Protocol):
    """What a gradient rule may ask of the reverse walk."""

    def take(self, tensor: Tensor) -> Tensor:
        """The gradient of `tensor` summed so far (zeros if none), for a rule that adds onto it in place."""
        ...

    def wanted(self, tensor: Tensor) -> bool:
        """Whether anybody needs the gradient of `tensor`."""
        ...


@dataclass(frozen=True)
class Placement:
    """What launches depend on besides their node: its scratch tensors, as `Op.workspace` asked for them, whether an
    output shares storage with an input (`aliased(output, input)`), and which scratch an earlier node has `filled`."""

    workspace: tuple[Tensor, ...]
    aliased: Callable[[Tensor, Tensor], bool]
    filled: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Op:
    """One op.

    infer(node) -> specs of the outputs.
    reference(node, **arrays) -> output arrays in any float dtype, from the inputs by name, groups as lists.
    launch(node, caps, placed) -> launches.
    gradient: see above; None for ops that are never differentiated.
    workspace(node, caps) -> specs of scratch tensors.   flops(node) -> arithmetic operations, for traces and submits.
    shared(node, caps) -> by index of a scratch tensor a key of all that it is made from: of nodes side by side whose
    keys are equal the first fills it, and the others find it filled.
    inplace(node) -> (output index, input name) pairs that may share storage, because each element of the input is read
    by the invocation that writes it, and before it does.
    transient: never kept for the backward pass, but computed again for every reader there.
    """

    name: str
    infer: Callable[[Node], Sequence[Spec]]
    reference: Callable[..., Sequence[np.ndarray]]
    launch: Callable[[Node, Caps, Placement], Sequence[Launch]]
    gradient: Callable[[Node, Sequence[Any], GradientContext], Gradients] | None = None
    workspace: Callable[[Node, Caps], Sequence[Spec]] = lambda node, caps: ()
    shared: Callable[[Node, Caps], Mapping[int, Hashable]] = lambda node, caps: {}
    flops: Callable[[Node], int] = lambda node: sum(t.size for t in node.outputs)
    inplace: Callable[[Node], Sequence[tuple[int, str]]] = lambda node: ()
    transient: bool = False


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    if op.name in OPS:
        raise ValueError(f"op {op.name} is registered twice")
    OPS[op.name] = op
    return op


def record(op: str, **named: Any) -> tuple[Tensor, ...]:
    """Append a node to the graph of its inputs and return its outputs.

    Tensors are its inputs, lists of tensors groups of inputs, and None one that is not there. Anything else is an
    attribute: a plain value that becomes a constant of its shader.
    """
    inputs = flat({name: v for name, v in named.items() if isinstance(v, (Tensor, list))})
    attrs = {name: v for name, v in named.items() if v is not None and not isinstance(v, (Tensor, list))}
    graph = next(t.graph for t in inputs.values())
    node = Node(op, inputs, attrs, scope=graph.scope, layer=graph.layer, phase=graph.phase)
    return place(node)


def place(node: Node) -> tuple[Tensor, ...]:
    """Give a node its outputs and append it."""
    graph = next(t.graph for t in node.inputs.values())
    requires_grad = OPS[node.op].gradient is not None and any(t.requires_grad for t in node.inputs.values())
    outputs = []
    for index, (shape, dtype) in enumerate(OPS[node.op].infer(node)):
        name = f"{node.label()}.{len(graph.nodes)}" + (f".{index}" if index else "")
        outputs.append(Tensor(graph, name, tuple(shape), dtype, "temp", node, requires_grad))
    node.outputs = tuple(outputs)
    graph.append(node)
    return node.outputs


def in_place(output: Tensor, target: Tensor) -> Tensor:
    """Declare that `output` overwrites the storage of the persistent tensor `target`, which its node reads."""
    output.updates = target.updates or target
    return output


def keep(output: Tensor, name: str) -> Tensor:
    """Leave `output` in a persistent tensor `name` of its graph, which the host can read after a run."""
    output.updates = output.graph.tensor(name, output.shape, output.dtype, "state")
    return output


def same_as(*names: str) -> Callable[[Node], Sequence[Spec]]:
    """The outputs have the shape and dtype of these inputs."""
    return lambda node: [(node.inputs[name].shape, node.inputs[name].dtype) for name in names]


def not_differentiable(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    return {}
