"""The traced program as data: tensors, nodes, graphs; and what an op turns into: launches for a device's abilities.

Model code is ordinary Python over `Tensor`s. Calling an op (ops/) records a node; nothing is computed. `autodiff`
extends the same graph, `plan` maps it onto buffers, and `replay` (GPU) or `interpret` (NumPy) runs it. Shapes are
static, and a graph runs in the order it was recorded.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

# Bytes an element takes in a storage buffer. Kernels read bf16, half (IEEE binary16 as stored, which needs no f16
# feature) and u8 packed in u32, and widen them exactly; f16 is WGSL's own type, for devices that have it.
ELEMENT_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "half": 2, "u32": 4, "i32": 4, "u8": 1}
WGSL_TYPES = {"f32": "f32", "f16": "f16", "bf16": "u32", "half": "u32", "u32": "u32", "i32": "i32", "u8": "u32"}

# input: written by the host before a run        weight: frozen, written once at loading
# param, grad, state: kept on the device between runs and updated there        temp: lives inside one run
# page: the flat buffer that a run of params, or of their grads, are slices of
Role = Literal["input", "weight", "param", "grad", "state", "page", "temp"]

_tensor_ids = itertools.count()


class Tensor:
    """A symbolic array. `shape` is in elements, row-major; `dtype` a key of ELEMENT_BYTES.

    `updates` names the persistent tensor whose storage this node output overwrites: gradients accumulate and
    optimizers step in place that way, while the graph itself stays in single-assignment form.
    """

    __slots__ = ("dtype", "grad", "graph", "id", "name", "node", "requires_grad", "role", "shape", "updates", "value")

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
        self.value: np.ndarray | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in a storage buffer, which is a whole number of 4-byte words."""
        return -(-self.size * ELEMENT_BYTES[self.dtype] // 4) * 4

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

    # Arithmetic is sugar for ops/; imported late because ops build on this module.
    def __add__(self, other: Tensor) -> Tensor:
        from entrenar_gpu import ops

        return ops.add(self, other)

    def __sub__(self, other: Tensor) -> Tensor:
        from entrenar_gpu import ops

        return ops.sub(self, other)

    def __mul__(self, other: Tensor | float) -> Tensor:
        from entrenar_gpu import ops

        return ops.mul(self, other) if isinstance(other, Tensor) else ops.scale(self, other)

    def __matmul__(self, other: Tensor) -> Tensor:
        from entrenar_gpu import ops

        return ops.matmul(self, other)

    def sum(self) -> Tensor:
        from entrenar_gpu import ops

        return ops.sum(self)

    def mean(self) -> Tensor:
        from entrenar_gpu import ops

        return ops.mean(self)

    def backward(self) -> None:
        """Set `.grad` of every tensor with `requires_grad` that this scalar depends on (eager use)."""
        from entrenar_gpu import eager

        eager.backward(self)

    def numpy(self) -> np.ndarray:
        """Plan and run what this tensor needs, and read it (eager use)."""
        from entrenar_gpu import eager

        return eager.evaluate(self)


@dataclass(eq=False)
class Node:
    """One recorded op. `layer` groups nodes for recomputation, `scope` names them in traces ("layers.0.mlp")."""

    op: str
    inputs: tuple[Tensor, ...]
    attrs: Mapping[str, Any]
    outputs: tuple[Tensor, ...] = ()
    workspace: tuple[Tensor, ...] = ()  # scratch that lives only while this node runs
    scope: str = ""
    layer: int | None = None
    phase: str = "forward"
    recomputed: bool = False

    @property
    def output(self) -> Tensor:
        return self.outputs[0]

    def label(self) -> str:
        return f"{self.scope}/{self.op}" if self.scope else self.op


@dataclass
class Graph:
    """A recorded program: nodes in execution order and the persistent tensors they use.

    `report` names the persistent tensor that every run brings to the host. `traced` graphs are timed where the plan
    says so; `repeats` is how often such a graph runs between two reports.
    """

    name: str = "graph"
    nodes: list[Node] = field(default_factory=list)
    persistents: dict[str, Tensor] = field(default_factory=dict)
    report: str | None = None
    traced: bool = False
    repeats: int = 1
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
        made = Tensor(self, name, shape, dtype, role, requires_grad=requires_grad)
        self.persistents[name] = made
        return made

    def parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A trainable f32 tensor with a persistent gradient that `backward` accumulates into."""
        parameter = self.tensor(name, shape, role="param", requires_grad=True)
        parameter.grad = self.tensor(f"{name}.grad", shape, role="grad")
        return parameter

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


@dataclass(frozen=True)
class Caps:
    """What a device can do, as far as launches and plans depend on it. The defaults are WebGPU's guaranteed limits."""

    name: str = "webgpu"
    max_binding_bytes: int = 128 << 20
    max_buffer_bytes: int = 256 << 20
    max_workgroup_bytes: int = 16 << 10
    max_invocations: int = 256
    max_workgroups: int = 65535
    max_storage_buffers: int = 8
    f16: bool = False
    subgroups: bool = False
    timestamps: bool = False
    timestamps_inside_passes: bool = False
    cooperative_matrix: int = 0  # edge of the matrices that subgroups multiply, f16 in and f32 out; 0 without them
    software: bool = False
    memory_bytes: int | None = None  # what the adapter has, where the system tells
    free_bytes: int | None = None  # what nobody else uses of a card's own memory, where the system tells
    flops_per_second: float = 1e11  # assumed pace of matrix products: cuts runs into submits, tells large cards
    # Measured blockings of matrix products (tiles.py).
    tiles: Mapping[str, tuple[int, ...]] | None = field(default=None, hash=False)

    @property
    def large(self) -> bool:
        """Whether this is a large card, told by its assumed pace."""
        return self.flops_per_second >= 1e12

    def limited(self) -> Caps:
        """The same device asked for nothing but WebGPU's guaranteed limits and no optional feature."""
        return replace(Caps(), software=self.software, memory_bytes=self.memory_bytes, name=f"{self.name} (defaults)")


@dataclass(frozen=True)
class Binding:
    """A tensor bound to a kernel by name. `vector` > 1 declares array<vecN<...>>.

    `offset` in bytes, a multiple of OFFSET_ALIGNMENT, leaves out the beginning: launches over parts of a tensor can
    then share one kernel, where an offset among its constants would make each a kernel of its own.
    """

    name: str
    tensor: Tensor
    write: bool = False
    vector: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Launch:
    """One dispatch: a shader template, the constants it is specialised with, its bindings and its workgroup grid.

    A `trusted` shader runs without the checks of indices and loops that WebGPU adds: for shaders whose every index
    follows from their constants, never from data. `enables` names the WGSL extensions a shader needs besides f16.
    """

    shader: str
    bindings: tuple[Binding, ...]
    constants: Mapping[str, Any]
    grid: tuple[int, int, int]
    trusted: bool = False
    enables: tuple[str, ...] = ()


# What every adapter accepts (WebGPU's default minStorageBufferOffsetAlignment).
OFFSET_ALIGNMENT = 256


def reads(name: str, tensor: Tensor, vector: int = 1, offset: int = 0) -> Binding:
    return Binding(name, tensor, False, vector, offset)


def writes(name: str, tensor: Tensor, vector: int = 1, offset: int = 0) -> Binding:
    return Binding(name, tensor, True, vector, offset)


def split_offset(elements: int, tensor: Tensor) -> tuple[int, int]:
    """(bytes for a binding's offset, elements left for a kernel's constants) of a start within a tensor."""
    nbytes = elements * ELEMENT_BYTES[tensor.dtype]
    return (nbytes, 0) if nbytes % OFFSET_ALIGNMENT == 0 else (0, elements)


def grid_of(workgroups: int, caps: Caps) -> tuple[int, int, int]:
    """A grid of at least `workgroups`, folded into two dimensions where one would pass the device's limit.

    Kernels undo the fold with `linear_workgroup` of _grid.wgsl and ignore the surplus.
    """
    if workgroups <= caps.max_workgroups:
        return (max(workgroups, 1), 1, 1)
    rows = -(-workgroups // caps.max_workgroups)
    return (-(-workgroups // rows), rows, 1)
