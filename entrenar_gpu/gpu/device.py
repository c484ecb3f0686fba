"""Adapters and the device: which one, with which features and limits, and how its memory is known."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import wgpu
from wgpu.backends.wgpu_native.extras import set_instance_extras

from entrenar_gpu.errors import DeviceLost, UserError
from entrenar_gpu.gpu.memory_info import free_bytes, memory_bytes
from entrenar_gpu.graph import Caps

NO_GPU = (
    "no Vulkan, Metal or DX12 GPU found. Install your card's driver, or the software one:"
    " Debian/Ubuntu `apt-get install mesa-vulkan-drivers libvulkan1`, Fedora `dnf install mesa-vulkan-drivers`;"
    " macOS (Metal) and Windows (DX12) bring theirs: update the system or the card's driver."
    " `--device numpy` runs without one, slowly"
)

_RANKS = {"DiscreteGPU": 0, "IntegratedGPU": 1, "VirtualGPU": 2, "Unknown": 3, "CPU": 4}
# Assumed pace of matrix products by kind of adapter: it says where a run is cut into submits, and whether tiles.py
# takes the card for a large one. A factor of a few is harmless to both.
_PACES = {"DiscreteGPU": 2e12, "IntegratedGPU": 2e11, "VirtualGPU": 2e11, "Unknown": 1e11, "CPU": 5e9}

_LIMITS = (
    "max-storage-buffer-binding-size",
    "max-buffer-size",
    "max-compute-workgroup-storage-size",
    "max-compute-invocations-per-workgroup",
    "max-compute-workgroup-size-x",
    "max-compute-workgroups-per-dimension",
    "max-storage-buffers-per-shader-stage",
)
# Features the trainer uses where they are offered.
_FEATURES = ("shader-f16", "subgroup", "timestamp-query", "timestamp-query-inside-passes")
# Features that wgpu-native lists for an adapter and refuses to every device ("experimental features are not enabled").
REFUSED_FEATURES = frozenset({"cooperative-matrix", "experimental-cooperative-matrix"})


@functools.cache
def gpus() -> tuple[Any, ...]:
    """Every adapter of Vulkan, Metal and DX12, best first: discrete, integrated, virtual, software.

    OpenGL is left out of the instance: it lists each card a second time, with fewer limits.
    """
    # Mesa's device-select layer asks for a display that servers lack, and says so four times a process.
    os.environ.setdefault("NODEVICE_SELECT", "1")
    set_instance_extras(backends=("Primary",), flags=("Default", "AutomaticTimestampNormalization"))
    found = wgpu.gpu.enumerate_adapters_sync()
    return tuple(sorted(found, key=lambda a: _RANKS.get(a.info["adapter_type"], 3)))


def choose_gpu(choice: str | None = None) -> Any:
    """The adapter of `choice` (index or part of a name), else of ENTRENAR_DEVICE, else the best one.

    Raises UserError with what to install when there is none, and with the list when `choice` names none of them.
    """
    source = "--device" if choice is not None else "ENTRENAR_DEVICE"
    choice = choice if choice is not None else os.environ.get("ENTRENAR_DEVICE") or None
    found = gpus()
    if not found:
        raise UserError(NO_GPU)
    if choice is None:
        return found[0]
    matches = [a for a in found if choice.lower() in a.info["device"].lower()]
    if choice.isdecimal() and int(choice) < len(found):
        matches = [found[int(choice)]]
    if not matches:
        names = "; ".join(f"{i}: {a.info['device']}" for i, a in enumerate(found))
        raise UserError(f"{source} {choice!r} matches no GPU of {names}")
    return matches[0]


def gpu_caps(adapter: Any) -> Caps:
    """What the trainer would use of an adapter, before a device is made."""
    limits, features, info = adapter.limits, adapter.features, adapter.info
    return Caps(
        name=info["device"],
        max_binding_bytes=limits["max-storage-buffer-binding-size"] // 4 * 4,
        max_buffer_bytes=limits["max-buffer-size"] // 4 * 4,
        max_workgroup_bytes=limits["max-compute-workgroup-storage-size"],
        max_invocations=min(limits["max-compute-invocations-per-workgroup"], limits["max-compute-workgroup-size-x"]),
        max_workgroups=limits["max-compute-workgroups-per-dimension"],
        max_storage_buffers=limits["max-storage-buffers-per-shader-stage"],
        f16="shader-f16" in features,
        subgroups="subgroup" in features,
        timestamps="timestamp-query" in features,
        timestamps_inside_passes="timestamp-query-inside-passes" in features,
        software=info["adapter_type"] == "CPU",
        memory_bytes=memory_bytes(info),
        free_bytes=free_bytes(info),
        flops_per_second=_PACES.get(info["adapter_type"], 1e11),
    )


@dataclass(eq=False)
class Device:
    """A wgpu device with its `Caps`, and a count of the bytes in its live buffers."""

    handle: Any
    caps: Caps
    info: dict[str, Any]
    allocated_bytes: int = 0

    @classmethod
    def open(cls, choice: str | None = None, limited: bool = False) -> Device:
        """A device on the chosen adapter, with the features in use and the largest limits it offers.

        `limited` asks for WebGPU's guaranteed limits and no optional feature instead, as a test of portability.
        """
        adapter = choose_gpu(choice)
        caps = gpu_caps(adapter)
        info = dict(adapter.info)
        if limited:
            return cls(adapter.request_device_sync(required_limits={}), caps.limited(), info)
        features = [f for f in _FEATURES if f in adapter.features]
        limits = {name: adapter.limits[name] for name in _LIMITS}
        return cls(adapter.request_device_sync(required_features=features, required_limits=limits), caps, info)

    def buffer(self, nbytes: int, label: str, usage: int | None = None) -> Any:
        """A zeroed buffer. Raises UserError when the device has no memory left for it."""
        flags = wgpu.BufferUsage
        usage = flags.STORAGE | flags.COPY_SRC | flags.COPY_DST if usage is None else usage
        try:
            made = self.handle.create_buffer(label=label, size=nbytes, usage=usage)
        except wgpu.GPUOutOfMemoryError:
            raise UserError(
                f"{self.caps.name} has no {nbytes / 2**20:.0f} MiB left for {label}"
                f" (holding {self.allocated_bytes / 2**30:.2f} GiB); lower --memory-budget, --batch or --seq"
            ) from None
        self.allocated_bytes += nbytes
        return made

    def staging(self, nbytes: int) -> Any:
        """A buffer in host memory that the device copies from."""
        flags = wgpu.BufferUsage
        return self.buffer(nbytes, "staging", flags.MAP_WRITE | flags.COPY_SRC)

    def release(self, buffer: Any) -> None:
        self.allocated_bytes -= buffer.size
        buffer.destroy()

    def write(self, buffer: Any, data: np.ndarray, offset: int = 0) -> None:
        """Queue a copy of `data` into `buffer`, padded to whole words."""
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if raw.size % 4:
            raw = np.concatenate([raw, np.zeros(-raw.size % 4, np.uint8)])
        if raw.size:
            with self.watched():
                self.handle.queue.write_buffer(buffer, offset, raw)

    def read(self, buffer: Any, offset: int, nbytes: int) -> np.ndarray:
        """The bytes of a buffer, waiting for the device."""
        padded = -(-nbytes // 4) * 4
        with self.watched():
            return np.frombuffer(self.handle.queue.read_buffer(buffer, offset, padded), np.uint8)[:nbytes]

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Around work on the device: raises DeviceLost where wgpu says, in an error of any kind, that it is gone."""
        try:
            yield
        except (RuntimeError, wgpu.GPUError) as error:
            reason = next((line.strip() for line in str(error).splitlines() if "lost" in line.lower()), None)
            if reason is None:
                raise
            raise DeviceLost(f"device {self.caps.name} was lost ({reason}); the last checkpoint stands") from error
