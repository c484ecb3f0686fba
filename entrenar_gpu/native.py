"""The calls into wgpu-native that wgpu-py does not wrap.

wgpu-py maps buffers through a thread that polls until the whole queue is idle, and wgpu blocks every submit while
somebody polls: the host could then never hand over a step while the device is at another. Here the host itself
waits, for one submission, when it wants its report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import wgpu
from wgpu.backends.wgpu_native import _api
from wgpu.backends.wgpu_native._ffi import ffi, lib


def submit(device: Any, command_buffers: Sequence[Any]) -> int:
    """Queue command buffers; returns the submission's index, to wait for."""
    handles = ffi.new("WGPUCommandBuffer[]", [c._internal for c in command_buffers])
    return int(_api.libf.wgpuQueueSubmitForIndex(device.queue._internal, len(command_buffers), handles))


def read_after(device: Any, buffer: Any, submission: int) -> bytes:
    """The bytes of a MAP_READ buffer, once that submission is done; later ones may still run.

    Raises RuntimeError when the buffer cannot be mapped, as on a lost device.
    """
    outcome: list[str] = []

    @ffi.callback("void(WGPUMapAsyncStatus, WGPUStringView, void *, void *)")  # type: ignore[untyped-decorator]
    def mapped(status: int, message: Any, _first: Any, _second: Any) -> None:
        text = "" if status == lib.WGPUMapAsyncStatus_Success else _text(message) or f"status {status}"
        outcome.append(text)

    information = ffi.new("WGPUBufferMapCallbackInfo *")
    information.mode = lib.WGPUCallbackMode_AllowProcessEvents
    information.callback = mapped
    _api.libf.wgpuBufferMapAsync(buffer._internal, int(wgpu.MapMode.READ), 0, buffer.size, information[0])
    index = ffi.new("WGPUSubmissionIndex *", submission)
    while not outcome:
        _api.libf.wgpuDevicePoll(device._internal, True, index)
    if outcome[0]:
        raise RuntimeError(f"a report could not be read: {outcome[0]}")
    pointer = _api.libf.wgpuBufferGetConstMappedRange(buffer._internal, 0, buffer.size)
    try:
        return bytes(ffi.buffer(pointer, buffer.size))
    finally:
        _api.libf.wgpuBufferUnmap(buffer._internal)


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
