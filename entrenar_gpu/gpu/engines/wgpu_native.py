"""wgpu-native through wgpu-py: the engine that is always there.

wgpu-py maps buffers through a thread that polls until the whole queue is idle, and wgpu blocks every submit while
somebody polls: the host could then never hand over a step while the device is at another. Here the host itself
waits, for one submission, when it wants its report.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import wgpu
from wgpu.backends.wgpu_native import _api
from wgpu.backends.wgpu_native._ffi import ffi, lib
from wgpu.backends.wgpu_native.extras import set_instance_extras, write_timestamp

from entrenar_gpu.gpu.engines.base import Engine


class WgpuNative(Engine):
    """wgpu-py's own library. Modules are trusted one by one; any thread may record, finish and queue."""

    name = "wgpu"
    features: Mapping[str, str] = {
        "f16": "shader-f16",
        "subgroups": "subgroup",
        "timestamps": "timestamp-query",
        "timestamps_inside_passes": "timestamp-query-inside-passes",
    }
    refused = frozenset({"cooperative-matrix", "experimental-cooperative-matrix"})  # there is no switch for them yet
    concurrent = True
    unchecked = False

    def __init__(self) -> None:
        super().__init__(wgpu, ffi, lib)
        self.version = wgpu.__version__

    def adapters(self) -> list[Any]:
        """OpenGL is left out of the instance: it lists each card a second time, with fewer limits."""
        set_instance_extras(backends=("Primary",), flags=("Default", "AutomaticTimestampNormalization"))
        return list(wgpu.gpu.enumerate_adapters_sync())

    def request(self, adapter: Any, features: Sequence[str], limits: Mapping[str, int]) -> Any:
        return adapter.request_device_sync(required_features=list(features), required_limits=dict(limits))

    def write_timestamp(self, compute: Any, queries: Any, query: int) -> None:
        write_timestamp(compute, queries, query)

    def submit(self, device: Any, command_buffers: Sequence[Any]) -> int:
        handles = ffi.new("WGPUCommandBuffer[]", [c._internal for c in command_buffers])
        return int(_api.libf.wgpuQueueSubmitForIndex(device.queue._internal, len(command_buffers), handles))

    def read_after(self, device: Any, buffer: Any, submission: int) -> bytes:
        _map_after(device, buffer, wgpu.MapMode.READ, submission)
        pointer = _api.libf.wgpuBufferGetConstMappedRange(buffer._internal, 0, buffer.size)
        try:
            return bytes(ffi.buffer(pointer, buffer.size))
        finally:
            self.unmap(buffer)

    def map_after(self, device: Any, buffer: Any, submission: int) -> Any:
        _map_after(device, buffer, wgpu.MapMode.WRITE, submission)
        pointer = _api.libf.wgpuBufferGetMappedRange(buffer._internal, 0, buffer.size)
        return ffi.buffer(pointer, buffer.size)

    def unmap(self, buffer: Any) -> None:
        _unmap(buffer)

    def shader_module(self, device: Any, label: str, code: str, trusted: bool) -> Any:
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


def _unmap(buffer: Any) -> None:
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
            _unmap(buffer)
        raise interrupts[0]
    if outcome[0]:
        raise RuntimeError(f"a buffer could not be mapped: {outcome[0]}")


def _text(view: Any) -> str:
    return ffi.unpack(view.data, view.length).decode(errors="replace") if view.data != ffi.NULL else ""
