"""The traced program as data: tensors, nodes, graphs; and what an op turns into: launches for a device's abilities.

Model code is ordinary Python over `Tensor`s. Calling an op (ops/) records a node; nothing is computed. `autodiff`
extends the same graph, `plan` maps it onto buffers, and `replay` (GPU) or `interpret` (NumPy) runs it. Shapes are
static, and a graph runs in the order it was recorded.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from entrenar_gpu.dtypes import ELEMENT_BYTES
from entrenar_gpu.integers import round_up

# input: written by the host before a run        weight: frozen, written once at loading
# param, grad, state: kept on the device between runs and updated there        temp: lives inside one run
# page: the flat buffer that a run of params, or of their grads, are slices of; moment: what an optimizer keeps of one
Role = Literal["input", "weight", "param", "grad", "state", "page", "moment", "temp"]

# What `Tensor`'s operators and methods call, by name: filled by ops/ and, for eager use, by eager.py.
OPERATORS: dict[str, Callable[..., Any]] = {}

_tensor_ids = itertools.count()


class Tensor:
    """A symbolic array. `shape` is in elements, row-major; `dtype` a key of ELEMENT_BYTES.

    `updates` names the persistent tensor whose storage this node output overwrites: gradients accumulate and
    optimizers step in place that way, while the graph itself stays in single-assignment form. Parameters of a `group`
    share pages with each other alone, since they are not updated as the others are.
    """

    __slots__ = (
        *("dtype", "grad", "graph", "group", "id", "name", "node", "requires_grad", "role", "shape", "updates"),
        "value",
    )

    def __init__(
        self,
        graph: Graph,
        name: str,
        shape: tuple[int, ...],
        dtype: str = "f32",
        role: Role = "temp",
        node: Node | None = None,
        requires_grad: bool = False,
    ) -> None:
        self.graph, self.name, self.shape, self.dtype, self.role, self.node = graph, name, shape, dtype, role, node
        self.id = next(_tensor_ids)
        self.requires_grad = requires_grad
        self.grad: Tensor | None = None
        self.updates: Tensor | None = None
        self.group = ""
        self.value: np.ndarray | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in a storage buffer, which is a whole number of 4-byte words."""
        return round_up(self.size * ELEMENT_BYTES[self.dtype], 4)

    @property
    def rows(self) -> int:
        """Product of all dimensions but the last: most kernels see [rows, columns]."""
        return self.size // self.columns if self.size else 0

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def persistent(self) -> bool:
        return self.role != "temp"

    def __repr__(self) -> str:
        return f"{self.name}:{self.dtype}{list(self.shape)}"

    # Sugar for functions that stand further down the map (ops/operators.py, eager.py): they register in OPERATORS.
    __array_ufunc__ = None  # NumPy leaves `array + tensor` to __radd__

    def __add__(self, other: Tensor | float) -> Tensor:
        return OPERATORS["add"](self, other)

    def __radd__(self, other: float) -> Tensor:
        return OPERATORS["add"](other, self)

    def __sub__(self, other: Tensor | float) -> Tensor:
        return OPERATORS["sub"](self, other)

    def __rsub__(self, other: float) -> Tensor:
        return OPERATORS["sub"](other, self)

    def __mul__(self, other: Tensor | float) -> Tensor:
        return OPERATORS["mul"](self, other)

    def __rmul__(self, other: float) -> Tensor:
        return OPERATORS["mul"](other, self)

    def __truediv__(self, other: Tensor | float) -> Tensor:
        return OPERATORS["div"](self, other)

    def __rtruediv__(self, other: float) -> Tensor:
        return OPERATORS["div"](other, self)

    def __neg__(self) -> Tensor:
        return OPERATORS["neg"](self)

    def __matmul__(self, other: Tensor) -> Tensor:
        return OPERATORS["matmul"](self, other)

    def __rmatmul__(self, other: object) -> Tensor:
        return OPERATORS["matmul"](other, self)

    def __getitem__(self, key: Any) -> Tensor:
        """Integers, slices, `...` and None, as in NumPy; a single element has shape [1]."""
        return OPERATORS["index"](self, key)

    @property
    def T(self) -> Tensor:  # NumPy's name
        """The axes in reverse order."""
        return OPERATORS["transpose"](self)

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """Sum over all elements, shape [1], or over some axes."""
        return OPERATORS["sum"](self, axis, keepdims)

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """Mean of all elements, shape [1], or over some axes."""
        return OPERATORS["mean"](self, axis, keepdims)

    def backward(self) -> None:
        """Add to `.grad` of every leaf with `requires_grad` that this one element depends on (eager use)."""
        OPERATORS["backward"](self)

    def numpy(self) -> np.ndarray:
        """The values, computed now if they were not before (eager use)."""
        return OPERATORS["numpy"](self)

    def __float__(self) -> float:
        """The value of a tensor of one element (eager use)."""
        if self.size != 1:
            raise TypeError(f"float({self!r}): it has {self.size} elements")
        return float(self.numpy().reshape(()))


