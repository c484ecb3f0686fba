"""The detector: from a table of steps to findings, each with its cause and the evidence for it.

Order matters, as each stage takes its steps away from the next: first-step compilation, slowdowns that stay, pauses
that come back, single steps. Times are corrected for the work of a step before any of them, so a longer batch is
explained, not flagged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from observability import causes, health
from observability.baseline import Mask, Scores, core_scale, noise_scale, pools_of, relative_work, score
from observability.findings import ALARM_AT, COMPILE, NOTICED_AT, Finding, severity
from observability.periodic import find_period
from observability.spans import Floats
from observability.steps import StepTable
from observability.sustained import Shift, find_shifts

LEAST_STEPS: Final = 8  # fewer say nothing about what is normal
_WARM_UP: Final = 10  # steps at most
_COMPILE_FACTOR: Final = 1.5  # a first step that compiles takes at least so many times the typical step
MATERIAL: Final = 3.0  # sigmas of the step by which a kind of span must be over to matter to the step
_PLAIN_AT: Final = 6.0  # sigmas at which a kind of span so plainly explains a step that the step is no one's noise


@dataclass(frozen=True)
class Scored:
    """Every time of a run against its baseline: `step` [steps], `kinds` [steps, kinds], work [steps]."""

    step: Scores
    kinds: Scores
    work: Floats
    warm_up: int


def detect(table: StepTable) -> tuple[list[Finding], Scored]:
    """Findings in order of their first step, and the scores they rest on. Both are empty for very short runs."""
    work = relative_work(table)
    warm_up = warm_up_steps(table.seconds)
    body = slice(warm_up, len(table))
    if len(table) - warm_up < LEAST_STEPS:
        return health.findings(table), _unscored(table, work, warm_up)
    seconds, pools = table.seconds[body], pools_of(table)
    times = score(seconds, work[body])
    kinds = score(table.durations[body], work[body], pools=pools)
    plain = plainly_explained(times, kinds)
    # A burst of steps that one layer explains is no slowdown of the run.
    shifts = find_shifts(np.where(plain, times.expected, seconds) / times.factor)
    core = max(core_scale(times.excess), 1e-9)
    period = find_period(np.where(_outside(shifts, len(seconds)), times.excess, 0.0) / core)
    taken = np.zeros(len(seconds), dtype=bool)
    if period is not None:
        taken[period.rows] = True
        kinds = score(table.durations[body], work[body], taken, pools)
    times = score(seconds, work[body], taken | plain)
    scored = Scored(_padded(times, table.seconds, warm_up), _padded(kinds, table.durations, warm_up), work, warm_up)

    findings = _compilation(table, scored)
    findings += [causes.of_shift(table, scored.kinds, shift, warm_up) for shift in shifts]
    if period is not None:
        finding = causes.of_period(table, scored.step, scored.kinds, period, warm_up)
        if finding is not None:
            findings.append(finding)
        else:
            taken[:] = False
    free = np.concatenate([np.zeros(warm_up, dtype=bool), ~taken])
    findings += _single_steps(table, scored, free)
    findings += causes.longer_batches(table, scored.step, work, warm_up)
    findings += causes.of_pauses(table, float(np.median(scored.step.scale)))
    findings += health.findings(table)
    return sorted(findings, key=lambda finding: finding.first_step), scored


def plainly_explained(times: Scores, kinds: Scores) -> Mask:
    """Steps that one kind of span was so slow in that nothing else need be asked."""
    core = max(core_scale(times.excess), 1e-9)
    result: Mask = np.any((kinds.z >= _PLAIN_AT) & (kinds.excess >= _PLAIN_AT * core), axis=1)
    return result


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


def _padded(scores: Scores, times: Floats, warm_up: int) -> Scores:
    """Scores of the body with the warm-up in front, held against the first expectation after it."""
    if not warm_up:
        return scores

    def padded(values: Floats) -> Floats:
        return np.concatenate([np.repeat(values[:1], warm_up, axis=0), values])

    expected = padded(scores.expected)
    return Scores(expected, times - expected, padded(scores.scale), padded(scores.factor))


def _unscored(table: StepTable, work: Floats, warm_up: int) -> Scored:
    def flat(times: Floats) -> Scores:
        return Scores(times, np.zeros_like(times), np.ones_like(times), np.ones_like(times))

    return Scored(flat(table.seconds), flat(table.durations), work, warm_up)


def _compilation(table: StepTable, scored: Scored) -> list[Finding]:
    if not scored.warm_up:
        return []
    last = scored.warm_up - 1
    worst = int(np.argmax(table.seconds[: last + 1]))
    seconds, expected = float(table.seconds[worst]), float(scored.step.expected[worst])
    z = float(scored.step.z[worst])
    evidence = (
        f"the first {'step' if last == 0 else f'{last + 1} steps'} took up to {seconds / expected:.1f}x the steps after"
        " (shaders compile, caches fill)"
    )
    step = int(table.step[worst])
    first, end = int(table.step[0]), int(table.step[last])
    return [Finding(COMPILE, first, end, step, "step", seconds, expected, z, severity(z), evidence)]


def _single_steps(table: StepTable, scored: Scored, free: Mask) -> list[Finding]:
    """Steps, or kinds of span that matter to their step, that are over their baseline."""
    step_z = np.where(free, scored.step.z, 0.0)
    material = scored.kinds.excess >= MATERIAL * scored.step.scale[:, None]
    kind_z = np.where(material & free[:, None], scored.kinds.z, 0.0)
    top = kind_z.max(axis=1, initial=0.0)
    rows = np.flatnonzero((step_z >= NOTICED_AT) | (top >= ALARM_AT))
    return [causes.of_step(table, scored.step, scored.kinds, int(row)) for row in rows]
