"""Why: the cause of each finding, from where the lost time lies, and the evidence in words."""

from __future__ import annotations

from typing import Final

import numpy as np

from observability import schema
from observability.detect.baseline import Scores, core_scale, uncertainty
from observability.detect.findings import (
    ALARM_AT,
    CHECKPOINT_STALL,
    DATA_STALL,
    DRIFT,
    LONGER_BATCH,
    MEMORY_PRESSURE,
    NOTICED_AT,
    PERIODIC,
    SLOW_KERNEL,
    SPIKE,
    THROTTLE,
    Finding,
    duration,
    severity,
    size,
)
from observability.detect.periodic import Period
from observability.detect.sustained import Shift
from observability.read import Floats, Pause, StepTable

_MOST: Final = 0.6  # share of the lost time that one kind of span must hold to be at fault
_BEYOND_USUAL: Final = 0.25  # so much more of the lost time than of a step
_MEMORY_RISE: Final = 1.05
_ROUTINE_SPREAD: Final = 0.05  # of the usual cost
_FELT: Final = 0.02  # of a step: the sigma of a pause is at least that much
_FELT_FIRST: Final = 0.1  # the same, where no other pause tells what is usual
# What a write takes that no other tells about: any disk that is well does better.
_WRITE_SECONDS: Final = 0.025
_WRITE_BYTES_A_SECOND: Final = 100e6
_LONGER: Final = 1.1  # times the usual tokens: a batch that is worth a line
_COSTLY: Final = 0.10  # share of the run's time in checkpoints that is worth a line


def of_step(table: StepTable, step: Scores, kinds: Scores, row: int) -> Finding:
    """The finding for one slow step."""
    lost = float(step.excess[row])
    z = float(step.z[row])
    if z < NOTICED_AT and kinds.excess.shape[1]:  # hidden in the step's noise, but clear in one kind of span
        lost = float(np.max(kinds.excess[row]))
    cause, culprit, share = _where(table, kinds.excess[row], lost)
    number = int(table.step[row])
    memory = _memory_rise(table, row, row)
    if culprit is None:
        where = memory or _spread(table, kinds, row, lost)
        cause = MEMORY_PRESSURE if memory else cause
        seconds, expected = float(table.seconds[row]), float(step.expected[row])
        evidence = f"{duration(seconds)} against {duration(expected)}: {where}"
        return Finding(cause, number, number, number, "step", seconds, expected, z, severity(z), evidence)
    kind = table.kinds[culprit]
    seconds, expected = float(table.durations[row, culprit]), float(kinds.expected[row, culprit])
    evidence = f"{kind.label} took {duration(seconds)} instead of {duration(expected)}, {share:.0%} of the time lost"
    z = max(z, float(kinds.z[row, culprit]))
    return Finding(cause, number, number, number, kind.label, seconds, expected, z, severity(z), evidence)


