"""The detector: from a table of steps to findings, each with its cause and the evidence for it.

Order matters, as each stage takes its steps away from the next: first-step compilation, slowdowns that stay, pauses
that come back, single steps. Times are corrected for the work of a step before any of them, so a longer batch is
explained, not flagged.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from observability.detect import causes, health
from observability.detect.baseline import Mask, Scores, core_scale, noise_scale, pools_of, relative_work, score
from observability.detect.findings import ALARM_AT, COMPILE, NOTICED_AT, Finding, severity
from observability.detect.periodic import find_period
from observability.detect.sustained import Shift, find_shifts
from observability.read import Floats, StepTable

LEAST_STEPS: Final = 8  # fewer say nothing about what is normal
_WARM_UP: Final = 10  # steps at most
_COMPILE_FACTOR: Final = 1.5  # a first step that compiles takes at least so many times the typical step
MATERIAL: Final = 3.0  # sigmas of the step by which a kind of span must be over to matter to the step
_PLAIN_AT: Final = 6.0  # sigmas at which a kind of span so plainly explains a step that the step is no one's noise


@dataclass(frozen=True)
class Scored:
    """Every time of a run against its baseline: `step` [steps], `kinds` [steps, kinds].

    `cold` are the steps that are slow for being first, of the run or after a resume; they shape no baseline.
    """

    step: Scores
    kinds: Scores
    cold: Mask


def detect(table: StepTable) -> tuple[list[Finding], Scored]:
    """Findings in order of their first step, and the scores they rest on.

    Of a run with fewer than LEAST_STEPS steps that are not cold only the health is judged: no time in it is odd.
    """
    cold = cold_steps(table)
    body = table.rows(~cold)
    if len(body) < LEAST_STEPS:
        return health.findings(table), Scored(_unscored(table.seconds), _unscored(table.durations), cold)
    findings, times, kinds = _timed(body)
    scored = Scored(_placed(times, table.seconds, cold), _placed(kinds, table.durations, cold), cold)
    findings += _compilation(table, scored)
    findings += causes.of_pauses(table, float(np.median(times.scale)))
    findings += health.findings(table)
    return sorted(findings, key=lambda finding: finding.first_step), scored


def _timed(table: StepTable) -> tuple[list[Finding], Scores, Scores]:
    """Findings on the time of steps, and the scores of steps and of kinds of span."""
    seconds, work, pools = table.seconds, relative_work(table), pools_of(table)
    times = score(seconds, work)
    kinds = score(table.durations, work, pools=pools)
    plain = plainly_explained(times, kinds)
    # A burst of steps that one layer explains is no slowdown of the run.
    shifts = find_shifts(np.where(plain, times.expected, seconds) / times.factor)
    core = max(core_scale(times.excess), 1e-9)
    period = find_period(np.where(_outside(shifts, len(seconds)), times.excess, 0.0) / core)
    taken = np.zeros(len(seconds), dtype=bool)
    if period is not None:
        taken[period.rows] = True
        kinds = score(table.durations, work, taken, pools)
    times = score(seconds, work, taken | plain)

    findings = [causes.of_shift(table, kinds, shift) for shift in shifts]
    if period is not None:
        finding = causes.of_period(table, times, kinds, period)
        if finding is not None:
            findings.append(finding)
        else:
            taken[:] = False
    findings += _single_steps(table, times, kinds, ~taken)
    findings += causes.longer_batches(table, times, work)
    return findings, times, kinds


def plainly_explained(times: Scores, kinds: Scores) -> Mask:
    """Steps that one kind of span was so slow in that nothing else need be asked."""
    core = max(core_scale(times.excess), 1e-9)
    result: Mask = np.any((kinds.z >= _PLAIN_AT) & (kinds.excess >= _PLAIN_AT * core), axis=1)
    return result


def cold_steps(table: StepTable) -> Mask:
    """The first steps of the run and of its resumed parts, as far as they are slow for being first."""
    cold = np.zeros(len(table), dtype=bool)
    for begin, end in pairwise((0, *table.restarts, len(table))):
        cold[begin : begin + warm_up_steps(table.seconds[begin:end])] = True
    return cold


def warm_up_steps(seconds: Floats) -> int:
    """How many first steps are slow for being first: compiling shaders, filling caches."""
    if len(seconds) < LEAST_STEPS:
        return min(1, len(seconds))
    rest = seconds[min(_WARM_UP, len(seconds) // 2) :]
    typical = float(np.median(rest))
    limit = max(_COMPILE_FACTOR * typical, typical + ALARM_AT * noise_scale(rest - typical, typical))
    slow = seconds[:_WARM_UP] > limit
    return int(np.argmin(slow)) if not slow.all() else 0


def _outside(shifts: list[Shift], count: int) -> Mask:
    mask = np.ones(count, dtype=bool)
    for shift in shifts:
        # the moving median needs some steps to follow
        mask[max(0, shift.first - 2) : shift.first + 3] = False
    return mask


def _placed(scores: Scores, times: Floats, cold: Mask) -> Scores:
    """Scores of the steps that are not cold among those that are, which are held against the next one's expectation."""
    row = np.minimum(np.cumsum(~cold) - ~cold, int(np.sum(~cold)) - 1)
    expected = scores.expected[row]
    return Scores(expected, times - expected, scores.scale[row], scores.factor[row])


def _unscored(times: Floats) -> Scores:
    return Scores(times, np.zeros_like(times), np.ones_like(times), np.ones_like(times))


def _compilation(table: StepTable, scored: Scored) -> list[Finding]:
    findings = []
    for begin, end in pairwise((0, *table.restarts, len(table))):
        count = int(np.argmin(np.append(scored.cold[begin:end], False)))
        if not count:
            continue
        last = begin + count - 1
        worst = begin + int(np.argmax(table.seconds[begin : last + 1]))
        seconds, expected = float(table.seconds[worst]), float(scored.step.expected[worst])
        z = float(scored.step.z[worst])
        if seconds < _COMPILE_FACTOR * expected or severity(z) is None:
            continue  # the first step of a short part, cold by precaution alone
        evidence = (
            f"the first {'step' if count == 1 else f'{count} steps'}{' after a resume' if begin else ''} took up to"
            f" {seconds / expected:.1f}x the steps after (shaders compile, caches fill)"
        )
        first_step, last_step, step = (int(table.step[row]) for row in (begin, last, worst))
        findings.append(
            Finding(COMPILE, first_step, last_step, step, "step", seconds, expected, z, severity(z), evidence)
        )
    return findings


def _single_steps(table: StepTable, times: Scores, kinds: Scores, free: Mask) -> list[Finding]:
    """Steps in the mask `free`, or kinds of span that matter to their step, that are over their baseline."""
    step_z = np.where(free, times.z, 0.0)
    material = kinds.excess >= MATERIAL * times.scale[:, None]
    kind_z = np.where(material & free[:, None], kinds.z, 0.0)
    top = kind_z.max(axis=1, initial=0.0)
    rows = np.flatnonzero((step_z >= NOTICED_AT) | (top >= ALARM_AT))
    return [causes.of_step(table, times, kinds, int(row)) for row in rows]
