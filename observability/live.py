"""Anomalies while the training runs: one line each, on the step that shows them.

A `LiveDetector` is an observer of the trainer's records (duck-typed: nothing of the trainer is imported). Per step it
compares a handful of numbers with a baseline that it renews every few steps; only a step that stands out is looked
into, with the same functions that the report uses.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from observability import causes, health, schema
from observability.baseline import NEAR_TAIL, WINDOW, noise_scale, relative_work, score
from observability.findings import ALARM_AT, DRIFT, LOSS_SPIKE, NOTICED_AT, SKIPPED_STEP, Finding, duration
from observability.findings import COMPILE as COMPILE_CAUSE
from observability.steps import PAUSES, Kind, Pause, StepTable
from observability.sustained import find_shifts

_HISTORY: Final = 1000  # steps kept
_LOOK_BACK: Final = 2 * WINDOW  # steps looked at to explain one
_RENEW_EVERY: Final = 5  # steps between renewals of the baseline
_SUSTAINED_EVERY: Final = 100  # steps between looks for slowdowns that stay
_LEAST_HISTORY: Final = 20  # steps after the warm-up before anything is said of step times
_WARM_UP: Final = 3
_LINES_A_MINUTE: Final = 6
_MATERIAL: Final = 2.0  # sigmas of the step by which a phase must be over to matter


@dataclass(frozen=True)
class _Row:
    """One step as kept: seconds without pauses, seconds by kind of span, and what the record told."""

    step: int
    seconds: float
    durations: Mapping[Kind, float]
    values: Mapping[str, float]
    skipped: bool


@dataclass
class _Baseline:
    """Typical seconds and sigma of a step (for a typical amount of work) and of each phase."""

    step: float
    step_scale: float
    work: float
    phases: dict[Kind, tuple[float, float]]


@dataclass
class LiveDetector:
    """Observer that tells of anomalies as they happen.

    `emit` gets each line (default: standard error); at most `lines_a_minute` of them, the rest is counted. `on_finding`
    gets every finding, so that metrics can count them. `clock` is seconds, monotonic.
    """

    emit: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
    on_finding: Callable[[Finding], None] | None = None
    lines_a_minute: int = _LINES_A_MINUTE
    clock: Callable[[], float] = time.monotonic
    counts: Counter[str] = field(default_factory=Counter)
    unsaid: int = 0
    _rows: deque[_Row] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    _said_at: deque[float] = field(default_factory=deque)
    _pauses: dict[str, list[float]] = field(default_factory=dict)
    _baseline: _Baseline | None = None
    _seen: int = 0
    _alarm_before: int = -2
    _odd: set[int] = field(default_factory=set)  # steps that raised an alarm: no part of what is normal
    _sustained_until: int = -1
    _judged: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=16))

    def step_finished(self, record: Any) -> None:
        """A StepRecord: `step, step_seconds, start_ns, end_ns, tokens, row_tokens, loss, grad_norm, skipped, spans`."""
        row, pauses = _row_of(record)
        for pause in pauses:
            self._judge_pause(pause)
        self._rows.append(row)
        self._seen += 1
        self._judge_health(row)
        if self._seen > _LEAST_HISTORY + _WARM_UP:
            if self._baseline is None or self._seen % _RENEW_EVERY == 0:
                self._baseline = self._renewed()
            self._judge_step(row, self._baseline)
        if self._seen % _SUSTAINED_EVERY == 0:
            self._judge_stretch()

    def checkpoint_saved(self, record: Any) -> None:
        """A CheckpointRecord: `step, bytes, start_ns, end_ns`."""
        self._judge_pause(Pause(schema.CHECKPOINT, int(record.step), _seconds(record), int(record.bytes)))

    def eval_finished(self, record: Any) -> None:
        """An EvalRecord: `step, start_ns, end_ns`."""
        self._judge_pause(Pause(schema.EVAL, int(record.step), _seconds(record)))

    def summary(self) -> str:
        """The anomalies of the run in one line; empty when there were none."""
        if not self.counts:
            return ""
        total = sum(self.counts.values())
        named = ", ".join(f"{count} {cause}" for cause, count in self.counts.most_common())
        unsaid = f" ({self.unsaid} not shown as they came too fast)" if self.unsaid else ""
        return f"{total} {'anomaly' if total == 1 else 'anomalies'}: {named}{unsaid}"

    def run_finished(self, _summary: Any) -> None:
        text = self.summary()
        if text:
            self.emit(text)

    # --- judging ---------------------------------------------------------------------------------------------------

    def _judge_step(self, row: _Row, baseline: _Baseline) -> None:
        factor = max(row.values["row_tokens"] / baseline.work, 1.0) if baseline.work > 0 else 1.0
        over = row.seconds - baseline.step * factor
        suspicious = over >= ALARM_AT * baseline.step_scale or any(
            row.durations.get(kind, 0.0) - centre * factor >= max(ALARM_AT * scale, _MATERIAL * baseline.step_scale)
            for kind, (centre, scale) in baseline.phases.items()
        )
        if not suspicious:
            return
        if self._alarm_before == self._seen - 1:  # still the same anomaly
            self._alarm_before = self._seen
            return
        table = self._table(_LOOK_BACK)
        finding = _explained(table, baseline.step_scale)
        if finding is not None and finding.is_alarm:
            self._alarm_before = self._seen
            self._odd.add(row.step)
            self._tell(finding, row.seconds, baseline.step * factor, over / baseline.step_scale)

    def _judge_health(self, row: _Row) -> None:
        recent = [r.values["loss"] for r in list(self._rows)[-_LOOK_BACK:]]
        if not row.skipped and np.isfinite(row.values["loss"]) and row.values["loss"] < 1.2 * np.nanmedian(recent):
            norms = [r.values["grad_norm"] for r in list(self._rows)[-_LOOK_BACK:]]
            if not row.values["grad_norm"] > 2.5 * np.nanmedian(norms):
                return
        for finding in health.findings(self._table(_LOOK_BACK)):
            if finding.step == row.step and finding.cause in (LOSS_SPIKE, SKIPPED_STEP):
                self._count(finding, f"step {row.step}: {finding.evidence}")

    def _judge_pause(self, pause: Pause) -> None:
        if (pause.step, pause.name) in self._judged:  # told by a span of the step and by a record of its own
            return
        self._judged.append((pause.step, pause.name))
        earlier = self._pauses.setdefault(pause.name, [])
        if self._baseline is not None:
            base = self._baseline
            finding = causes.judge_pause(pause, earlier, base.step, base.step_scale)
            if finding is not None and finding.is_alarm:
                self._tell(finding, base.step + pause.seconds, base.step + finding.expected, finding.z)
        earlier.append(pause.seconds)

    def _judge_stretch(self) -> None:
        table = self._table(_HISTORY)
        work = relative_work(table)
        times = table.seconds / np.maximum(work, 1e-9)
        for shift in find_shifts(times):
            last = int(table.step[shift.last])
            if last <= self._sustained_until or shift.last < len(table) - _SUSTAINED_EVERY:
                continue
            kinds = score(table.durations, work)
            finding = causes.of_shift(table, kinds, shift, 0)
            if finding.is_alarm:
                # A drift goes on; it is told again only when it has grown over another stretch of the history.
                self._sustained_until = last + (_HISTORY if finding.cause == DRIFT else _HISTORY // 2)
                self._count(finding, f"steps {finding.first_step} to {finding.last_step}: {finding.evidence}")

    def _tell(self, finding: Finding, seconds: float, expected: float, z: float) -> None:
        shown = z if z >= NOTICED_AT else finding.z
        text = finding.evidence.split(", beside steps of")[0]
        if finding.span == "step":  # the line itself says how long the step took
            text = text.split(": ", 1)[-1]
        times = f"{duration(seconds)}, {shown:.1f}σ over {duration(expected)}"
        self._count(finding, f"step {finding.step}: {times}: {text}")

    def _count(self, finding: Finding, line: str) -> None:
        self.counts[finding.cause] += 1
        if self.on_finding is not None:
            self.on_finding(finding)
        now = self.clock()
        while self._said_at and self._said_at[0] <= now - 60:
            self._said_at.popleft()
        if len(self._said_at) < self.lines_a_minute:
            self._said_at.append(now)
            self.emit(line)
        else:
            self.unsaid += 1

    # --- history ---------------------------------------------------------------------------------------------------

    def _renewed(self) -> _Baseline:
        """The baseline of the steps before the newest, the warm-up left out."""
        rows = list(self._rows)[:-1]
        if self._seen <= _HISTORY:
            rows = rows[_WARM_UP:]
        rows = [row for row in rows if row.step not in self._odd]
        recent = rows[-WINDOW:]
        seconds = np.array([row.seconds for row in rows])
        centre = float(np.median(seconds[-WINDOW:]))
        kinds = [kind for kind in recent[-1].durations if kind.level == "phase"]
        phases = {}
        for kind in kinds:
            times = np.array([row.durations.get(kind, 0.0) for row in recent])
            middle = float(np.median(times))
            phases[kind] = (middle, noise_scale(times - middle, middle, NEAR_TAIL))
        work = float(np.median([row.values["row_tokens"] for row in recent]))
        return _Baseline(centre, noise_scale(seconds[-_LOOK_BACK:] - centre, centre), work, phases)

    def _table(self, most: int) -> StepTable:
        """The newest steps as the report's functions want them."""
        rows = list(self._rows)[-most:]
        kinds = tuple(dict.fromkeys(kind for row in rows for kind in row.durations))
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


