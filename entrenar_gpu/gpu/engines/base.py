"""What the trainer needs of a WebGPU library: the door that every engine stands behind.

Both libraries share wgpu-py's Python API, and most of what the trainer does goes through the objects of that: buffers,
bind groups, encoders. Here is what they do differently, and what must be quick or exact in a way that API is not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from entrenar_gpu.graph import MatrixConfig


class Command(NamedTuple):
    """A dispatch by the handles that the C functions take; the objects they belong to must outlive it.

    `pipeline` is None where the command before has set it. The grid is three numbers, or a buffer and the offset in
    bytes at which the device finds them. With `queries`, the clock is written to entry `query` first.
    """

    pipeline: Any
    bind_group: Any
    grid: tuple[int, int, int] | tuple[Any, int]
    queries: Any = None
    query: int = 0


class Engine(ABC):
    """One WebGPU library. Adapters, devices and buffers are the library's own objects."""

    name: str  # as --engine has it
    version: str
    # Names of features by what the trainer calls them: f16, subgroups, timestamps, timestamps_inside_passes, matrices.
    features: Mapping[str, str]
    refused: frozenset[str] = frozenset()  # features that adapters list and no device gets
    # Whether one thread may finish and queue a part of a step while another records the next.
    concurrent: bool
    # Whether a whole device goes without checks of indices; else modules say so one by one, by `trusted`.
    unchecked: bool
    # What the library wrote to standard error while it looked for adapters: why it leaves some out.
    said = ""

    def __init__(self, api: Any, ffi: Any, lib: Any) -> None:
        self.api = api  # the module with wgpu-py's API: flags, enumerations, classes of errors
        self._ffi, self._lib = ffi, lib

    @abstractmethod
    def adapters(self) -> list[Any]:
        """Every adapter of Vulkan, Metal and DX12."""

    @abstractmethod
    def request(self, adapter: Any, features: Sequence[str], limits: Mapping[str, int]) -> Any:
        """A device with these features, by the library's names, and limits. Raises RuntimeError where it is refused."""

    @abstractmethod
    def shader_module(self, device: Any, label: str, code: str, trusted: bool) -> Any:
        """A shader module from WGSL. A `trusted` one is compiled without bounds checks and loop counters.

        Raises the library's GPUError when the code is not valid, trusted or not.
        """

    @abstractmethod
    def write_timestamp(self, compute: Any, queries: Any, query: int) -> None:
        """Write the clock to an entry of a query set, within a compute pass."""

    @abstractmethod
    def submit(self, device: Any, command_buffers: Sequence[Any]) -> int:
        """Queue command buffers; returns the submission's index, to wait for."""

    @abstractmethod
    def read_after(self, device: Any, buffer: Any, submission: int) -> bytes:
        """The bytes of a MAP_READ buffer, once that submission is done; later ones may still run.

        Raises RuntimeError when the buffer cannot be mapped, as on a lost device.
        """

    @abstractmethod
    def map_after(self, device: Any, buffer: Any, submission: int) -> Any:
        """The memory of a MAP_WRITE buffer, to be filled, once that submission is done. `unmap` hands it to the device.

        Raises RuntimeError as `read_after` does.
        """

    @abstractmethod
    def unmap(self, buffer: Any) -> None: ...

    def record(self, compute: Any, commands: Iterable[Command]) -> None:
        """Record dispatches into a compute pass.

        Through the C functions alone: the methods make objects at every call and take three times as long. Errors of a
        pass are kept until its encoder finishes, and that call raises them.
        """
        lib, nothing, into = self._lib, self._ffi.NULL, compute._internal
        set_pipeline, set_bind_group = lib.wgpuComputePassEncoderSetPipeline, lib.wgpuComputePassEncoderSetBindGroup
        dispatch = lib.wgpuComputePassEncoderDispatchWorkgroups
        dispatch_indirect = lib.wgpuComputePassEncoderDispatchWorkgroupsIndirect
        for pipeline, bind_group, grid, queries, query in commands:
            if queries is not None:
                lib.wgpuComputePassEncoderWriteTimestamp(into, queries, query)
            if pipeline is not None:
                set_pipeline(into, pipeline)
            set_bind_group(into, 0, bind_group, 0, nothing)
            (dispatch if len(grid) == 3 else dispatch_indirect)(into, *grid)

    def matrix_configs(self, adapter: Any) -> tuple[MatrixConfig, ...]:
        """What the adapter's matrix units multiply, where the engine reaches them."""
        return ()

    def heap_bytes(self, adapter: Any) -> int | None:
        """Bytes of the adapter's largest heap of its own, where the engine tells."""
        return None

    def complete(self, code: str) -> str:
        """A shader's WGSL with the lines before it that this engine's compiler wants besides."""
        return code
