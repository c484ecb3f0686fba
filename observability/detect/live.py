"""Anomalies while the training runs: one line each, on the step that shows them.

A `LiveDetector` is an observer of the trainer's records (duck-typed: nothing of the trainer is imported). Per step it
compares a handful of numbers with a baseline that it renews every few steps; only a step that stands out is looked
into, with the same functions that the report uses.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from observability import schema
from observability.detect import causes, health
from observability.detect.findings import (
    ALARM_AT,
    DRIFT,
    LOSS_SPIKE,
    NOTICED_AT,
    SKIPPED_STEP,
    Finding,
    duration,
)
from observability.detect.history import LOOK_BACK, STEPS, Baseline, History, Row, row_of, seconds_of
from observability.detect.stages import PERIODIC, SINGLE_STEPS, SUSTAINED, Body
from observability.read import Pause, StepTable

_RENEW_EVERY: Final = 5  # steps between renewals of the baseline
_LEAST_HISTORY: Final = 20  # steps after the warm-up before anything is said of step times
_WARM_UP: Final = 3
_LINES_A_MINUTE: Final = 6
_WORTH_A_LOOK: Final = 0.1  # of a step, in one phase or in none
_FOLDED: Final = 500  # steps in which a pause that comes back is sought: in all that are kept it would hold up the next
_SAME_PAUSE: Final = 2.0  # times the usual of a pause that comes back: one this long is another matter
_FAR_WORSE: Final = 2.0  # times the seconds lost to what has been told: worth a line of its own


@dataclass(frozen=True)
class _Said:
    """A line that was told: when, and of how many seconds lost to which cause."""

    at: float
    cause: str
    lost: float


@dataclass
class LiveDetector:
    """Observer that tells of anomalies as they happen.

    `emit` gets each line (default: standard error). Of each minute's anomalies `lines_a_minute` are told, beyond those
    only the first of a cause and what lost far more time than all that was told; the rest is counted. `on_finding` gets
    every finding, so that metrics can count them. `clock` is seconds, monotonic.
    """

    emit: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
    on_finding: Callable[[Finding], None] | None = None
    lines_a_minute: int = _LINES_A_MINUTE
    clock: Callable[[], float] = time.monotonic
    counts: Counter[str] = field(default_factory=Counter)
    unsaid: int = 0
    _history: History = field(default_factory=History)
    _said: deque[_Said] = field(default_factory=deque)
    _pauses: dict[str, list[float]] = field(default_factory=dict)
    _baseline: Baseline | None = None
    _alarm_before: int = -2
    _alarm_over: float = 0.0  # seconds lost to the worst step of that alarm
    _sustained_to: int = -1  # the step to which slowdowns that stay have been followed
    _sustained_again: int = -1  # the step from which one that goes on is worth another line
    _period: tuple[Finding, int] | None = None  # a pause that comes back, and every how many steps
    _judged: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=16))

    def step_finished(self, record: Any) -> None:
        """A StepRecord: `step, step_seconds, start_ns, end_ns, tokens, row_tokens, loss, grad_norm, skipped, spans`."""
        row, pauses = row_of(record)
        for pause in pauses:
            self._judge_pause(pause)
        self._history.add(row)
        self._judge_health(row)
        if self._history.seen > _LEAST_HISTORY + _WARM_UP:
            if self._baseline is None or self._history.seen % _RENEW_EVERY == 0:
                self._baseline = self._history.baseline(_WARM_UP)
            self._judge_step(row, self._baseline)
        if SUSTAINED.due(self._history.seen):
            self._judge_stretch()
        if PERIODIC.due(self._history.seen):
            self._judge_period()

    def checkpoint_saved(self, record: Any) -> None:
        """A CheckpointRecord: `step, bytes, start_ns, end_ns`."""
        self._judge_pause(Pause(schema.CHECKPOINT, int(record.step), seconds_of(record), int(record.bytes)))

    def eval_finished(self, record: Any) -> None:
        """An EvalRecord: `step, start_ns, end_ns`."""
        self._judge_pause(Pause(schema.EVAL, int(record.step), seconds_of(record)))

    def summary(self) -> str:
        """The anomalies of the run in one line; empty when there were none."""
        if not self.counts:
            return ""
        total = sum(self.counts.values())
        named = ", ".join(f"{count} {cause}" for cause, count in self.counts.most_common())
        unsaid = f" ({self.unsaid} not shown as they came too fast)" if self.unsaid else ""
        return f"{total} {'anomaly' if total == 1 else 'anomalies'}: {named}{unsaid}"

    def run_finished(self, _summary: Any) -> None:
        if self._history.seen > _LEAST_HISTORY + _WARM_UP:
            self._judge_stretch()
            self._judge_period()
        text = self.summary()
        if text:
            self.emit(text)

    # --- judging ---------------------------------------------------------------------------------------------------

    def _judge_step(self, row: Row, baseline: Baseline) -> None:
        factor = max(row.values["row_tokens"] / baseline.work, 1.0) if baseline.work > 0 else 1.0
        waited = baseline.waited(row)
        over = row.seconds - waited - baseline.step * factor
        phases = sum(row.durations.get(kind, 0.0) for kind in baseline.phases)
        suspicious = over >= ALARM_AT * baseline.step_scale or any(
            extra >= max(ALARM_AT * scale, _WORTH_A_LOOK * baseline.step)
            for extra, scale in (
                *(
                    (row.durations.get(kind, 0.0) - waited - c * factor, scale)
                    for kind, (c, scale) in baseline.phases.items()
                ),
                (row.seconds - waited - phases if phases else 0.0, 0.0),
            )
        )
        if not suspicious or self._comes_back(row.step, over):
            return
        if self._alarm_before == self._history.seen - 1 and over < _FAR_WORSE * self._alarm_over:
            self._alarm_before = self._history.seen  # still the same anomaly
            self._history.odd.add(row.step)
            return
        table = self._history.table(LOOK_BACK)
        finding = _explained(table, baseline.step_scale)
        if finding is not None and finding.is_alarm:
            self._alarm_before, self._alarm_over = self._history.seen, over
            self._history.odd.add(row.step)
            self._tell(finding, row.seconds, baseline.step * factor, over / baseline.step_scale)

    def _judge_health(self, row: Row) -> None:
        recent = self._history.recent("loss")
        if not row.skipped and np.isfinite(row.values["loss"]) and row.values["loss"] < 1.2 * np.nanmedian(recent):
            norms = self._history.recent("grad_norm")
            if not row.values["grad_norm"] > 2.5 * np.nanmedian(norms):
                return
        for finding in health.findings(self._history.table(LOOK_BACK)):
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

    def _comes_back(self, step: int, over: float) -> bool:
        """Whether this is one more of the pauses that have been told of as periodic: no longer than those."""
        if self._period is None:
            return False
        pause, every = self._period
        return (step - pause.step) % every == 0 and over <= _SAME_PAUSE * (pause.seconds - pause.expected)

    def _judge_stretch(self) -> None:
        """Tell of slowdowns that stay; of one that goes on, again when it has lasted long."""
        for finding in sorted(SUSTAINED.find(Body(self._history.table())), key=lambda f: f.first_step):
            last = finding.last_step
            if last <= self._sustained_to:
                continue
            goes_on = finding.first_step <= self._sustained_to
            self._sustained_to = last
            if goes_on and last < self._sustained_again:
                continue
            if finding.is_alarm:
                self._sustained_again = last + (STEPS if finding.cause == DRIFT else STEPS // 2)
                self._count(finding, f"steps {finding.first_step} to {finding.last_step}: {finding.evidence}")

    def _judge_period(self) -> None:
        """Tell of a pause that comes back, once for each period."""
        body = Body(self._history.table(_FOLDED))
        for finding in PERIODIC.find(body):
            if finding.is_alarm and (self._period is None or self._period[1] != body.period):
                self._period = finding, body.period
                self._count(finding, f"steps {finding.first_step} to {finding.last_step}: {finding.evidence}")

    def _tell(self, finding: Finding, seconds: float, expected: float, z: float) -> None:
        text = finding.evidence.split(", beside steps of")[0]
        if finding.span == "step":  # the line itself says how long the step took
            text = text.split(": ", 1)[-1]
        if z >= NOTICED_AT:
            times = f"{duration(seconds)}, {z:.1f}σ over {duration(expected)}"
        else:  # within the noise of steps, but not of its part
            times, text = f"{duration(seconds)}, usually {duration(expected)}", f"{text} ({finding.z:.1f}σ)"
        self._count(finding, f"step {finding.step}: {times}: {text}")

    def _count(self, finding: Finding, line: str) -> None:
        self.counts[finding.cause] += 1
        if self.on_finding is not None:
            self.on_finding(finding)
        now, lost = self.clock(), finding.seconds - finding.expected
        while self._said and self._said[0].at <= now - 60:
            self._said.popleft()
        worth_a_line = (
            len(self._said) < self.lines_a_minute
            or all(said.cause != finding.cause for said in self._said)
            or lost > _FAR_WORSE * max(said.lost for said in self._said)
        )
        if worth_a_line:
            self._said.append(_Said(now, finding.cause, lost))
            self.emit(line)
        else:
            self.unsaid += 1


def _explained(table: StepTable, step_scale: float) -> Finding | None:
    """The finding for the newest step of the table, whose sigma is `step_scale`; None when its work explains it."""
    body = Body(table)
    if not body.shared:
        body.times.scale[-1] = max(step_scale, float(body.times.scale[-1]))
    body.taken[:-1] = True
    return next(iter(SINGLE_STEPS.find(body)), None)