def _explained(table: StepTable, step_scale: float) -> Finding | None:
    """The finding for the newest step of the table, whose sigma is `step_scale`; None when its work explains it."""
    work = relative_work(table)
    step, kinds = score(table.seconds, work), score(table.durations, work)
    newest = len(table) - 1
    step.scale[newest] = step_scale
    material = kinds.excess[newest] >= _MATERIAL * step_scale
    if step.z[newest] < NOTICED_AT and not np.any(material & (kinds.z[newest] >= ALARM_AT)):
        return None
    finding = causes.of_step(table, step, kinds, newest)
    return finding if finding.cause != COMPILE_CAUSE else None


def _row_of(record: Any) -> tuple[_Row, list[Pause]]:
    """The step as kept, and the pauses among its spans."""
    durations: dict[Kind, float] = {}
    pauses, within = [], 0.0
    spans = record.spans
    for span in spans:
        seconds = _seconds(span)
        if span.name in PAUSES:
            pauses.append(Pause(span.name, int(record.step), seconds))
            if record.start_ns <= span.start_ns < record.end_ns:
                within += seconds
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
    }
    return _Row(int(record.step), max(_seconds(record) - within, 1e-9), durations, values, bool(record.skipped)), pauses


def _seconds(interval: Any) -> float:
    return max(float(interval.end_ns - interval.start_ns) / 1e9, 0.0)
