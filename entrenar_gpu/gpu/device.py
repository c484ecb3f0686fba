"""The device: with which features and limits it is opened, its memory, and its errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar_gpu.errors import OutOfDeviceMemory, UserError
from entrenar_gpu.gpu.choice import Gpu, choose_gpu, gpu_caps
from entrenar_gpu.gpu.engines import Engine
from entrenar_gpu.gpu.failures import device_errors, listen, meaning
from entrenar_gpu.graph import Caps
from entrenar_gpu.integers import round_up

_LIMITS = (
    "max-storage-buffer-binding-size",
    "max-buffer-size",
    "max-compute-workgroup-storage-size",
    "max-compute-invocations-per-workgroup",
    "max-compute-workgroup-size-x",
    "max-compute-workgroups-per-dimension",
    "max-storage-buffers-per-shader-stage",
)
# What every adapter has of these.
_GUARANTEED = dict(
    zip(_LIMITS, (128 << 20, 256 << 20, 16 << 10, 256, 256, 65535, 8), strict=True),
)
# Features the trainer uses where they are offered.
_FEATURES = ("f16", "subgroups", "timestamps", "timestamps_inside_passes", "matrices", "subgroup_size_control")


@dataclass(eq=False)
class Device:
    """A device of an engine with its `Caps`, and a count of the bytes in its live buffers."""

    engine: Engine
    handle: Any
    caps: Caps
    info: dict[str, Any]
    allocated_bytes: int = 0

    @classmethod
    def open(cls, choice: str | None = None, limited: bool = False, engine: str | None = None) -> Device:
        """A device on the chosen GPU through the chosen engine (see `choose_gpu`), with the features in use and the
        largest limits it offers.

        `limited` asks for WebGPU's guaranteed limits and no optional feature instead, as a test of portability.
        """
        gpu = choose_gpu(choice, engine).gpu
        caps, info = gpu_caps(gpu), dict(gpu.info)
        if limited:
            return cls(gpu.engine, _request(gpu, (), _GUARANTEED), caps.limited(), info)
        features = [gpu.engine.features[name] for name in _FEATURES if gpu.offers(name)]
        limits = {name: gpu.adapter.limits[name] for name in _LIMITS}
        return cls(gpu.engine, _request(gpu, features, limits), caps, info)

    def buffer(self, nbytes: int, label: str, usage: int | None = None) -> Any:
        """A zeroed buffer. Raises OutOfDeviceMemory when the device has no memory left for it."""
        flags = self.engine.api.BufferUsage
        usage = flags.STORAGE | flags.COPY_SRC | flags.COPY_DST if usage is None else usage
        try:
            with self.watched():
                made = self.handle.create_buffer(label=label, size=nbytes, usage=usage)
        except OutOfDeviceMemory as error:
            raise OutOfDeviceMemory(
                f"{self.caps.name} has no {nbytes / 2**20:.0f} MiB left for {label}"
                f" (holding {self.allocated_bytes / 2**30:.2f} GiB)"
            ) from error
        self.allocated_bytes += nbytes
        return made

    def staging(self, nbytes: int) -> Any:
        """A buffer in host memory that the device copies from."""
        flags = self.engine.api.BufferUsage
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
        padded = round_up(nbytes, 4)
        with self.watched():
            return np.frombuffer(self.handle.queue.read_buffer(buffer, offset, padded), np.uint8)[:nbytes]

    def watched(self) -> AbstractContextManager[None]:
        """Around work on the device: raises DeviceLost or OutOfDeviceMemory for what an error of any kind says."""
        return device_errors(self.caps.name)


def _request(gpu: Gpu, features: Sequence[str], limits: Mapping[str, int]) -> Any:
    """A device. Raises UserError where the adapter gives none for lack of memory."""
    name = gpu.info["device"]
    listen(gpu.engine.api.__name__)
    try:
        return gpu.engine.request(gpu.adapter, features, limits)
    except Exception as error:
        told = meaning(error, name)
        if told is None:
            raise
        why = "its memory, or this process's (`ulimit -v`), has run out"
        raise UserError(f"{name} cannot be opened, {why}: {told}") from error
