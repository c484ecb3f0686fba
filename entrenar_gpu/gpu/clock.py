"""GPU ticks to host time, and to the spans of a step. Host times are those of the monotonic clock, in nanoseconds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from entrenar_gpu.compiler import TraceGroup
from entrenar_gpu.events import Span


class Report(Protocol):
    """What an executor hands over when a step is done; `done_ns` says when that was, where the host knows, and
    `on_gpu` whether its ticks are a GPU's.
    """

    done_ns: int | None
    on_gpu: bool

    def ticks(self, graph: str, repeat: int) -> np.ndarray | None: ...


class GpuClock:
    """Maps GPU nanoseconds onto the host's clock, by an offset that every step's known bounds correct."""

    def __init__(self) -> None:
        self._offset: int | None = None

    def calibrate(self, tick: int, before_ns: int, after_ns: int) -> None:
        """Take the middle of the host times between which the GPU read its clock as `tick`."""
        self._offset = (before_ns + after_ns) // 2 - tick

    def place(self, ticks: np.ndarray, earliest_ns: int, latest_ns: int) -> np.ndarray:
        """Host times of a step's ticks, which all lie between submission and arrival of the report."""
        low, high = int(ticks.min()), int(ticks.max())
        if self._offset is None or high + self._offset > latest_ns:
            self._offset = latest_ns - high
        if low + self._offset < earliest_ns:
            self._offset = earliest_ns - low
        return ticks + self._offset


def step_spans(
    report: Report, groups: Mapping[str, Sequence[TraceGroup]], repeats: int, clock: GpuClock, submitted_ns: int
) -> tuple[list[Span], int]:
    """(GPU spans of a step, host time of its end) from a report that has just arrived; ([], now) if nothing was timed.

    `repeats` micro-batches, then the update. Parents count from the first span returned.
    """
    now = report.done_ns or time.monotonic_ns()
    runs = [("micro", r) for r in range(repeats)] + [("update", 0)]
    timed = [(groups[name], ticks) for name, r in runs if (ticks := report.ticks(name, r)) is not None]
    if not timed:
        return [], now
    placed = clock.place(np.concatenate([ticks for _, ticks in timed]), submitted_ns, now)
    spans: list[Span] = []
    at = 0
    for members, ticks in timed:
        spans += phase_spans(members, placed[at : at + len(ticks)], len(spans))
        at += len(ticks)
    return spans if report.on_gpu else [replace(span, on_gpu=False) for span in spans], int(placed.max())


def phase_spans(groups: Sequence[TraceGroup], times: np.ndarray, parent: int) -> list[Span]:
    """Spans of one run of a graph: a phase span around each run of groups of that phase, layers and kernels within.

    `times` [groups, 2] are host nanoseconds; `parent` is the index that the first span returned will have in its
    step's list. Groups without a layer belong to their phase itself and show at kernel level only.
    """
    spans: list[Span] = []
    phase_at = layer_at = -1
    for index, group in enumerate(groups):
        begin, end = int(times[index, 0]), int(times[index, 1])
        if index == 0 or groups[index - 1].phase != group.phase:
            phase_at, layer_at = len(spans), -1
            spans.append(Span(group.phase, "phase", begin, end, None, True, {"flops": 0, "bytes": 0}))
        spans[phase_at] = _extended(spans[phase_at], end, group)
        if group.layer is not None:
            if layer_at < 0 or spans[layer_at].attributes["layer"] != group.layer:
                layer_at = len(spans)
                attributes = {"layer": group.layer, "flops": 0, "bytes": 0}
                spans.append(Span(f"layer {group.layer}", "layer", begin, end, parent + phase_at, True, attributes))
            spans[layer_at] = _extended(spans[layer_at], end, group)
        if group.shape:
            owner = layer_at if group.layer is not None else phase_at
            facts = {"kernel": group.name, "shape": group.shape, "flops": group.flops, "bytes": group.bytes}
            spans.append(Span(group.name, "kernel", begin, end, parent + owner, True, facts))
    return spans


def _extended(span: Span, end: int, group: TraceGroup) -> Span:
    attributes = dict(span.attributes)
    attributes["flops"] += group.flops
    attributes["bytes"] += group.bytes
    return Span(span.name, span.kind, span.start_ns, max(span.end_ns, end), span.parent, True, attributes)
