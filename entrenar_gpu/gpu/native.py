"""The calls into wgpu-native that wgpu-py does not wrap.

wgpu-py maps buffers through a thread that polls until the whole queue is idle, and wgpu blocks every submit while
somebody polls: the host could then never hand over a step while the device is at another. Here the host itself
waits, for one submission, when it wants its report.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import wgpu
from wgpu.backends.wgpu_native import _api
from wgpu.backends.wgpu_native._ffi import ffi, lib


class Command(NamedTuple):
    """A dispatch by the handles that wgpu-native takes; the objects they belong to must outlive it.

    `pipeline` is None where the command before has set it. With `queries`, the clock is written to entry `query` first.
    """

    pipeline: Any
    bind_group: Any
    grid: tuple[int, int, int]
    queries: Any = None
    query: int = 0


def record(compute: Any, commands: Iterable[Command]) -> None:
    """Record dispatches into a compute pass.

    Through the C functions alone: wgpu-py's methods make objects at every call and take three times as long. wgpu keeps
    the errors of a pass until its encoder finishes, and that call raises them.
    """
    into = compute._internal
    set_pipeline, set_bind_group = lib.wgpuComputePassEncoderSetPipeline, lib.wgpuComputePassEncoderSetBindGroup
    dispatch, nothing = lib.wgpuComputePassEncoderDispatchWorkgroups, ffi.NULL
    for pipeline, bind_group, (x, y, z), queries, query in commands:
        if queries is not None:
            lib.wgpuComputePassEncoderWriteTimestamp(into, queries, query)
        if pipeline is not None:
            set_pipeline(into, pipeline)
        set_bind_group(into, 0, bind_group, 0, nothing)
        dispatch(into, x, y, z)


def submit(device: Any, command_buffers: Sequence[Any]) -> int:
    """Queue command buffers; returns the submission's index, to wait for."""
    handles = ffi.new("WGPUCommandBuffer[]", [c._internal for c in command_buffers])
    return int(_api.libf.wgpuQueueSubmitForIndex(device.queue._internal, len(command_buffers), handles))


def read_after(device: Any, buffer: Any, submission: int) -> bytes:
    """The bytes of a MAP_READ buffer, once that submission is done; later ones may still run.

    Raises RuntimeError when the buffer cannot be mapped, as on a lost device.
    """
    _map_after(device, buffer, wgpu.MapMode.READ, submission)
    pointer = _api.libf.wgpuBufferGetConstMappedRange(buffer._internal, 0, buffer.size)
    try:
        return bytes(ffi.buffer(pointer, buffer.size))
    finally:
        unmap(buffer)


def map_after(device: Any, buffer: Any, submission: int) -> Any:
    """The memory of a MAP_WRITE buffer, to be filled, once that submission is done. `unmap` hands it to the device.

    Raises RuntimeError as `read_after` does.
    """
    _map_after(device, buffer, wgpu.MapMode.WRITE, submission)
    pointer = _api.libf.wgpuBufferGetMappedRange(buffer._internal, 0, buffer.size)
    return ffi.buffer(pointer, buffer.size)


def unmap(buffer: Any) -> None:
    _api.libf.wgpuBufferUnmap(buffer._internal)


def _map_after(device: Any, buffer: Any, mode: int, submission: int) -> None:
    """Map a whole buffer once a submission is done.

    Python runs signal handlers in whatever code it runs next, which after a wait is `mapped`; what a handler raises
    there, as an interrupt does, would end in cffi: it is raised here instead.
    """
    outcome: list[str] = []
    interrupts: list[BaseException] = []

    def raised(_kind: type, error: BaseException, _traceback: Any) -> None:
        interrupts.append(error)

    @ffi.callback(  # type: ignore[untyped-decorator]
        "void(WGPUMapAsyncStatus, WGPUStringView, void *, void *)", onerror=raised
    )
    def mapped(status: int, message: Any, _first: Any, _second: Any) -> None:
        text = "" if status == lib.WGPUMapAsyncStatus_Success else _text(message) or f"status {status}"
        outcome.append(text)

    information = ffi.new("WGPUBufferMapCallbackInfo *")
    information.mode = lib.WGPUCallbackMode_AllowProcessEvents
    information.callback = mapped
    _api.libf.wgpuBufferMapAsync(buffer._internal, int(mode), 0, buffer.size, information[0])
    index = ffi.new("WGPUSubmissionIndex *", submission)
    while not outcome and not interrupts:
        _api.libf.wgpuDevicePoll(device._internal, True, index)
    if interrupts:
        with contextlib.suppress(wgpu.GPUError):  # it may not be mapped
            unmap(buffer)
        raise interrupts[0]
    if outcome[0]:
        raise RuntimeError(f"a buffer could not be mapped: {outcome[0]}")


def shader_module(device: Any, label: str, code: str, trusted: bool) -> Any:
    """A shader module from WGSL. A `trusted` one is compiled without bounds checks and loop counters.

    Raises wgpu.GPUError when the code is not valid, trusted or not.
    """
    if not trusted:
        return device.create_shader_module(label=label, code=code)
    source = _api.new_struct_p("WGPUShaderSourceWGSL *", code=_api.to_c_string_view(code))
    source[0].chain.next = ffi.NULL
    source[0].chain.sType = lib.WGPUSType_ShaderSourceWGSL
    descriptor = _api.new_struct_p(
        "WGPUShaderModuleDescriptor *",
        nextInChain=ffi.cast("WGPUChainedStruct *", source),
        label=_api.to_c_string_view(label),
    )
    checks = 0  # WGPUShaderRuntimeChecks_None
    module = _api.libf.wgpuDeviceCreateShaderModuleTrusted(device._internal, descriptor, checks)
    return _api.GPUShaderModule(label, module, device)


def _text(view: Any) -> str:
    return ffi.unpack(view.data, view.length).decode(errors="replace") if view.data != ffi.NULL else ""
