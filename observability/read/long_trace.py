"""Traces of long runs, read a part at a time: eight million spans as one table would not fit into memory.

A part is some lines from one step to another. Each gives a table of its steps, and the tables are joined. That holds
where every span's step is known within its part, as in the lines that this project writes; other traces are read whole.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from observability.errors import TraceError
from observability.read.kernel_sums import joined
from observability.read.span_table import NO_STEP, PHASE, RUN_STEP, Floats, Ints, SpanCollector, SpanTable
from observability.read.step_table import (
    MOST_KINDS,
    SAMPLED,
    Kind,
    StepTable,
    gap_before,
    pause_intervals,
    pause_seconds,
    step_table,
)

PART_SPANS: Final = 100_000
_COUNTED: Final = re.compile(r"(\d+) (.+)", re.DOTALL)


class NotInParts(Exception):
    """The trace has spans whose step is told in another part of it."""


@dataclass(frozen=True)
class _Part:
    """Steps of a run in one part of the trace, its pauses [n, 2] and the end of its last step, as dates in ns."""

    run: str
    table: StepTable
    intervals: Ints
    end_ns: int


@dataclass
class LongTrace:
    """Joins the parts of a trace; `spans` counts them all."""

    source: str
    spans: int = 0

    def __post_init__(self) -> None:
        self._parts: list[_Part] = []
        self._resumes: dict[str, tuple[str, int]] = {}

    def add(self, collector: SpanCollector) -> None:
        """One part, from a step on. Raises NotInParts where it is not."""
        spans = collector.table()
        if not len(spans):
            return
        self.spans += len(spans)
        if np.any((spans.level >= PHASE) & (spans.step == NO_STEP)):
            raise NotInParts
        self._resumes |= collector.resumes
        for run in np.unique(spans.run).tolist():
            own = _of_run(spans, run)
            if not np.any(own.level == RUN_STEP):
                raise NotInParts  # an evaluation before the run's first step, far from it
            try:
                table = step_table(own, self.source)
            except TraceError:
                raise NotInParts from None
            end = int(own.end[own.level == RUN_STEP].max())
            self._parts.append(_Part(spans.runs[run], table, pause_intervals(own, 0), end))

    def table(self) -> StepTable:
        """The steps of the newest run, with those of earlier runs that it goes on from."""
        if not self._parts:
            raise TraceError(f"{self.source}: no training steps among its {self.spans} spans")
        newest = max(self._parts, key=lambda part: part.table.began_ns + 1e9 * float(part.table.start[-1])).run
        chain, began_again = self._chain(newest)
        parts = [part for part in (_cut(part, chain.get(part.run)) for part in self._parts) if part is not None]
        others = len({part.run for part in self._parts} - chain.keys())
        notes = [f"resumed at step {', '.join(map(str, began_again))}"] if began_again else []
        notes += [f"{others} earlier run(s) in the same trace (this is the newest)"] if others else []
        return _joined(parts, began_again, notes)

    def _chain(self, newest: str) -> tuple[dict[str, int], list[int]]:
        """By run, the step before which its steps count; and the steps at which the run began again."""
        chain, run, end = {newest: 2**62}, newest, 2**62
        began_again: list[int] = []
        while run in self._resumes and self._resumes[run][0] not in chain:
            run, first = self._resumes[run]
            end = min(end, first)
            chain[run] = end
            if any(part.run == run and part.table.step[0] < end for part in self._parts):
                began_again.insert(0, first)
        return chain, began_again


def in_parts(collectors: Iterable[SpanCollector], source: str) -> LongTrace:
    """The trace whose parts `collectors` are. Raises NotInParts where it must be read whole."""
    trace = LongTrace(source)
    for collector in collectors:
        trace.add(collector)
    return trace


def _of_run(spans: SpanTable, run: int) -> SpanTable:
    """The spans of one run, as the only one."""
    rows = np.flatnonzero(spans.run == run)
    place = np.full(len(spans) + 1, -1)
    place[rows] = np.arange(len(rows))
    columns = ("name", "shape", "start", "end", "level", "step", "on_gpu", "flops", "bytes")
    return replace(
        spans,
        parent=place[spans.parent[rows]],  # -1 is the last, which is -1
        run=np.zeros(len(rows), dtype=np.int64),
        runs=[spans.runs[run]],
        attributes={int(place[row]): told for row, told in spans.attributes.items() if spans.run[row] == run},
        resources={0: spans.resources[run]},
        resumes={},
        **{name: getattr(spans, name)[rows] for name in columns},
    )


def _cut(part: _Part, end: int | None) -> _Part | None:
    """`part` without steps from `end` on; None where nothing is left, or the run is another one."""
    if end is None:
        return None
    table = part.table
    kept = table.step < end
    if kept.all():
        return part
    if not kept.any():
        return None
    gpu = table.gpu_seconds[kept] if len(table.gpu_seconds) else table.gpu_seconds
    sums = table.kernels
    if sums is not None:
        rows = sums.steps < end
        sums = replace(sums, steps=sums.steps[rows], seconds=sums.seconds[rows]) if rows.any() else None
    cut = replace(
        table.rows(kept),
        between=table.between[kept],
        gpu_seconds=gpu,
        kernels=sums,
        pauses=tuple(pause for pause in table.pauses if pause.step < end),
        told=tuple(told for told in table.told if told.step < end),
    )
    return replace(part, table=cut)


def _joined(parts: list[_Part], began_again: list[int], notes: list[str]) -> StepTable:
    tables = [part.table for part in parts]
    step = np.concatenate([table.step for table in tables])
    kinds, durations = _durations(tables, notes)
    began = tables[0].began_ns
    start = np.concatenate([(table.began_ns - began) / 1e9 + table.start for table in tables])
    between = np.concatenate([_between(part, before) for part, before in zip(parts, [None, *parts], strict=False)])
    pauses = tuple(pause for table in tables for pause in table.pauses)
    every = all(len(table.gpu_seconds) for table in tables)
    whole = StepTable(
        step=step,
        start=start,
        seconds=np.concatenate([table.seconds for table in tables]),
        wall_seconds=np.zeros(len(step)),
        skipped=np.concatenate([table.skipped for table in tables]),
        values={key: np.concatenate([table.values[key] for table in tables]) for key in tables[0].values},
        kinds=kinds,
        durations=durations,
        pauses=pauses,
        between=between,
        facts=_facts(tables),
        notes=(*notes, *_counted(tables)),
        began_ns=began,
        throttle=np.concatenate([table.throttle for table in tables]),
        told=tuple(told for table in tables for told in table.told),
        gpu_seconds=np.concatenate([table.gpu_seconds for table in tables]) if every else np.zeros(0),
        kernels=joined([table.kernels for table in tables if table.kernels is not None]),
    )
    whole = _each_step_once(whole)
    wall = whole.seconds + pause_seconds(pauses, whole.step, "checkpoint")
    return replace(whole, wall_seconds=wall, restarts=tuple(np.searchsorted(whole.step, began_again).tolist()))


def _durations(tables: list[StepTable], notes: list[str]) -> tuple[tuple[Kind, ...], Floats]:
    """All kinds of the parts, and seconds by step and kind; no kernels where only some steps have them."""
    total = sum(len(table) for table in tables)
    with_kernels = sum(len(t) for t in tables if any(kind.level == "kernel" for kind in t.kinds))
    kinds = [kind for table in tables for kind in table.kinds]
    place = {kind: index for index, kind in enumerate(dict.fromkeys(kinds))}
    if with_kernels < SAMPLED * total:
        place = {kind: i for i, kind in enumerate(kind for kind in place if kind.level != "kernel")}
    if len(place) > MOST_KINDS:
        seconds: Counter[Kind] = Counter()
        for table in tables:
            seconds.update(dict(zip(table.kinds, table.durations.sum(axis=0).tolist(), strict=True)))
        longest = {kind for kind, _ in seconds.most_common(MOST_KINDS)}
        notes.append(f"{len(place) - MOST_KINDS} rarer kinds of span (the {MOST_KINDS} longest are used)")
        place = {kind: i for i, kind in enumerate(kind for kind in place if kind in longest)}
    durations, at = np.zeros((total, len(place))), 0
    for table in tables:
        own = [index for index, kind in enumerate(table.kinds) if kind in place]
        durations[at : at + len(table), [place[table.kinds[index]] for index in own]] = table.durations[:, own]
        at += len(table)
    return tuple(place), durations


def _between(part: _Part, before: _Part | None) -> Floats:
    """Seconds before each step of a part in no span, that before its first step included."""
    table = part.table
    result = table.between.copy()
    if before is not None and before.run == part.run and table.step[0] == before.table.step[-1] + 1:
        begin = table.began_ns + round(1e9 * float(table.start[0]))
        intervals = np.concatenate([before.intervals, part.intervals])
        intervals = intervals[np.argsort(intervals[:, 0], kind="stable")]
        result[0] = gap_before(before.end_ns, begin, intervals)
    return result


def _facts(tables: list[StepTable]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for table in tables[-2:]:  # the newest run's; a part of nothing but its end may lack the rest
        facts.update(table.facts)
    return facts


def _counted(tables: list[StepTable]) -> Iterator[str]:
    """Notes that count something, added up."""
    counts: Counter[str] = Counter()
    for table in tables:
        for note in table.notes:
            match = _COUNTED.fullmatch(note)
            counts[match[2] if match else note] += int(match[1]) if match else 0
    for text, count in counts.items():
        yield f"{count} {text}" if count else text


def _each_step_once(table: StepTable) -> StepTable:
    """`table` in order of steps, of those that are given more than once the last."""
    if np.all(np.diff(table.step) > 0):
        return table
    _, last = np.unique(table.step[::-1], return_index=True)
    order = len(table.step) - 1 - last
    again = len(table.step) - len(order)
    gpu = table.gpu_seconds[order] if len(table.gpu_seconds) else table.gpu_seconds
    note = (f"{again} steps given more than once (the last is used)",) if again else ()
    return replace(
        table,
        values={key: column[order] for key, column in table.values.items()},
        throttle=table.throttle[order],
        gpu_seconds=gpu,
        notes=(*table.notes, *note),
        **{
            name: getattr(table, name)[order]
            for name in ("step", "start", "seconds", "wall_seconds", "skipped", "durations", "between")
        },
    )
