"""What the live detector keeps: the newest steps, and the baseline that they make."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from observability.detect import host
from observability.detect.baseline import NEAR_TAIL, WINDOW, noise_scale
from observability.read import HOST_VALUES, PAUSES, Kind, Pause, StepTable, number, whole

STEPS: Final = 1000  # kept
LOOK_BACK: Final = 2 * WINDOW  # steps that say how far off is far, and that explain one
# The baseline leaves out steps that raised an alarm, unless alarms or steps are so many that they are what is normal.
_FEW_ALARMS: Final = 0.03
_MOST_ORDINARY: Final = 0.8


@dataclass(frozen=True)
class Row:
    """One step as kept: seconds without pauses, seconds by kind of span, and what the record told."""

    step: int
    seconds: float
    durations: Mapping[Kind, float]
    values: Mapping[str, float]
    skipped: bool


@dataclass(frozen=True)
class Baseline:
    """Typical seconds and sigma of a step (for a typical amount of work) and of each phase."""

    step: float
    step_scale: float
    work: float
    phases: dict[Kind, tuple[float, float]]
    waits: float = 0.0  # seconds that threads waited for a processor
    threads: float = 0.0  # that ran or waited at any time, where processors compute the steps and others share them

    def waited(self, row: Row) -> float:
        """Seconds by which other programs kept the process of `row` from running for longer than usual."""
        if not self.threads:
            return 0.0
        return max(row.values["run_delay_seconds"] - self.waits, 0.0) / self.threads


@dataclass
class History:
    """The newest steps. `odd` are the numbers of those that raised an alarm; `seen` counts all there ever were."""

    rows: deque[Row] = field(default_factory=lambda: deque(maxlen=STEPS))
    odd: set[int] = field(default_factory=set)
    seen: int = 0

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.seen += 1

    def recent(self, key: str) -> list[float]:
        """What the newest steps told under this key."""
        return [row.values[key] for row in list(self.rows)[-LOOK_BACK:]]

    def baseline(self, warm_up: int) -> Baseline:
        """The baseline of the steps before the newest, without the run's first `warm_up`."""
        rows = list(self.rows)[:-1]
        if self.seen <= STEPS:
            rows = rows[warm_up:]
        rows = self._ordinary(rows)
        recent = rows[-WINDOW:]
        seconds = np.array([row.seconds for row in rows])
        centre = float(np.median(seconds[-WINDOW:]))
        phases = {}
        for kind in recent[-1].durations:
            if kind.level == "phase":
                times = np.array([row.durations.get(kind, 0.0) for row in recent])
                middle = float(np.median(times))
                phases[kind] = (middle, noise_scale(times - middle, middle, NEAR_TAIL))
        work = float(np.median([row.values["row_tokens"] for row in recent]))
        scale = noise_scale(seconds[-LOOK_BACK:] - centre, centre)
        return Baseline(centre, scale, work, phases, *self._shared())

    def _shared(self) -> tuple[float, float]:
        """`waits` and `threads` of a baseline; zeros where nobody shares the processors, or nothing tells."""
        table = self.table(LOOK_BACK, with_kinds=False)
        parts = host.processors(table) if host.busy(table) else None
        return (0.0, 0.0) if parts is None else (host.usual_wait(table), float(np.median(1 / parts.idle)))

    def _ordinary(self, rows: list[Row]) -> list[Row]:
        """`rows` without the odd ones, unless those are many."""
        ordinary = [row for row in rows if row.step not in self.odd]
        alarms = sum(row.step in self.odd and row.step - 1 not in self.odd for row in rows)
        few = alarms <= max(_FEW_ALARMS * len(rows), 1) and len(ordinary) >= _MOST_ORDINARY * len(rows)
        return ordinary if few else rows

    def table(self, most: int = STEPS, with_kinds: bool = True) -> StepTable:
        """The newest steps as the report's functions want them; without kinds of span in a tenth of the time."""
        rows = list(self.rows)[-most:]
        kinds = tuple(dict.fromkeys(kind for row in rows for kind in row.durations)) if with_kinds else ()
        seconds = np.array([row.seconds for row in rows])
        return StepTable(
            step=np.array([row.step for row in rows]),
            start=np.cumsum(seconds) - seconds,
            seconds=seconds,
            wall_seconds=seconds,
            skipped=np.array([row.skipped for row in rows]),
            values={key: np.array([row.values[key] for row in rows]) for key in rows[0].values},
            kinds=kinds,
            durations=np.array([[row.durations.get(kind, 0.0) for kind in kinds] for row in rows]),
        )


def row_of(record: Any) -> tuple[Row, list[Pause]]:
    """The step as kept, and the pauses among its spans."""
    durations: dict[Kind, float] = {}
    pauses, within = [], 0.0
    spans = record.spans
    for span in spans:
        seconds = seconds_of(span)
        if span.name in PAUSES:
            pauses.append(Pause(span.name, int(record.step), seconds, whole(span.attributes.get("bytes"), 0)))
            shared = min(span.end_ns, record.end_ns) - max(span.start_ns, record.start_ns)
            within += max(shared / 1e9, 0.0)
            continue
        phase = spans[span.parent].name if span.kind == "layer" and span.parent is not None else ""
        kind = Kind(span.kind, span.name, str(span.attributes.get("shape", "")), phase)
        durations[kind] = durations.get(kind, 0.0) + seconds
    values = {
        "loss": float(record.loss),
        "grad_norm": float(record.grad_norm),
        "tokens": float(record.tokens),
        "row_tokens": float(record.row_tokens),
        "allocated_bytes": float(record.allocated_bytes),
    } | {key: number(getattr(getattr(record, "host", None), key, None)) for key in HOST_VALUES}
    seconds = max(seconds_of(record) - within, 1e-9)
    return Row(int(record.step), seconds, durations, values, bool(record.skipped)), pauses


def seconds_of(interval: Any) -> float:
    return max(float(interval.end_ns - interval.start_ns) / 1e9, 0.0)
