"""Why: the cause of each finding, from where the lost time lies, and the evidence in words."""

from __future__ import annotations

from typing import Final

import numpy as np

from observability import schema
from observability.detect import host
from observability.detect.baseline import Scores, core_scale, noise_scale, uncertainty
from observability.detect.findings import (
    ALARM_AT,
    BETWEEN_STEPS,
    CHECKPOINT_STALL,
    DATA_STALL,
    DRIFT,
    INTERFERENCE,
    LONGER_BATCH,
    LOW,
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
from observability.detect.kinds import KindShift
from observability.detect.periodic import Period
from observability.detect.sustained import DRIFT_SHAPE, Shift
from observability.read import Floats, Pause, StepTable

_MOST: Final = 0.6  # share of the lost time that one kind of span must hold to be at fault
_BEYOND_USUAL: Final = 0.25  # so much more of the lost time than of a step
_LARGE: Final = 0.5  # of a step
_PLAIN_AT: Final = 6.0  # sigmas
_MEMORY_RISE: Final = 1.05
_ROUTINE_SPREAD: Final = 0.05  # of the usual cost
_FELT: Final = 0.02  # of a step: the sigma of a pause is at least that much
_FELT_BETWEEN: Final = 0.1  # the same, of what passes between two steps
_LEAST_GAP: Final = 0.5  # of a step: a shorter gap is not worth a line
_MUCH_BETWEEN: Final = 0.05  # of the run
_FELT_FIRST: Final = 0.1  # the same, where no other pause tells what is usual
# What a write takes that no other tells about: any disk that is well does better.
_WRITE_SECONDS: Final = 0.025
_WRITE_BYTES_A_SECOND: Final = 100e6
_OUT_OF_ALL_PROPORTION: Final = 3.0  # typical steps lost at once: worth a line even there
# On a machine that others share, what one step waited is news where it is so many times what one in fifty waits.
_CROWD: Final = 0.98
_OF_THE_CROWD: Final = 3.0
_UNDISTURBED: Final = 0.02  # of a step: one that waited less was left alone
_FREQUENT: Final = 0.05  # of the run
_SLOWER_PAUSES: Final = 1.3  # times those before
_LEAST_PAUSES: Final = 3
_LONGER: Final = 1.1  # times the usual tokens: a batch that is worth a line
_COSTLY: Final = 0.10  # share of the run's time in checkpoints that is worth a line


def of_step(
    table: StepTable,
    step: Scores,
    kinds: Scores,
    row: int,
    outside: float = 0.0,
    lost_outside: float = 0.0,
    waits_apart: bool = False,
) -> Finding:
    """The finding for one slow step; `outside` is by how many sigmas it was slow outside every phase, and
    `lost_outside` the seconds. `waits_apart` where what threads waited was expected of it.
    """
    lost = float(step.excess[row])
    z = float(step.z[row])
    if z < NOTICED_AT:  # hidden in the step's noise, but clear in one kind of span, or outside of all
        lost = max(float(np.max(kinds.excess[row], initial=0.0)), lost_outside if outside >= ALARM_AT else 0.0)
    z = max(z, outside)
    cause, culprit, share = _where(table, kinds.excess[row], lost)
    number = int(table.step[row])
    found = host.of_step(table, row, lost, outside < ALARM_AT, waits_apart)
    if found is not None and (culprit is None or table.kinds[culprit].name != schema.DATA):
        seconds, expected = float(table.seconds[row]), float(step.expected[row])
        evidence = f"{duration(seconds)} against {duration(expected)}: {found[1]}"
        return Finding(found[0], number, number, number, "step", seconds, expected, z, severity(z), evidence)
    memory = _memory_rise(table, row, row)
    if culprit is None:
        where = memory or _spread(table, kinds, row, lost)
        cause = MEMORY_PRESSURE if memory else cause
        seconds, expected = float(table.seconds[row]), float(step.expected[row])
        evidence = f"{duration(seconds)} against {duration(expected)}: {where}"
        grade = severity(z)
        if cause == SPIKE and grade is not None and z < _PLAIN_AT and lost < _LARGE * expected:
            grade = LOW  # all of a step alike and no one at fault: noise with heavy tails does as much
        return Finding(cause, number, number, number, "step", seconds, expected, z, grade, evidence)
    kind = table.kinds[culprit]
    seconds, expected = float(table.durations[row, culprit]), float(kinds.expected[row, culprit])
    evidence = f"{kind.label} took {duration(seconds)} instead of {duration(expected)}, {share:.0%} of the time lost"
    z = max(z, float(kinds.z[row, culprit]))
    return Finding(cause, number, number, number, kind.label, seconds, expected, z, severity(z), evidence)


def crowded(table: StepTable, findings: list[Finding]) -> list[Finding]:
    """`findings` of single steps, without those that other programs explain where those run all the time.

    On such a machine a step that waited for a processor is what is normal; what all of them cost is told once, by
    `interference`.
    """
    if not host.busy(table):
        return findings
    outrun, stops = host.outrun(table), host.stops(table)
    usual = _OF_THE_CROWD * float(np.quantile(outrun, _CROWD))
    most = max(_OUT_OF_ALL_PROPORTION * typical_step(table), usual)
    kept = []
    for finding in findings:
        lost = finding.seconds - finding.expected
        row = int(np.searchsorted(table.step, finding.step))
        if finding.cause != INTERFERENCE or lost >= most or stops[row] >= host.STOPPED * lost:
            kept.append(finding)
    return kept


def interference(table: StepTable, step: Scores) -> list[Finding]:
    """What other programs cost over the whole run, beyond the steps that they left alone; explained, not an alarm."""
    lost, best = waited_for(table, step)
    total, run = float(np.sum(lost)), float(np.sum(table.seconds))
    slow = lost > 0.1 * best
    if total < _FREQUENT * run or not slow.any():
        return []
    text = (
        f"{int(slow.sum()):,} of {len(table):,} steps waited for a processor that other programs had:"
        f" {duration(total)}, {total / table.total_seconds:.0%} of the run,"
        f" beyond steps that were left alone ({duration(best)})"
    )
    worst = int(np.argmax(lost))
    first, last = (int(table.step[row]) for row in (np.flatnonzero(slow)[0], np.flatnonzero(slow)[-1]))
    seconds = float(table.seconds[worst])
    return [Finding(INTERFERENCE, first, last, int(table.step[worst]), "step", seconds, best, 0.0, None, text, total)]


def waited_for(table: StepTable, step: Scores) -> tuple[Floats, float]:
    """(seconds that each step lost to other programs, what a step takes that they leave alone); zeros where untold."""
    waits = table.values.get("run_delay_seconds")
    base = table.seconds / step.factor
    if waits is None or not np.any(np.isfinite(waits)):
        return np.zeros(len(table)), float(np.median(base))
    waits = np.nan_to_num(waits)
    undisturbed = waits <= max(_UNDISTURBED * float(np.median(table.seconds)), float(np.quantile(waits, 0.1)))
    best = float(np.median(base[undisturbed]))
    lost = np.minimum(np.maximum(base - best, 0.0) * step.factor, waits)
    return np.where(undisturbed, 0.0, lost), best


def of_kind_shift(table: StepTable, slow: KindShift) -> Finding:
    """The finding for one kind of span that stays slow."""
    kind, shift = table.kinds[slow.kind], slow.shift
    cause = DATA_STALL if kind.level == "phase" and kind.name == schema.DATA else SLOW_KERNEL
    rows = np.arange(shift.first, shift.last + 1)
    level = float(np.median(table.durations[rows, slow.kind]))
    lost = float(np.median(slow.excess[rows]))
    if shift.kind == DRIFT_SHAPE:
        cause = DRIFT
        level = float(np.median(table.durations[rows[-max(len(rows) // 10, 1) :], slow.kind]))
        lost = float(np.median(slow.excess[rows[-max(len(rows) // 10, 1) :]]))
        text = (
            f"{kind.label} takes longer and longer, {duration(max(level - lost, 0.0))} to {duration(level)} by the end"
        )
    else:
        text = (
            f"{kind.label} took {duration(level)} instead of {duration(max(level - lost, 0.0))} for {len(rows)} steps"
        )
    text += f", {lost / typical_step(table):.0%} of a step"
    first, last = int(table.step[shift.first]), int(table.step[shift.last])
    expected = max(level - lost, 0.0)
    return Finding(cause, first, last, first, kind.label, level, expected, shift.z, severity(shift.z), text)


def of_shift(table: StepTable, kinds: Scores, shift: Shift, waits_apart: bool = False) -> Finding:
    """The finding for whole steps that stay slow; `waits_apart` where what threads waited was taken off before."""
    first, last = shift.first, shift.last
    lost = shift.level - shift.healthy
    drifts = shift.kind == DRIFT_SHAPE
    outside = np.ones(len(table), dtype=bool)
    outside[first : last + 1] = False
    before = outside if outside.any() else np.arange(len(table)) == 0
    tail = slice(max(first, last - (last - first) // 3), last + 1) if drifts else slice(first, last + 1)
    risen = np.median(table.durations[tail], axis=0) - np.median(table.durations[before], axis=0)
    cause, culprit, share = _where(table, risen, lost)
    if host.busy(table):
        culprit = None  # against its like it stood out in nothing (kinds.py), and medians of few steps scatter
    span, seconds, expected = "step", shift.level, shift.healthy
    if drifts:
        cause = DRIFT
        text = f"{shift.slope * 10:+.1%} every 10 steps, {shift.level / shift.healthy - 1:+.0%} by the end"
    else:
        text = f"{lost / shift.healthy:+.0%} for {last - first + 1} steps, {duration(expected)} to {duration(seconds)}"
    found = host.evidence(table, np.arange(len(table))[tail], before, lost, waits_apart)
    memory = _memory_rise(table, first, last)
    if culprit is not None and (found is None or found[0] != INTERFERENCE):
        text += f"; {share:.0%} of it in {table.kinds[culprit].label}"
        span = table.kinds[culprit].label
        seconds = float(np.median(table.durations[tail, culprit]))
        expected = seconds - float(risen[culprit])
    elif memory:
        cause, text = MEMORY_PRESSURE, f"{text}; {memory}"
    elif found is not None:
        cause, text = DRIFT if drifts else found[0], f"{text}; {found[1]}"
    elif not drifts:
        cause, text = THROTTLE, f"{text}, all phases alike (clock, temperature or another program)"
    first_step, last_step = int(table.step[first]), int(table.step[last])
    return Finding(cause, first_step, last_step, first_step, span, seconds, expected, shift.z, severity(shift.z), text)


def of_waits(table: StepTable, shift: Shift) -> Finding:
    """The finding for steps that wait longer for a processor, for good."""
    rows = np.arange(shift.first, shift.last + 1)
    lost = shift.level - shift.healthy
    seconds = float(np.median(table.seconds[rows]))
    others = table.values.get("others_cpu_seconds", np.zeros(0))
    text = f"{lost / shift.healthy:+.0%} for {len(rows)} steps: {host.WAITED} {duration(lost)} more for a processor"
    if len(others) and np.any(np.isfinite(others[rows])):
        text += f"; other programs used {duration(float(np.nanmedian(others[rows])))} of processors in a step"
    first, last = int(table.step[shift.first]), int(table.step[shift.last])
    expected = max(seconds - lost, 0.0)
    return Finding(INTERFERENCE, first, last, first, "step", seconds, expected, shift.z, severity(shift.z), text)


def of_period(table: StepTable, step: Scores, kinds: Scores, period: Period, one: float = 0.0) -> Finding | None:
    """The finding for a pause that comes back, or None where its steps do not stand out enough.

    `one` is how many sigmas its typical pause is where it was found: in the whole step, its data, or outside phases.
    """
    rows = period.rows
    lost = float(np.median(step.excess[rows]))
    scale = float(np.median(step.scale[rows]))
    z = max(lost / scale, one if lost >= _FELT * typical_step(table) else 0.0) * np.sqrt(len(rows))  # of the median
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
        slower = _slower_from(pauses, typical_step(table))
        if slower is not None:
            findings = [f for f in findings if f.span != name or f.step < slower.first_step]
            findings.append(slower)
    written = [pause for pause in table.pauses if pause.name == schema.CHECKPOINT]
    total, wall = sum(pause.seconds for pause in written), table.total_seconds
    if total > _COSTLY * wall:
        text = f"{len(written)} checkpoints took {duration(total)}, {total / wall:.0%} of the run"
        first, last, typical = written[0].step, written[-1].step, total / len(written)
        findings.append(Finding(CHECKPOINT_STALL, first, last, first, schema.CHECKPOINT, typical, 0.0, 0.0, None, text))
    return findings


def _slower_from(pauses: list[Pause], step_seconds: float) -> Finding | None:
    """The finding for checkpoints or evaluations that became slow and stayed so, None where they did not."""
    times = np.array([pause.seconds for pause in pauses])
    best, found = ALARM_AT, None
    for cut in range(_LEAST_PAUSES, len(times) - _LEAST_PAUSES + 1):
        before, after = times[:cut], times[cut:]
        was, now = float(np.median(before)), float(np.median(after))
        if now < _SLOWER_PAUSES * was or np.quantile(after, 0.2) <= np.quantile(before, 0.8):
            continue
        noise = max(core_scale(before) + core_scale(after), 2 * _ROUTINE_SPREAD * was, _FELT * step_seconds) / 2
        z = (now - was) / (noise * uncertainty(len(times))) / float(np.sqrt(1 / len(before) + 1 / len(after)))
        if z > best:
            best, found = z, (cut, was, now)
    if found is None:
        return None
    cut, was, now = found
    cause = CHECKPOINT_STALL if pauses[0].name == schema.CHECKPOINT else SPIKE
    what = "checkpoints" if pauses[0].name == schema.CHECKPOINT else "evaluations"
    text = f"{what} took {duration(was)}, and {duration(now)} from step {pauses[cut].step} on"
    cost = float(np.sum(np.maximum(times[cut:] - was, 0.0)))
    first, last = pauses[cut].step, pauses[-1].step
    return Finding(cause, first, last, first, pauses[0].name, now, was, best, severity(best), text, cost)


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


def between_steps(table: StepTable) -> list[Finding]:
    """Time that lies in no span: gaps that stand out, and all of them together where they are much of the run."""
    gaps = table.between
    if not len(gaps) or len(table) < 2:
        return []
    usual = typical_step(table)
    excess = gaps - float(np.median(gaps))
    scale = max(noise_scale(excess, usual), _FELT_BETWEEN * usual)
    findings = []
    for row in np.flatnonzero((excess >= ALARM_AT * scale) & (excess >= _LEAST_GAP * usual)):
        seconds, step = float(gaps[row]), int(table.step[row])
        z = float(excess[row]) / scale
        text = f"{duration(seconds)} passed between steps {table.step[row - 1]:,} and {step:,}, in no span"
        expected = max(seconds - float(excess[row]), 0.0)
        lost = seconds - expected
        findings.append(Finding(BETWEEN_STEPS, step, step, step, "step", seconds, expected, z, severity(z), text, lost))
    rest = float(np.sum(gaps)) - sum(finding.cost or 0.0 for finding in findings)
    if rest > _MUCH_BETWEEN * table.total_seconds:
        first, last = int(table.step[0]), int(table.step[-1])
        text = f"{duration(rest)}, {rest / table.total_seconds:.0%} of the run, passed between steps, in no span"
        each = float(np.median(gaps))
        findings.append(Finding(BETWEEN_STEPS, first, last, first, "step", each, 0.0, 0.0, None, text, rest))
    return findings


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
    whole = max(inside, lost)  # what is expected of a step and of its phases need not add up
    parts = [f"{name} {value / whole:.0%}" for name, value in sorted(over.items(), key=lambda p: -p[1]) if value > 0]
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
