"""Spans of a trace as columns: what the readers fill and everything else works on.

A column is a NumPy array with one entry a span, so that 100,000 spans take some megabytes and no Python object each.
Only runs, steps, checkpoints and evaluations keep their attributes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from observability import schema

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

OTHER, RUN, RUN_STEP, PHASE, LAYER, KERNEL = range(6)
_LEVELS: Final = {"run": RUN, "step": RUN_STEP, "phase": PHASE, "layer": LAYER, "kernel": KERNEL}
_BY_NAME: Final = {schema.TRAIN: RUN, schema.STEP: RUN_STEP} | dict.fromkeys(schema.PHASES, PHASE)
_KEEP_ATTRIBUTES: Final = frozenset({schema.TRAIN, schema.STEP, schema.CHECKPOINT, schema.EVAL, schema.ANOMALY})
_MAX_DEPTH: Final = 64
NO_STEP: Final = -1


@dataclass(frozen=True)
class SpanTable:
    """Spans in file order; `parent` indexes the table, -1 where the parent is missing or there is none.

    `start` and `end` are nanoseconds since the epoch; `step` is the optimizer step, -1 where unknown; `run` indexes
    `runs`; `shape` indexes `labels`, as `name` does ("" where a span has none); `flops` and `bytes` are the work of a
    span, 0 where it does not tell.
    """

    labels: list[str]
    name: Ints
    shape: Ints
    start: Ints
    end: Ints
    parent: Ints
    level: Ints
    step: Ints
    run: Ints
    on_gpu: npt.NDArray[np.bool_]
    flops: Ints
    bytes: Ints
    runs: list[str]
    attributes: dict[int, Mapping[str, Any]]
    resources: Mapping[int, Mapping[str, Any]]  # by run
    skipped: Counter[str]
    resumes: Mapping[int, tuple[int, int]]  # of a resumed run: the one it goes on from, and its own first step

    def __len__(self) -> int:
        return len(self.start)

    def label(self, index: int) -> str:
        return self.labels[self.name[index]]


@dataclass(frozen=True)
class SpanFacts:
    """What a table keeps of a span's attributes; `attributes` are those themselves where somebody will ask."""

    level: int
    step: int
    shape: str
    run: str
    on_gpu: bool
    flops: int
    bytes: int
    attributes: Mapping[str, Any] | None

    @classmethod
    def of(cls, name: str, attributes: Mapping[str, Any]) -> SpanFacts:
        return cls(
            _level(name, attributes),
            whole(attributes.get(schema.STEP_NUMBER), NO_STEP),
            str(attributes.get(schema.KERNEL_SHAPE) or ""),
            str(attributes.get(schema.RUN_ID) or ""),
            attributes.get(schema.CLOCK) == "gpu",
            max(whole(attributes.get(schema.WORK_FLOPS), 0), 0),
            max(whole(attributes.get(schema.WORK_BYTES), 0), 0),
            attributes if name in _KEEP_ATTRIBUTES else None,
        )


