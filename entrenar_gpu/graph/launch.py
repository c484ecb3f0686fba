"""What a node turns into: dispatches of shaders, with what they bind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar_gpu.dtypes import ELEMENT_BYTES
from entrenar_gpu.graph.caps import Caps
from entrenar_gpu.graph.tensor import Tensor
from entrenar_gpu.integers import ceil_div


@dataclass(frozen=True)
class Binding:
    """A tensor bound to a kernel by name. `vector` > 1 declares array<vecN<...>>, `words` u32 whatever its dtype.

    `offset` in bytes, a multiple of OFFSET_ALIGNMENT, leaves out the beginning: launches over parts of a tensor can
    then share one kernel, where an offset among its constants would make each a kernel of its own.
    """

    name: str
    tensor: Tensor
    write: bool = False
    vector: int = 1
    offset: int = 0
    words: bool = False


@dataclass(frozen=True)
class Launch:
    """One dispatch: a shader template, the constants it is specialised with, its bindings and its workgroup grid.

    A `trusted` shader runs without the checks of indices and loops that WebGPU adds: for shaders whose every index
    follows from their constants, never from data. With `counted`, (a u32 tensor, a row of three of it), the device
    reads there how much of the grid it launches. `source` is the template itself, where it is none of shaders/.
    """

    shader: str
    bindings: tuple[Binding, ...]
    constants: Mapping[str, Any]
    grid: tuple[int, int, int]
    trusted: bool = False
    source: str = ""
    counted: tuple[Tensor, int] | None = None


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

    Kernels undo the fold with `linear_workgroup` of lib/grid.wgsl and ignore the surplus.
    """
    if workgroups <= caps.max_workgroups:
        return (max(workgroups, 1), 1, 1)
    rows = ceil_div(workgroups, caps.max_workgroups)
    return (ceil_div(workgroups, rows), rows, 1)


def literal(value: float) -> str:
    """A WGSL f32 literal that reads back as float32(value)."""
    return f"f32({float(np.float32(value))!r})"
