"""Which GPU a run is on, and through which engine."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

from entrenar_gpu.errors import UserError
from entrenar_gpu.gpu.engines import ENGINES, Engine, engine
from entrenar_gpu.gpu.memory_info import DRIVER_ADDRESSES, addresses_left, free_bytes, memory_bytes
from entrenar_gpu.gpu.vulkan_memory import heap_of
from entrenar_gpu.graph import Caps, MatrixConfig

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


@dataclass(frozen=True)
class Gpu:
    """An adapter of an engine."""

    engine: Engine
    adapter: Any

    @property
    def info(self) -> Any:
        return self.adapter.info

    def offers(self, feature: str) -> bool:
        """Whether the adapter has a feature, by the trainer's name for it."""
        return self.engine.features.get(feature) in self.adapter.features

    @property
    def matrices(self) -> tuple[MatrixConfig, ...]:
        """What its matrix units multiply, as far as a product could use it."""
        return tuple(c for c in self.engine.matrix_configs(self.adapter) if is_useful(c))


@dataclass(frozen=True)
class Choice:
    """A GPU, and in words why it is used through its engine."""

    gpu: Gpu
    why: str


def is_useful(config: MatrixConfig) -> bool:
    """Whether sums of these matrices are exact enough to train with: f16 sums are not."""
    return (config.component, config.result) in (("f16", "f32"), ("i8", "i32"), ("f32", "f32"))


@functools.cache
def gpus(name: str) -> tuple[Gpu, ...]:
    """Every GPU of an engine, best first: discrete, integrated, virtual, software.

    Raises UserError where the engine is not installed.
    """
    # Mesa's device-select layer asks for a display that servers lack, and says so four times a process.
    os.environ.setdefault("NODEVICE_SELECT", "1")
    found = [Gpu(engine(name), adapter) for adapter in engine(name).adapters()]
    return tuple(sorted(found, key=lambda gpu: _RANKS.get(gpu.info["adapter_type"], 3)))


def choose_gpu(choice: str | None = None, engine: str | None = None) -> Choice:
    """The GPU of `choice` (index or part of a name), else of ENTRENAR_DEVICE, else the best one; through `engine`, else
    that of ENTRENAR_ENGINE, else "auto": Dawn where it is installed and grants matrix units or where wgpu finds no GPU.

    Raises UserError with what to install when there is none, with the list when `choice` names none of them, and where
    `ulimit -v` leaves no room for a driver.
    """
    addresses = addresses_left()
    if addresses is not None and addresses < DRIVER_ADDRESSES:
        raise UserError(
            f"`ulimit -v` leaves this process {addresses >> 20} MiB, and a GPU's driver may take"
            f" {DRIVER_ADDRESSES >> 20}: raise the limit, or --device numpy"
        )
    source = "--engine" if engine is not None else "ENTRENAR_ENGINE"
    engine = engine if engine is not None else os.environ.get("ENTRENAR_ENGINE") or "auto"
    if engine == "auto":
        return _automatic(choice)
    if engine not in ENGINES:
        raise UserError(f"{source} {engine!r}: choose from auto, {', '.join(ENGINES)}")
    try:
        found = gpus(engine)
    except UserError as error:
        raise UserError(f"{source} {engine}: {error}") from None
    return Choice(_picked(found, choice), f"{source} {engine}")


def is_host(choice: str | None) -> bool:
    """Whether `choice`, else ENTRENAR_DEVICE, asks for NumPy in place of a GPU."""
    return (choice if choice is not None else os.environ.get("ENTRENAR_DEVICE")) == "numpy"


def _automatic(choice: str | None) -> Choice:
    ours = gpus("wgpu")
    try:
        theirs = gpus("dawn")
    except UserError as error:
        return Choice(_picked(ours, choice), str(error))
    if not ours and theirs:
        return Choice(_picked(theirs, choice), "wgpu finds no GPU")
    gpu = _picked(ours, choice)
    twin = _twin(gpu, ours, theirs)
    if twin is None:
        return Choice(gpu, "Dawn does not offer this GPU")
    if not twin.matrices:
        return Choice(gpu, "Dawn grants no matrix units here")
    return Choice(twin, "it grants matrix units")


def _twin(gpu: Gpu, ours: tuple[Gpu, ...], theirs: tuple[Gpu, ...]) -> Gpu | None:
    """The same GPU in the other engine's list. Dawn lists the first of equal cards alone."""

    def identity(other: Gpu) -> tuple[Any, ...]:
        return tuple(other.info[key] for key in ("vendor_id", "device_id", "backend_type"))

    if next(g for g in ours if identity(g) == identity(gpu)) is not gpu:
        return None
    return next((g for g in theirs if identity(g) == identity(gpu)), None)


def _picked(found: tuple[Gpu, ...], choice: str | None) -> Gpu:
    source = "--device" if choice is not None else "ENTRENAR_DEVICE"
    choice = choice if choice is not None else os.environ.get("ENTRENAR_DEVICE") or None
    if not found:
        raise UserError(NO_GPU)
    if choice is None:
        return found[0]
    if choice.isdecimal():  # an index, never digits of a name or a driver's version
        matches = [gpu for index, gpu in enumerate(found) if index == int(choice)]
    else:
        matches = [gpu for gpu in found if choice.lower() in gpu.info["device"].lower()]
    if not matches:
        names = "; ".join(f"{i}: {gpu.info['device']}" for i, gpu in enumerate(found))
        raise UserError(f"{source} {choice!r} matches no GPU of {names}")
    return matches[0]


def gpu_caps(gpu: Gpu) -> Caps:
    """What the trainer would use of a GPU, before a device is made."""
    limits, info = gpu.adapter.limits, gpu.info
    total, free = _memory_of(gpu)
    return Caps(
        name=info["device"],
        max_binding_bytes=limits["max-storage-buffer-binding-size"] // 4 * 4,
        max_buffer_bytes=limits["max-buffer-size"] // 4 * 4,
        max_workgroup_bytes=limits["max-compute-workgroup-storage-size"],
        max_invocations=min(limits["max-compute-invocations-per-workgroup"], limits["max-compute-workgroup-size-x"]),
        max_workgroups=limits["max-compute-workgroups-per-dimension"],
        max_storage_buffers=limits["max-storage-buffers-per-shader-stage"],
        f16=gpu.offers("f16"),
        subgroups=gpu.offers("subgroups"),
        timestamps=gpu.offers("timestamps"),
        timestamps_inside_passes=gpu.offers("timestamps_inside_passes"),
        matrices=gpu.matrices,
        software=info["adapter_type"] == "CPU",
        memory_bytes=total,
        free_bytes=free,
        flops_per_second=_PACES.get(info["adapter_type"], 1e11),
    )


def _memory_of(gpu: Gpu) -> tuple[int | None, int | None]:
    """(bytes of memory, free bytes of a card's own), as the system tells, else the engine, else the Vulkan driver."""
    kind = gpu.info["adapter_type"]
    total, free = memory_bytes(gpu.info), free_bytes(gpu.info)
    total = gpu.engine.heap_bytes(gpu.adapter) if total is None else total
    if kind != "CPU" and (total is None or (free is None and kind == "DiscreteGPU")):
        heap = heap_of(gpu.info["vendor_id"], gpu.info["device_id"])
        if heap is not None:
            total = total or heap.nbytes
            free = heap.free if free is None and kind == "DiscreteGPU" else free
    return total, free