@dataclass
class SpanCollector:
    """Collects spans one by one; what cannot be used is counted under its reason instead."""

    skipped: Counter[str] = field(default_factory=Counter)
    _resources: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    _resumes: dict[str, tuple[str, int]] = field(default_factory=dict)
    _labels: dict[str, int] = field(default_factory=lambda: {"": 0})
    _runs: dict[str, int] = field(default_factory=dict)
    _index: dict[str, int] = field(default_factory=dict)
    _parents: list[str] = field(default_factory=list)
    _rows: list[tuple[int, ...]] = field(default_factory=list)
    _attributes: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    def describe(self, resource: Mapping[str, Any]) -> None:
        """The attributes of a resource: which run it goes on from, if it is one that does."""
        first = whole(resource.get(schema.RUN_FIRST_STEP), NO_STEP)
        if first > 1 and schema.RUN_ID in resource and schema.RUN_RESUMES in resource:
            self._resumes[str(resource[schema.RUN_ID])] = str(resource[schema.RUN_RESUMES]), first

    def add(
        self,
        trace: str,
        span: str,
        parent: str,
        name: str,
        start: int,
        end: int,
        attributes: Mapping[str, Any],
        resource: Mapping[str, Any],
    ) -> None:
        """One span of a resource. `parent` is "" for a root; times are nanoseconds since the epoch."""
        name = printable(name)
        facts, above = SpanFacts.of(name, attributes), trace + parent if parent else ""
        self.put(trace, span, above, name, start, end, facts, resource.get(schema.RUN_ID), resource)

    def put(
        self,
        trace: str,
        span: str,
        above: str,
        name: str,
        start: int,
        end: int,
        facts: SpanFacts,
        of_run: Any,
        resource: Mapping[str, Any],
    ) -> None:
        """One span of the attributes `facts`; `above` is its parent's trace and span, `of_run` the resource's run."""
        if not 0 < start < 2**62 or not 0 < end < 2**62:
            self.skipped["spans without usable times"] += 1
            return
        if end < start:
            self.skipped["spans that end before they start"] += 1
            return
        row, key = len(self._rows), trace + span
        if self._index.setdefault(key, row) != row:
            self.skipped["spans given twice"] += 1
            return
        self._parents.append(above)
        told = facts.run or of_run
        run = self._runs.setdefault(str(told or printable(trace)), len(self._runs))
        self._resources[run] = resource
        labels = self._labels
        shape = labels.setdefault(facts.shape, len(labels)) if facts.shape else 0
        self._rows.append(
            (
                labels.setdefault(name, len(labels)), shape, start, end, facts.level, facts.step, run, bool(told),
                facts.on_gpu, facts.flops, facts.bytes,
            )
        )  # fmt: skip
        if facts.attributes is not None:
            self._attributes[row] = facts.attributes

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def resumes(self) -> Mapping[str, tuple[str, int]]:
        """By run that goes on from another: that one, and its own first step."""
        return self._resumes

    def table(self) -> SpanTable:
        columns = np.array(self._rows, dtype=np.int64).reshape(-1, 11).T
        name, shape, start, end, level, step, run, told, on_gpu, flops, moved = (
            np.ascontiguousarray(c) for c in columns
        )
        parent = np.array([self._index.get(key, -1) if key else -1 for key in self._parents], dtype=np.int64)
        step = _inherited(step, step != NO_STEP, parent)
        # A caller's own provider has a resource of its own: then only `train` and `step` say which run is theirs.
        run = _inherited(run, told == 1, parent)
        level = _with_kernels(level, step, parent)
        return SpanTable(
            list(self._labels),
            name,
            shape,
            start,
            end,
            parent,
            level,
            step,
            run,
            on_gpu.astype(bool),
            flops,
            moved,
            list(self._runs),
            self._attributes,
            self._resources,
            self.skipped,
            {
                self._runs[run]: (self._runs[earlier], first)
                for run, (earlier, first) in self._resumes.items()
                if run in self._runs and earlier in self._runs
            },
        )


def printable(text: str, most: int = 2000) -> str:
    """`text` fit for terminals, files and pages: at most so many characters, and none that steers a terminal."""
    text = text[:most]
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


def one_line(text: str) -> str:
    """`text` as one line fit for a terminal: what others sent may be a part of it."""
    return printable(" ".join(text.split()), 600)


def as_text(value: Any) -> str:
    return printable(str(value))


def as_truth(value: Any) -> bool:
    return value is True or value == "true"


def whole(value: Any, default: int) -> int:
    """`value` as a whole number below 2^53; `default` where it is none."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return default
    return number if abs(number) < 2**53 else default


def _level(name: str, attributes: Mapping[str, Any]) -> int:
    told = _LEVELS.get(str(attributes.get(schema.SPAN_LEVEL)))
    if told is not None:
        return told
    return LAYER if name.startswith(schema.LAYER_PREFIX) else _BY_NAME.get(name, OTHER)


def _inherited(values: Ints, told: npt.NDArray[np.bool_], parent: Ints) -> Ints:
    """`values`, where they are not `told` those of the nearest ancestor whose are."""
    values, told, ancestor = values.copy(), told.copy(), parent.copy()
    for _ in range(_MAX_DEPTH):
        rows = np.flatnonzero(~told & (ancestor >= 0))
        if not len(rows):
            break
        above = ancestor[rows]
        ancestor[rows] = parent[above]
        rows, above = rows[told[above]], above[told[above]]
        values[rows], told[rows] = values[above], True
    return values


def _with_kernels(level: Ints, step: Ints, parent: Ints) -> Ints:
    """`level`, where what is unnamed below a step is a kernel."""
    level = level.copy()
    below = (parent >= 0) & (level == OTHER) & (level[np.maximum(parent, 0)] >= RUN_STEP)
    level[below & (step != NO_STEP)] = KERNEL
    return level
