"""The GPU executor: a plan's buffers, pipelines and bind groups made once, then replayed every step.

A replay allocates nothing, compiles nothing and reads nothing back but what `run(..., report=...)` asks for; that
comes through a ring of staging buffers, so that the host can collect it while the device is at the next step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import wgpu

from entrenar_gpu.device import Device
from entrenar_gpu.graph import Tensor
from entrenar_gpu.interpret import NUMPY_TYPES
from entrenar_gpu.kernel import KernelCache
from entrenar_gpu.ops.registry import OPS
from entrenar_gpu.plan import Plan, Step

SUBMIT_SECONDS = 0.25  # display drivers reset a GPU that is busy for seconds
RING = 3


@dataclass(frozen=True)
class Dispatch:
    pipeline: Any
    bind_group: Any
    grid: tuple[int, int, int]


class Report:
    """A small tensor on its way to the host."""

    def __init__(self, device: Device, staging: Any, tensor: Tensor) -> None:
        self._device, self._staging, self._tensor = device, staging, tensor
        self._promise = staging.map_async(wgpu.MapMode.READ)

    def result(self) -> np.ndarray:
        """The values, waiting for the run that produced them (and no later one) to finish."""
        try:
            self._promise.sync_wait()
            raw = bytes(self._staging.read_mapped(0, self._tensor.nbytes))
        except RuntimeError as error:
            raise self._device.lost(error) from error
        self._staging.unmap()
        return np.frombuffer(raw, NUMPY_TYPES[self._tensor.dtype]).reshape(self._tensor.shape).copy()


class Replay:
    """Runs the graphs of a plan on a device. Persistent tensors are written and read by name."""

    def __init__(self, device: Device, plan: Plan, kernels: KernelCache | None = None) -> None:
        self.device, self.plan = device, plan
        self.kernels = kernels if kernels is not None else KernelCache(device)  # an empty cache is falsy
        self.tensors = plan.persistents
        self._buffers = {name: device.buffer(size, name) for name, size in plan.buffers.items()}
        self._batches = {name: self._cut(steps) for name, steps in plan.steps.items()}
        self._rings: dict[str, list[Any]] = {}
        self._turn: dict[str, int] = {}

    def close(self) -> None:
        """Release every buffer."""
        for buffer in [*self._buffers.values(), *(b for ring in self._rings.values() for b in ring)]:
            self.device.release(buffer)
        self._buffers, self._rings = {}, {}

    def buffer_of(self, name: str) -> tuple[Any, int, int]:
        """(buffer, offset, bytes) of a persistent tensor."""
        place = self.plan.slices[self.tensors[name].id]
        return self._buffers[place.buffer], place.offset, place.nbytes

    def write(self, name: str, array: np.ndarray) -> None:
        tensor = self.tensors[name]
        data = np.ascontiguousarray(array, NUMPY_TYPES[tensor.dtype])
        if data.size != tensor.size:
            raise ValueError(f"{name}: got {data.shape} for {tensor!r}")
        buffer, offset, _ = self.buffer_of(name)
        self.device.write(buffer, data, offset)

    def write_part(self, name: str, first: int, values: np.ndarray) -> None:
        """Write consecutive elements of a persistent tensor, from the `first` on, in its own dtype."""
        buffer, offset, _ = self.buffer_of(name)
        self.device.write(buffer, values, offset + first * values.dtype.itemsize)

    def copy_from(self, other: Replay, source: str, target: str, offset: int) -> None:
        """Copy all of a persistent tensor of `other`, on the same device, to `offset` bytes into one of this."""
        buffer, start, nbytes = other.buffer_of(source)
        into, into_start, _ = self.buffer_of(target)
        encoder = self.device.handle.create_command_encoder()
        encoder.copy_buffer_to_buffer(buffer, start, into, into_start + offset, nbytes)
        self.device.handle.queue.submit([encoder.finish()])

    def read(self, name: str) -> np.ndarray:
        return self.read_temporary(self.tensors[name])

    def read_temporary(self, tensor: Tensor) -> np.ndarray:
        """Any tensor whose storage no later node of its plan has reused."""
        place = self.plan.slices[tensor.id]
        item = NUMPY_TYPES[tensor.dtype]
        raw = self.device.read(self._buffers[place.buffer], place.offset, place.nbytes)
        return raw[: tensor.size * item.itemsize].view(item).reshape(tensor.shape)

    def run(self, name: str, report: str | None = None) -> Report | None:
        """Submit a graph; with `report`, also bring that persistent tensor to the host, without waiting."""
        batches = self._batches[name]
        staging = None
        try:
            for index, batch in enumerate(batches):
                encoder = self.device.handle.create_command_encoder()
                compute = encoder.begin_compute_pass()
                for dispatch in batch:
                    compute.set_pipeline(dispatch.pipeline)
                    compute.set_bind_group(0, dispatch.bind_group)
                    compute.dispatch_workgroups(*dispatch.grid)
                compute.end()
                if report is not None and index == len(batches) - 1:
                    staging = self._staging(report)
                    buffer, offset, nbytes = self.buffer_of(report)
                    encoder.copy_buffer_to_buffer(buffer, offset, staging, 0, nbytes)
                self.device.handle.queue.submit([encoder.finish()])
        except RuntimeError as error:
            raise self.device.lost(error) from error
        return Report(self.device, staging, self.tensors[report]) if report is not None else None

    def wait(self) -> None:
        """Wait until the device is idle. wgpu-py 0.32 cannot wait for the queue itself, so this reads a word back."""
        self.device.read(next(iter(self._buffers.values())), 0, 4)

    def _staging(self, report: str) -> Any:
        if report not in self._rings:
            usage = wgpu.BufferUsage.MAP_READ | wgpu.BufferUsage.COPY_DST
            nbytes = self.tensors[report].nbytes
            self._rings[report] = [self.device.buffer(nbytes, f"{report}.staging", usage) for _ in range(RING)]
        turn = self._turn[report] = (self._turn.get(report, -1) + 1) % RING
        return self._rings[report][turn]

    def _cut(self, steps: list[Step]) -> list[list[Dispatch]]:
        """The dispatches of a graph, in submits that keep the device busy for about SUBMIT_SECONDS each."""
        batches: list[list[Dispatch]] = [[]]
        budget = self.device.caps.flops_per_second * SUBMIT_SECONDS
        spent = 0.0
        for step in steps:
            flops = OPS[step.node.op].flops(step.node)
            for launch in step.launches:
                if batches[-1] and spent + flops / len(step.launches) > budget:
                    batches.append([])
                    spent = 0.0
                spent += flops / len(step.launches)
                pipeline, layout = self.kernels.pipeline(launch)
                entries = []
                for index, binding in enumerate(launch.bindings):
                    place = self.plan.slices[binding.tensor.id]
                    resource = {"buffer": self._buffers[place.buffer], "offset": place.offset, "size": place.nbytes}
                    entries.append({"binding": index, "resource": resource})
                group = self.device.handle.create_bind_group(layout=layout, entries=entries)
                batches[-1].append(Dispatch(pipeline, group, launch.grid))
        return batches
