"""Dawn, the engine of Chrome, through PyPI's wgpudawn: wgpu-py's API, and the matrix units of the card.

Dawn switches checks of indices and clearing of workgroup memory for a whole device. They are off here: shaders write
what they read of workgroup memory, and those whose indices are data keep them in bounds themselves.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any

from entrenar_gpu.errors import UserError
from entrenar_gpu.gpu.engines.base import Engine
from entrenar_gpu.graph import MatrixConfig
from entrenar_gpu.stderr import held_stderr

PACKAGE, OLDEST, TOO_NEW = "wgpudawn", (0, 32, 0, 4), (0, 33)
INSTALL = "pip install 'entrenar-gpu[dawn]'"

MATRICES = "chromium-experimental-subgroup-matrix"
SIZE_CONTROL = "subgroup-size-control"
APPLE_SUBGROUP = 32  # of every GPU of Apple's that multiplies matrices, where Metal's configurations tell none
# Matrices are an unsafe API to Dawn, and f16 on NVIDIA's Vulkan driver waits behind a toggle of its own.
_INSTANCE_TOGGLES = ("allow_unsafe_apis", "vulkan_enable_f16_on_nvidia")
_DEVICE_TOGGLES = ("disable_robustness", "disable_workgroup_init")
_DEVICE_TOGGLES_OFF = ("timestamp_quantization",)


def installed_version() -> str:
    """The version of the installed wheel. Raises UserError where there is none, or none that this code knows."""
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{PACKAGE} is not installed; {INSTALL}") from None
    numbers = tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))
    if not OLDEST <= numbers < TOO_NEW:
        raise UserError(
            f"{PACKAGE} {version} is installed, this release works with >={_dotted(OLDEST)},"
            f"<{_dotted(TOO_NEW)}; {INSTALL}"
        )
    return version


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


class Dawn(Engine):
    """wgpudawn's library. Its objects are for one thread at a time. Raises UserError where the wheel is not there."""

    name = "dawn"
    features: Mapping[str, str] = {
        "f16": "shader-f16",
        "subgroups": "subgroups",
        "timestamps": "timestamp-query",
        "timestamps_inside_passes": "chromium-experimental-timestamp-query-inside-passes",
        "matrices": MATRICES,
        "subgroup_size_control": SIZE_CONTROL,
    }
    concurrent = False
    unchecked = True

    def __init__(self) -> None:
        self.version = installed_version()
        try:
            import wgpudawn
            from wgpudawn.backends.dawn import _api, extras
        except (ImportError, OSError) as error:
            raise UserError(f"{PACKAGE} {self.version} cannot be loaded: {error}; {INSTALL}") from None
        super().__init__(wgpudawn, _api.ffi, _api.lib)
        self._libf, self._extras = _api.libf, extras
        self._submissions = 0

    def adapters(self) -> list[Any]:
        self._extras.set_instance_extras(backends=("Primary",), enable_toggles=_INSTANCE_TOGGLES)
        with held_stderr() as said:
            found = self._enumerated()
        self.said = b"".join(said).decode(errors="replace")
        return found

    def _enumerated(self) -> list[Any]:
        return list(self.api.gpu.enumerate_adapters_sync())

    def request(self, adapter: Any, features: Sequence[str], limits: Mapping[str, int]) -> Any:
        return self._extras.request_device_sync(
            self._unused(adapter),
            required_features=list(features),
            required_limits=dict(limits),
            enable_toggles=_DEVICE_TOGGLES,
            disable_toggles=_DEVICE_TOGGLES_OFF,
        )

    def _unused(self, adapter: Any) -> Any:
        """The same adapter, found again: Dawn makes one device of each."""
        info = dict(adapter.info)
        with held_stderr():
            return next(a for a in self._enumerated() if dict(a.info) == info)

    def shader_module(self, device: Any, label: str, code: str, trusted: bool) -> Any:
        return device.create_shader_module(label=label, code=code)

    def write_timestamp(self, compute: Any, queries: Any, query: int) -> None:
        self._extras.write_timestamp(compute, queries, query)

    def submit(self, device: Any, command_buffers: Sequence[Any]) -> int:
        device.queue.submit(command_buffers)
        self._submissions += 1
        return self._submissions

    def read_after(self, device: Any, buffer: Any, submission: int) -> bytes:
        """Dawn maps a buffer when the last submission that uses it is done, so it need not be told which."""
        buffer.map_async(self.api.MapMode.READ).sync_wait()
        try:
            return bytes(buffer.read_mapped(copy=False))
        finally:
            self.unmap(buffer)

    def map_after(self, device: Any, buffer: Any, submission: int) -> Any:
        buffer.map_async(self.api.MapMode.WRITE).sync_wait()
        pointer = self._libf.wgpuBufferGetMappedRange(buffer._internal, 0, buffer.size)
        return self._ffi.buffer(pointer, buffer.size)

    def unmap(self, buffer: Any) -> None:
        buffer.unmap()

    def matrix_configs(self, adapter: Any) -> tuple[MatrixConfig, ...]:
        if MATRICES not in adapter.features:
            return ()
        told = self._extras.get_adapter_properties(adapter).get("subgroup_matrix_configs", ())
        unsaid = APPLE_SUBGROUP if adapter.info["backend_type"] == "Metal" else 0
        return tuple(
            MatrixConfig(
                str(c["component_type"]),
                str(c["result_component_type"]),
                int(c["m"]),
                int(c["n"]),
                int(c["k"]),
                int(c["min_subgroup_size"]) or unsaid,
                int(c["max_subgroup_size"]) or unsaid,
            )
            for c in told
        )

    def heap_bytes(self, adapter: Any) -> int | None:
        heaps = self._extras.get_adapter_properties(adapter).get("memory_heaps", ())
        own = [int(heap["size"]) for heap in heaps if "device-local" in heap["properties"]]
        return max(own, default=None)

    def complete(self, code: str) -> str:
        """Directives of Chromium's matrices (lib/matrix.wgsl), and of subgroups, for which naga needs none."""
        lines = []
        if "subgroup_matrix_" in code:
            lines += ["enable f16;"] if re.search(r"\bf16\b", code) else []
            lines.append("enable chromium_experimental_subgroup_matrix;")
            # Offsets by subgroup are not uniform to the compiler, though every invocation of a subgroup has the same.
            lines.append("diagnostic(off, chromium.subgroup_matrix_uniformity);")
        if "@subgroup_size" in code:
            lines.append("enable subgroup_size_control;")
        if re.search(r"\bsubgroup[A-Z_]|@subgroup_size", code):
            lines.append("enable subgroups;")
        return "\n".join([*lines, code])
