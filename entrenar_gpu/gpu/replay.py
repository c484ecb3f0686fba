"""The GPU executor: a plan's buffers, pipelines and bind groups made once, then replayed every step.

A replay allocates nothing, compiles nothing and reads nothing back but the reports of its graphs; these come through a
ring of staging buffers, so that the host can collect them while the device is at the next step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import wgpu

from entrenar_gpu.compiler import RING, Plan, Step, queries_of
from entrenar_gpu.dtypes import ELEMENT_BYTES, NUMPY_TYPES
from entrenar_gpu.errors import UserError
from entrenar_gpu.gpu.device import Device
from entrenar_gpu.gpu.engines import Command
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.graph import Launch, Tensor
from entrenar_gpu.integers import round_up
from entrenar_gpu.ops.registry import OPS

SUBMIT_SECONDS = 0.25  # display drivers reset a GPU that is busy for seconds
FIRST_LAUNCHES = 64  # of a graph that are handed over apart, so that a GPU that waits is at work while the rest is
QUERY_SET = 4096  # timestamps a query set may hold


@dataclass(frozen=True)
class Dispatch:
    """One dispatch, its grid as in `Command`; `group` is the trace group it belongs to, -1 where nothing is timed."""

    pipeline: Any
    bind_group: Any
    grid: tuple[int, int, int] | tuple[Any, int]
    group: int


@dataclass
class Pass:
    """A compute pass as it is recorded every step: timed at its ends, or at some of its commands and its end."""

    commands: list[Command]
    timestamps: dict[str, Any] | None = None
    closing: tuple[Any, int] | None = None


@dataclass(frozen=True)
class Encoded:
    """A run as it was recorded: where its report will be, its number among those of its graph, and, of one that was
    prepared, its command buffers."""

    staging: Any = None
    run: int = 0
    buffers: tuple[Any, ...] = ()


class Report:
    """What a run left behind, on its way to the host: a small tensor, and the ticks of traced graphs."""

    done_ns: int | None = None  # only the device knows
    on_gpu = True

    def __init__(self, replay: Replay, name: str, encoded: Encoded, submission: int) -> None:
        self._replay, self._name, self._submission = replay, name, submission
        self._staging, self._run = encoded.staging, encoded.run
        self._ticks = memoryview(b"")

    def result(self) -> np.ndarray:
        """The tensor, waiting for the run that produced it and for no later one.

        Raises RuntimeError where RING later runs have reported: the report was written over.
        """
        if self._replay.runs[self._name] - self._run >= RING:
            raise RuntimeError(f"report of {self._name}: {RING} runs later it is gone; collect reports as they come")
        plan, device = self._replay.plan, self._replay.device
        tensor = plan.persistents[plan.reports[self._name]]
        with device.watched():
            raw = memoryview(device.engine.read_after(device.handle, self._staging, self._submission))
        self._ticks = raw[round_up(tensor.nbytes, 8) :]
        return np.frombuffer(raw[: tensor.nbytes], NUMPY_TYPES[tensor.dtype]).reshape(tensor.shape).copy()

    def ticks(self, graph: str, repeat: int) -> np.ndarray | None:
        """GPU nanoseconds [groups, 2] of one run of a traced graph; None where nothing was timed. After `result`."""
        plan = self._replay.plan
        start = plan.ticks.get((graph, repeat))
        if start is None:
            return None
        times = np.frombuffer(self._ticks, np.uint64, queries_of(plan, graph), start).astype(np.int64)
        return np.stack([times[:-1], times[1:]], axis=1) if plan.caps.timestamps_inside_passes else times.reshape(-1, 2)


class Replay:
    """Runs the graphs of a plan on a device. Persistent tensors are written and read by name."""

    def __init__(self, device: Device, plan: Plan, kernels: KernelCache | None = None) -> None:
        self.device, self.plan = device, plan
        self.kernels = KernelCache(device) if kernels is None else kernels
        self.tensors = plan.persistents
        # While one part of a step is finished and queued, outside Python's lock, the next is recorded.
        self._submitter = ThreadPoolExecutor(1) if device.engine.concurrent else None
        self._buffers: dict[str, Any] = {}
        self._prepared: dict[str, Encoded] = {}
        try:
            counts = _buffers_of_counts(plan)
            for name, size in plan.buffers.items():
                self._buffers[name] = device.buffer(size, name, _usage(name, name in counts))
        except UserError:
            self.close()  # a smaller plan may fit
            raise
        # Recorded by their handles: these hold the objects.
        self._batches = {name: self._cut(name, steps) for name, steps in plan.steps.items()}
        self.runs = dict.fromkeys(plan.reports, 0)  # of each graph that reports, so far
        self._queries = {name: self._query_sets(name) for name in plan.groups}
        self._passes = {name: self._make_passes(name, batches) for name, batches in self._batches.items()}
        self._clock_queries: Any = None

    def close(self) -> None:
        """Release every buffer."""
        if self._submitter is not None:
            self._submitter.shutdown()
        self._prepared.clear()
        for buffer in self._buffers.values():
            self.device.release(buffer)
        self._buffers = {}

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

    def copy_from(self, other: Replay, copies: Iterable[tuple[str, str, int]]) -> None:
        """Copy persistent tensors of `other`, on the same device: (its name, name here, offset in bytes here)."""
        with self.device.watched():
            encoder = self.device.handle.create_command_encoder()
            for source, target, offset in copies:
                buffer, start, nbytes = other.buffer_of(source)
                into, into_start, _ = self.buffer_of(target)
                encoder.copy_buffer_to_buffer(buffer, start, into, into_start + offset, nbytes)
            self.device.handle.queue.submit([encoder.finish()])

    def copy_rows(self, name: str, source: int, target: int, count: int) -> None:
        """Copy rows of a persistent tensor to others of it, which may not overlap: [.., W] as rows of W.

        Through a buffer beside it: WebGPU copies no buffer to itself.
        """
        tensor = self.tensors[name]
        size = tensor.columns * ELEMENT_BYTES[tensor.dtype]
        buffer, start, _ = self.buffer_of(name)
        between = self.device.buffer(count * size, "rows")
        with self.device.watched():
            encoder = self.device.handle.create_command_encoder()
            encoder.copy_buffer_to_buffer(buffer, start + source * size, between, 0, count * size)
            encoder.copy_buffer_to_buffer(between, 0, buffer, start + target * size, count * size)
            self.device.handle.queue.submit([encoder.finish()])
        self.device.release(between)

    def read(self, name: str) -> np.ndarray:
        return self.read_temporary(self.tensors[name])

    def read_temporary(self, tensor: Tensor) -> np.ndarray:
        """Any tensor whose storage no later node of its plan has reused."""
        place = self.plan.slices[tensor.id]
        item = NUMPY_TYPES[tensor.dtype]
        raw = self.device.read(self._buffers[place.buffer], place.offset, place.nbytes)
        return raw[: tensor.size * item.itemsize].view(item).reshape(tensor.shape)

    def run(self, name: str, repeat: int = 0) -> Report | None:
        """Submit a graph. Returns its report, if it makes one, without waiting for it.

        `repeat` counts the runs of a graph that runs several times between reports.
        """
        with self.device.watched():
            encoded = self._prepared.pop(name, None)
            if encoded is not None and repeat == 0:
                submission = [self.device.engine.submit(self.device.handle, [part]) for part in encoded.buffers][-1]
            else:
                jobs: list[Future[int]] = []
                encoded = self._encode(name, repeat, lambda encoder: jobs.append(self._hand_over(encoder)))
                submission = [job.result() for job in jobs][-1]
        return Report(self, name, encoded, submission) if encoded.staging is not None else None

    def prepare(self, name: str) -> None:
        """Record the next run of a graph now, while the device is busy, so that it need only be queued then."""
        if name not in self._prepared:
            with self.device.watched():
                buffers: list[Any] = []
                encoded = self._encode(name, 0, lambda encoder: buffers.append(encoder.finish()))
                self._prepared[name] = replace(encoded, buffers=tuple(buffers))

    def _encode(self, name: str, repeat: int, done: Callable[[Any], object]) -> Encoded:
        """Record a run into one encoder after the other, and say so of each when it is `done`."""
        submits, encoded = self._passes[name], Encoded()
        for index, passes in enumerate(submits):
            encoder = self.device.handle.create_command_encoder()
            for made in passes:
                compute = encoder.begin_compute_pass(timestamp_writes=made.timestamps)
                self.device.engine.record(compute, made.commands)
                if made.closing is not None:
                    self.device.engine.write_timestamp(compute, *made.closing)
                compute.end()
            if index == len(submits) - 1:
                encoded = self._finish(encoder, name, repeat)
            done(encoder)
        return encoded

    def _hand_over(self, encoder: Any) -> Future[int]:
        if self._submitter is not None:
            return self._submitter.submit(self._submit, encoder)
        done: Future[int] = Future()
        done.set_result(self._submit(encoder))
        return done

    def _submit(self, encoder: Any) -> int:
        """Finish an encoder, where every barrier is worked out, and queue it; returns the submission's index."""
        return self.device.engine.submit(self.device.handle, [encoder.finish()])

    def launch(self, launch: Launch) -> None:
        """Run one launch over the plan's tensors, once."""
        dispatch = self._dispatch(launch, -1)
        encoder = self.device.handle.create_command_encoder()
        compute = encoder.begin_compute_pass()
        self.device.engine.record(compute, _commands([dispatch]))
        compute.end()
        self.device.handle.queue.submit([encoder.finish()])

    def _make_passes(self, name: str, batches: list[list[Dispatch]]) -> list[list[Pass]]:
        """The passes of each submit, with a timestamp wherever a trace group begins, and after the last."""
        sets = self._queries.get(name, [])
        if sets and not self.plan.caps.timestamps_inside_passes:
            return _passes_by_group(sets, batches)
        submits = [[Pass(_commands(batch, sets))] for batch in batches]
        if sets:
            last = len(self.plan.groups[name])
            submits[-1][0].closing = (sets[last // QUERY_SET], last % QUERY_SET)
        return submits

    def _finish(self, encoder: Any, name: str, repeat: int) -> Encoded:
        """Resolve a traced run's ticks; copy a reporting graph's report, all ticks behind it, towards the host."""
        start = self.plan.ticks.get((name, repeat))
        if start is not None:
            count = queries_of(self.plan, name)
            for number, queries in enumerate(self._queries[name]):
                first = number * QUERY_SET
                here = min(QUERY_SET, count - first)
                encoder.resolve_query_set(queries, 0, here, self._buffers["ticks"], start + 8 * first)
        source = self.plan.reports.get(name)
        if source is None:
            return Encoded()
        self.runs[name] += 1
        staging = self._buffers[f"report.{name}.{self.runs[name] % RING}"]
        buffer, offset, nbytes = self.buffer_of(source)
        encoder.copy_buffer_to_buffer(buffer, offset, staging, 0, nbytes)
        if name in self.plan.groups and "ticks" in self._buffers:
            ticks = self._buffers["ticks"]
            encoder.copy_buffer_to_buffer(ticks, 0, staging, round_up(nbytes, 8), ticks.size)
        return Encoded(staging, self.runs[name])

    def _query_sets(self, name: str) -> list[Any]:
        count = queries_of(self.plan, name)
        return [
            self.device.handle.create_query_set(type=wgpu.QueryType.timestamp, count=min(QUERY_SET, count - first))
            for first in range(0, count, QUERY_SET)
        ]

    def read_clock(self) -> tuple[int, int, int] | None:
        """(GPU nanoseconds, host time before, host time after) of one reading of an idle device's clock."""
        if "clock" not in self._buffers:
            return None
        if self._clock_queries is None:
            self._clock_queries = self.device.handle.create_query_set(type=wgpu.QueryType.timestamp, count=2)
        writes = {"query_set": self._clock_queries, "beginning_of_pass_write_index": 0, "end_of_pass_write_index": 1}
        best = None
        self.wait()
        for _ in range(4):  # the first warms up; the tightest bracket wins
            encoder = self.device.handle.create_command_encoder()
            encoder.begin_compute_pass(timestamp_writes=writes).end()
            encoder.resolve_query_set(self._clock_queries, 0, 2, self._buffers["clock"], 0)
            before = time.monotonic_ns()
            self.device.handle.queue.submit([encoder.finish()])
            tick = int(self.device.read(self._buffers["clock"], 0, 8).view(np.uint64)[0])
            after = time.monotonic_ns()
            if best is None or after - before < best[2] - best[1]:
                best = (tick, before, after)
        return best

    def wait(self) -> None:
        """Wait until the device is idle. wgpu-py 0.32 cannot wait for the queue itself, so this reads a word back."""
        self.device.read(next(iter(self._buffers.values())), 0, 4)

    def _cut(self, name: str, steps: list[Step]) -> list[list[Dispatch]]:
        """The dispatches of a graph, in submits that keep it busy for about SUBMIT_SECONDS each, but the first."""
        batches: list[list[Dispatch]] = [[]]
        budget = self.device.caps.flops_per_second * SUBMIT_SECONDS
        spent = 0.0
        begins = {group.first: number for number, group in enumerate(self.plan.groups.get(name, ()))}
        for number, step in enumerate(steps):
            flops = OPS[step.node.op].flops(step.node)
            for launch in step.launches:
                begun = len(batches) == 1 and len(batches[0]) == FIRST_LAUNCHES
                if begun or (batches[-1] and spent + flops / len(step.launches) > budget):
                    batches.append([])
                    spent = 0.0
                spent += flops / len(step.launches)
                batches[-1].append(self._dispatch(launch, begins.pop(number, -1)))
        return batches

    def _dispatch(self, launch: Launch, group: int) -> Dispatch:
        pipeline, layout = self.kernels.pipeline(launch)
        entries = []
        for index, binding in enumerate(launch.bindings):
            place = self.plan.slices[binding.tensor.id]
            resource = {"buffer": self._buffers[place.buffer], "offset": place.offset + binding.offset}
            resource["size"] = place.nbytes - binding.offset
            entries.append({"binding": index, "resource": resource})
        bind_group = self.device.handle.create_bind_group(layout=layout, entries=entries)
        if launch.counted is None:
            return Dispatch(pipeline, bind_group, launch.grid, group)
        tensor, row = launch.counted
        place = self.plan.slices[tensor.id]
        return Dispatch(pipeline, bind_group, (self._buffers[place.buffer]._internal, place.offset + 12 * row), group)


def _passes_by_group(sets: list[Any], batches: list[list[Dispatch]]) -> list[list[Pass]]:
    """One pass a trace group, timed at its ends: for devices without timestamps inside passes.

    A group that a submit cuts in two goes on in a pass that moves its end alone.
    """
    submits, group = [], 0
    for batch in batches:
        starts = [at for at, dispatch in enumerate(batch) if at == 0 or dispatch.group >= 0]
        passes = []
        for start, end in zip(starts, [*starts[1:], len(batch)], strict=True):
            group = max(group, batch[start].group)
            at = 2 * group % QUERY_SET
            timestamps = {"query_set": sets[2 * group // QUERY_SET], "end_of_pass_write_index": at + 1}
            if batch[start].group >= 0:
                timestamps["beginning_of_pass_write_index"] = at
            passes.append(Pass(_commands(batch[start:end]), timestamps))
        submits.append(passes)
    return submits


def _commands(batch: list[Dispatch], sets: Sequence[Any] = ()) -> list[Command]:
    """Dispatches by their handles, a pipeline set once for a run of them; timed where there are query sets."""
    commands, pipeline = [], None
    for dispatch in batch:
        handle = dispatch.pipeline._internal if dispatch.pipeline is not pipeline else None
        pipeline = dispatch.pipeline
        command = Command(handle, dispatch.bind_group._internal, dispatch.grid)
        if sets and dispatch.group >= 0:
            queries, query = sets[dispatch.group // QUERY_SET]._internal, dispatch.group % QUERY_SET
            command = command._replace(queries=queries, query=query)
        commands.append(command)
    return commands


def _buffers_of_counts(plan: Plan) -> set[str]:
    """The buffers in which the device finds the grids of some launches."""
    launches = (launch for steps in plan.steps.values() for step in steps for launch in step.launches)
    return {plan.slices[launch.counted[0].id].buffer for launch in launches if launch.counted is not None}


def _usage(name: str, has_counts: bool) -> int | None:
    """What a plan's buffer is for, by its name: reports are mapped, ticks are resolved into, all others are storage."""
    usage = wgpu.BufferUsage
    if has_counts:
        return int(usage.STORAGE | usage.COPY_SRC | usage.COPY_DST | usage.INDIRECT)
    if name.startswith("report."):
        return int(usage.MAP_READ | usage.COPY_DST)
    if name in ("ticks", "clock"):
        return int(usage.QUERY_RESOLVE | usage.COPY_SRC)
    return None