def flat(named: Mapping[str, Any]) -> dict[str, Any]:
    """By name, with the members of a sequence as "name.0", "name.1" and so on; None leaves a name out."""
    found: dict[str, Any] = {}
    for name, value in named.items():
        if isinstance(value, (list, tuple)):
            found.update((f"{name}.{index}", member) for index, member in enumerate(value))
        elif value is not None:
            found[name] = value
    return found


def grouped(named: Mapping[str, Any]) -> dict[str, Any]:
    """What `flat` was given, sequences as lists."""
    found: dict[str, Any] = {}
    for name, value in named.items():
        group, dot, _ = name.partition(".")
        if dot:
            found.setdefault(group, []).append(value)
        else:
            found[name] = value
    return found


@dataclass(eq=False)
class Node:
    """One recorded op. `layer` groups nodes for recomputation, `scope` names them in traces ("layers.0.mlp").

    `inputs` are by name, in the order in which they were recorded; one that an op can do without is not there. Several
    tensors that are one operand (the shards of a table, the parts of an NF4 weight) are a group: "shards.0" and so on.
    """

    op: str
    inputs: Mapping[str, Tensor]
    attrs: Mapping[str, Any]
    outputs: tuple[Tensor, ...] = ()
    scope: str = ""
    layer: int | None = None
    phase: str = "forward"
    recomputed: bool = False

    @property
    def output(self) -> Tensor:
        return self.outputs[0]

    def group(self, name: str) -> tuple[Tensor, ...]:
        """The inputs "name.0", "name.1" and so on; empty where there are none."""
        return tuple(t for key, t in self.inputs.items() if key.startswith(f"{name}."))

    def label(self) -> str:
        return f"{self.scope}/{self.op}" if self.scope else self.op


@dataclass
class Graph:
    """A recorded program: nodes in execution order and the persistent tensors they use.

    `report` names the persistent tensor that every run brings to the host. `traced` graphs are timed where the plan
    says so; `repeats` is how often such a graph runs between two reports. In one that is not `differentiable`, no
    tensor requires a gradient, parameters included: ops leave nothing behind for a backward pass.
    """

    name: str = "graph"
    nodes: list[Node] = field(default_factory=list)
    persistents: dict[str, Tensor] = field(default_factory=dict)
    report: str | None = None
    traced: bool = False
    repeats: int = 1
    differentiable: bool = True
    scope: str = ""
    layer: int | None = None
    phase: str = "forward"

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: str = "f32", role: Role = "input", requires_grad: bool = False
    ) -> Tensor:
        """A persistent tensor, by name; the same name gives the same tensor, and must agree in shape and dtype."""
        known = self.persistents.get(name)
        if known is not None:
            if (known.shape, known.dtype, known.role) != (shape, dtype, role):
                raise ValueError(f"{name}: declared as {known!r} ({known.role}) and as {dtype}{list(shape)} ({role})")
            return known
        made = Tensor(self, name, shape, dtype, role, requires_grad=requires_grad and self.differentiable)
        self.persistents[name] = made
        return made

    def parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A trainable f32 tensor and, in a differentiable graph, a persistent gradient that `backward` adds to."""
        parameter = self.tensor(name, shape, role="param", requires_grad=True)
        if self.differentiable:
            parameter.grad = self.tensor(f"{name}.grad", shape, role="grad")
        return parameter

    def number(self, value: float) -> Tensor | None:
        """A number as a tensor of one element, where a program takes numbers as inputs; None: it takes constants."""
        return None

    def append(self, node: Node) -> None:
        self.nodes.append(node)

    @contextlib.contextmanager
    def within(self, scope: str | None = None, layer: int | None = None, phase: str | None = None) -> Iterator[None]:
        """Name and group the nodes recorded inside the block."""
        saved = (self.scope, self.layer, self.phase)
        if scope is not None:
            self.scope = f"{self.scope}.{scope}" if self.scope else scope
        self.layer = self.layer if layer is None else layer
        self.phase = phase or self.phase
        try:
            yield
        finally:
            self.scope, self.layer, self.phase = saved
