"""A trace for ui.perfetto.dev (and chrome://tracing): the Trace Event format, host and GPU apart.

Format: "Trace Event Format" (Google, docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU); times
are microseconds, kept in whole nanoseconds here. Events of one track must nest or follow one another, which spans timed
by two clocks do not quite do, so every level gets tracks of its own, and a span that overlaps its neighbour moves to a
further one.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from observability.detect import Analysis
from observability.files import write_whole
from observability.read import KERNEL, LAYER, OTHER, PHASE, RUN, RUN_STEP, SpanTable, read_trace

_HOST, _GPU = 1, 2
_TRACK_NAMES: Final = {
    RUN: "run",
    RUN_STEP: "steps",
    PHASE: "phases",
    LAYER: "layers",
    KERNEL: "kernels",
    OTHER: "other",
}
_ORDER: Final = (RUN, RUN_STEP, PHASE, LAYER, KERNEL, OTHER)
_TRACKS_A_LEVEL: Final = 100  # overlapping spans beyond so many tracks share the last
_COUNTERS: Final = {"loss": "loss", "allocated_bytes": "GPU memory (bytes)"}


def write_perfetto(analysis: Analysis, path: Path) -> None:
    """Writes every span, with loss, memory and anomalies beside them. A name that ends in .gz is compressed."""
    opener = gzip.open if path.suffix == ".gz" else open

    def write(temporary: Path) -> None:
        with opener(temporary, "wt", encoding="utf-8") as stream:
            stream.write('{"displayTimeUnit":"ms","traceEvents":[\n')
            for index, event in enumerate(_events(analysis)):
                stream.write((",\n" if index else "") + _text(event))
            stream.write("\n]}\n")

    write_whole(path, write)


def _text(event: dict[str, Any]) -> str:
    """An event as JSON. Its times, nanoseconds so far, become microseconds with three decimals, every digit written:
    as floats some spans would end after the next one on their track begins, and be dropped.
    """
    times = {key: event[key] for key in ("ts", "dur") if key in event}
    text = json.dumps({k: v for k, v in event.items() if k not in times}, separators=(",", ":"), allow_nan=False)
    exact = "".join(
        f',"{key}":{"-" if ns < 0 else ""}{abs(ns) // 1000}.{abs(ns) % 1000:03d}' for key, ns in times.items()
    )
    return f"{text[:-1]}{exact}}}"


def _events(analysis: Analysis) -> Iterator[dict[str, Any]]:
    spans = analysis.spans if isinstance(analysis.spans, SpanTable) else read_trace(analysis.source)
    for process, name in ((_HOST, "host"), (_GPU, "GPU")):
        yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": process}}
    zero = int(spans.start.min())
    for process in (_HOST, _GPU):
        for level in _ORDER:
            rows = np.flatnonzero((spans.level == level) & (spans.on_gpu == (process == _GPU)))
            yield from _level_events(spans, rows, process, level, zero)
    yield from _step_events(analysis, zero)


def _level_events(spans: SpanTable, rows: Any, process: int, level: int, zero: int) -> Iterator[dict[str, Any]]:
    rows = rows[np.argsort(spans.start[rows], kind="stable")]
    track_ends: list[int] = []
    for row in rows.tolist():
        start, end = int(spans.start[row]), int(spans.end[row])
        track = next((i for i, free_at in enumerate(track_ends) if free_at <= start), len(track_ends))
        track = min(track, _TRACKS_A_LEVEL - 1)
        thread = _ORDER.index(level) * _TRACKS_A_LEVEL + track + 1
        if track == len(track_ends):
            track_ends.append(end)
            name = _TRACK_NAMES[level] + (f" ({track + 1})" if track else "")
            about = {"ph": "M", "pid": process, "tid": thread}
            yield about | {"name": "thread_name", "args": {"name": name}}
            yield about | {"name": "thread_sort_index", "args": {"sort_index": thread}}
        track_ends[track] = max(track_ends[track], end)
        arguments: dict[str, Any] = {"step": int(spans.step[row])} if spans.step[row] >= 0 else {}
        if spans.shape[row]:
            arguments["shape"] = spans.labels[spans.shape[row]]
        name = spans.label(row)
        if level == RUN_STEP:
            name = f"{name} {spans.step[row]}"
        yield {
            "ph": "X",
            "pid": process,
            "tid": thread,
            "name": name,
            "cat": _TRACK_NAMES[level],
            "ts": start - zero,
            "dur": end - start,
            "args": arguments,
        }


def _step_events(analysis: Analysis, zero: int) -> Iterator[dict[str, Any]]:
    """Counters by step, and a mark on every step with an anomaly."""
    table = analysis.table
    # From the table: the trace may have steps of these numbers in other runs too.
    begins = table.began_ns - zero + np.round(1e9 * table.start).astype(np.int64)
    starts = dict(zip(table.step.tolist(), begins.tolist(), strict=True))
    for key, name in _COUNTERS.items():
        for step, value in zip(table.step.tolist(), table.values[key].tolist(), strict=True):
            if np.isfinite(value):
                yield {"ph": "C", "pid": _HOST, "name": name, "ts": starts[step], "args": {"value": value}}
    for finding in analysis.anomalies:
        if finding.step in starts:
            yield {
                "ph": "i",
                "s": "g",
                "pid": _HOST,
                "tid": 1,
                "name": f"{finding.cause}: {finding.evidence}",
                "ts": starts[finding.step],
            }
