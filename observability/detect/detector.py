"""The detector: from a table of steps to findings, each with its cause and the evidence for it.

First-step compilation, then the stages of stages.py on what is left, pauses and the health of the training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np

from observability.detect import causes, health
from observability.detect.baseline import Mask, Scores, noise_scale
from observability.detect.findings import ALARM_AT, COMPILE, LOW, SLOW_KERNEL, SPIKE, Finding, severity
from observability.detect.stages import STAGES, Body
from observability.read import Floats, StepTable

LEAST_STEPS: Final = 8  # fewer say nothing about what is normal
_WARM_UP: Final = 10  # steps at most
_COMPILE_FACTOR: Final = 1.5  # a first step that compiles takes at least so many times the typical step


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
        findings = [*health.findings(table), *causes.between_steps(table)]
        return findings, Scored(_unscored(table.seconds), _unscored(table.durations), cold)
    findings, times, kinds = _timed(body)
    findings = [_of_first_step(table, finding) for finding in findings]
    scored = Scored(_placed(times, table.seconds, cold), _placed(kinds, table.durations, cold), cold)
    findings += _compilation(table, scored)
    findings += causes.of_pauses(table, float(np.median(times.scale)))
    findings += causes.between_steps(table)
    findings += causes.interference(table, scored.step)
    findings += health.findings(table)
    return sorted(findings, key=lambda finding: finding.first_step), scored


def _timed(table: StepTable) -> tuple[list[Finding], Scores, Scores]:
    """Findings on the time of steps, and the scores of steps and of kinds of span."""
    body = Body(table)
    findings = [finding for stage in STAGES for finding in stage.find(body)]
    return findings, body.times, body.kinds


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


def _of_first_step(table: StepTable, finding: Finding) -> Finding:
    """Of low severity where the very first step, or that after a resume, was slow by less than compiling takes."""
    first = finding.last_step in (int(table.step[row]) for row in (0, *table.restarts))
    alone = first and finding.cause in (SPIKE, SLOW_KERNEL) and finding.first_step == finding.last_step
    return replace(finding, severity=LOW) if alone else finding


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