def of_shift(table: StepTable, kinds: Scores, shift: Shift) -> Finding:
    """The finding for a slowdown that stays."""
    first, last = shift.first, shift.last
    lost = shift.level - shift.healthy
    before = slice(0, max(first, 1))
    tail = slice(max(first, last - (last - first) // 3), last + 1) if shift.kind == DRIFT else slice(first, last + 1)
    risen = np.median(table.durations[tail], axis=0) - np.median(table.durations[before], axis=0)
    cause, culprit, share = _where(table, risen, lost)
    memory = _memory_rise(table, first, last)
    span, seconds, expected = "step", shift.level, shift.healthy
    if shift.kind == DRIFT:
        cause = DRIFT
        text = f"{shift.slope * 10:+.1%} every 10 steps, {shift.level / shift.healthy - 1:+.0%} by the end"
    else:
        text = f"{lost / shift.healthy:+.0%} for {last - first + 1} steps, {duration(expected)} to {duration(seconds)}"
    if culprit is not None:
        text += f"; {share:.0%} of it in {table.kinds[culprit].label}"
        span = table.kinds[culprit].label
        seconds = float(np.median(table.durations[tail, culprit]))
        expected = seconds - float(risen[culprit])
    elif memory:
        cause, text = MEMORY_PRESSURE, f"{text}; {memory}"
    elif shift.kind != DRIFT:
        cause, text = THROTTLE, f"{text}, all phases alike (clock, temperature or another program)"
    first_step, last_step = int(table.step[first]), int(table.step[last])
    return Finding(cause, first_step, last_step, first_step, span, seconds, expected, shift.z, severity(shift.z), text)


def of_period(table: StepTable, step: Scores, kinds: Scores, period: Period) -> Finding | None:
    """The finding for a pause that comes back, or None where its steps do not stand out enough."""
    rows = period.rows
    lost = float(np.median(step.excess[rows]))
    scale = float(np.median(step.scale[rows]))
    z = lost / scale * np.sqrt(len(rows))  # of the median pause, not of one
    if severity(z) is None:
        return None
    _, culprit, _ = _where(table, np.median(kinds.excess[rows], axis=0), lost)
    where = f", in {table.kinds[culprit].label}" if culprit is not None else ""
    seconds, expected = float(np.median(table.seconds[rows])), float(np.median(step.expected[rows]))
    evidence = f"{duration(lost)} more every {period.period} steps, {len(rows)} times{where}"
    first, last = int(table.step[rows[0]]), int(table.step[rows[-1]])
    return Finding(PERIODIC, first, last, first, "step", seconds, expected, z, severity(z), evidence)


def of_pauses(table: StepTable, scale: float) -> list[Finding]:
    """Checkpoints and evaluations that were slow against the others; where there are few, against no pause at all."""
    findings = []
    for name in (schema.CHECKPOINT, schema.EVAL):
        pauses = [pause for pause in table.pauses if pause.name == name]
        if name == schema.EVAL:
            pauses = _warm(table, pauses)
        for index, pause in enumerate(pauses):
            others = [other.seconds for other in pauses[:index] + pauses[index + 1 :]]
            finding = judge_pause(pause, others, typical_step(table), scale)
            if finding is not None:
                findings.append(finding)
    written = [pause for pause in table.pauses if pause.name == schema.CHECKPOINT]
    total, wall = sum(pause.seconds for pause in written), table.total_seconds
    if total > _COSTLY * wall:
        text = f"{len(written)} checkpoints took {duration(total)}, {total / wall:.0%} of the run"
        first, last, typical = written[0].step, written[-1].step, total / len(written)
        findings.append(Finding(CHECKPOINT_STALL, first, last, first, schema.CHECKPOINT, typical, 0.0, 0.0, None, text))
    return findings


def _warm(table: StepTable, pauses: list[Pause]) -> list[Pause]:
    """`pauses` but the first of the run and of each resumed part: those compile and fill caches, as first steps do."""
    begins = (0, *(int(table.step[row]) for row in table.restarts))
    cold = {min((pause.step for pause in pauses if pause.step >= begin), default=None) for begin in begins}
    return [pause for pause in pauses if pause.step not in cold]


def judge_pause(pause: Pause, others: list[float], step_seconds: float, scale: float) -> Finding | None:
    """The finding for one checkpoint or evaluation, given the seconds of the `others` like it; None when it is normal.

    `step_seconds` and `scale` are a typical step and its sigma.
    """
    usual = allowed = 0.0
    if others:
        usual = allowed = float(np.median(others))
        deviation = max(core_scale(np.array(others)), _ROUTINE_SPREAD * usual) * uncertainty(len(others))
        spread = max(deviation, _FELT * step_seconds)
    elif pause.name == schema.EVAL:
        return None  # evaluations are asked for and take what they take
    else:
        allowed = _WRITE_SECONDS + pause.bytes / _WRITE_BYTES_A_SECOND
        spread = max(scale, _FELT_FIRST * step_seconds)
    z = (pause.seconds - allowed) / spread
    if severity(z) is None:
        return None
    word = "checkpoint write" if pause.name == schema.CHECKPOINT else "evaluation"
    evidence = f"{word} took {duration(pause.seconds)}"
    if usual:
        evidence += f" instead of {duration(usual)}"
    else:
        evidence += f", beside steps of {duration(step_seconds)}"
    if pause.bytes:
        evidence += f" ({size(pause.bytes)}, {size(pause.bytes / max(pause.seconds, 1e-9))}/s)"
    cause = CHECKPOINT_STALL if pause.name == schema.CHECKPOINT else SPIKE
    return Finding(
        cause, pause.step, pause.step, pause.step, pause.name, pause.seconds, usual, z, severity(z), evidence
    )


def typical_step(table: StepTable) -> float:
    return float(np.median(table.seconds))


def longer_batches(table: StepTable, step: Scores, work: Floats) -> list[Finding]:
    """Steps that took longer because they had more to do: explained, so without severity."""
    usual = float(np.median(table.seconds))
    slower = table.seconds - usual >= ALARM_AT * step.scale
    rows = np.flatnonzero(slower & (work > _LONGER) & (step.z < NOTICED_AT))
    findings = []
    for group in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(rows) else []:
        worst = int(group[np.argmax(table.seconds[group])])
        seconds = float(table.seconds[worst])
        text = f"{work[worst]:.2f}x the usual tokens in {seconds / usual:.2f}x the usual time"
        first, last = int(table.step[group[0]]), int(table.step[group[-1]])
        number = int(table.step[worst])
        findings.append(Finding(LONGER_BATCH, first, last, number, "step", seconds, usual, 0.0, None, text))
    return findings


def _where(table: StepTable, excess: Floats, lost: float) -> tuple[str, int | None, float]:
    """(cause, kind at fault, its share of the lost time); no kind where none holds most of it."""
    by_level: dict[str, list[int]] = {"kernel": [], "layer": [], "phase": []}
    for index, kind in enumerate(table.kinds):
        by_level[kind.level].append(index)
    for indices in by_level.values():
        if not indices or lost <= 0:
            continue
        worst = max(indices, key=lambda index: float(excess[index]))
        share = float(excess[worst]) / lost
        cause = _cause_of(table, excess, worst, share)
        if share >= _MOST and cause is not None:
            return cause, worst, min(share, 1.0)
    return SPIKE, None, 0.0


def _cause_of(table: StepTable, excess: Floats, index: int, share: float) -> str | None:
    """What it means when one kind of span holds this share of the lost time. A whole pass being slow is no one's fault.

    A phase is at fault where it holds far more than its usual share and its layers do not have the time, as they are
    well or the trace has none: then a kernel outside them was slow.
    """
    kind = table.kinds[index]
    if kind.level in ("layer", "kernel"):
        return SLOW_KERNEL
    if kind.name == schema.DATA:
        return DATA_STALL
    usual = float(np.median(table.durations[:, index])) / typical_step(table)
    layers = [i for i, other in enumerate(table.kinds) if other.level == "layer" and other.phase == kind.name]
    in_layers = float(np.sum(np.maximum(excess[layers], 0.0)))
    return SLOW_KERNEL if share >= usual + _BEYOND_USUAL and in_layers < 0.5 * excess[index] else None


def _spread(table: StepTable, kinds: Scores, row: int, lost: float) -> str:
    """Where the time went when no kind of span stands out."""
    phases = [i for i, kind in enumerate(table.kinds) if kind.level == "phase" and kinds.expected[row, i] > 0]
    over = {table.kinds[i].name: float(kinds.excess[row, i]) for i in phases}
    inside = sum(max(value, 0.0) for value in over.values())
    if not phases:
        return "the trace has no phases that say where"
    if inside < 0.5 * lost:
        return f"{duration(lost - inside)} of it outside every phase"
    parts = [f"{name} {value / lost:.0%}" for name, value in sorted(over.items(), key=lambda p: -p[1]) if value > 0]
    return f"time lost in {', '.join(parts[:3])}"


def _memory_rise(table: StepTable, first: int, last: int) -> str:
    """Words for memory that rose with these rows; empty when it did not."""
    held = table.values.get("allocated_bytes")
    if held is None or first == 0 or not np.all(np.isfinite(held)):
        return ""
    before, now = float(np.median(held[:first])), float(np.median(held[first : last + 1]))
    if before <= 0 or now < _MEMORY_RISE * before:
        return ""
    return f"memory rose from {size(before)} to {size(now)} with it"
