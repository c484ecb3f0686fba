"""A whole trace analysed: steps, findings and clusters, with the verdict in words and the JSON form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from observability.detect.clusters import Clusters, cluster_steps
from observability.detect.detector import LEAST_STEPS, Scored, detect
from observability.detect.findings import (
    CAUSES,
    COMPILE,
    LOSS_SPIKE,
    PERIODIC,
    SKIPPED_STEP,
    Finding,
    duration,
    number_of_steps,
)
from observability.read import PAUSES, Floats, Ints, SpanTable, StepTable, printable, read_trace, step_table

_MOST_OF_A_PAUSE: Final = 0.5  # of the typical one: steps so much over have the pause that comes back


@dataclass(frozen=True)
class Loss:
    """What an alarm cost: `seconds`, and the numbers of the `steps` that it is about.

    A pause may belong to a step that the table lacks: the evaluation before the first one has number 0.
    """

    steps: Ints
    seconds: float


@dataclass(frozen=True)
class Analysis:
    """What is known of one run. `source` is where its trace came from."""

    source: str
    spans: SpanTable
    table: StepTable
    findings: list[Finding]
    scored: Scored
    clusters: Clusters

    @cached_property
    def losses(self) -> dict[Finding, Loss]:
        """By alarm."""
        return _losses(self)

    @property
    def anomalies(self) -> list[Finding]:
        """Findings of low severity and up, one for each step or sustained stretch, in order."""
        return [finding for finding in self.findings if finding.severity is not None]

    @property
    def alarms(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_alarm]

    @property
    def explained(self) -> list[Finding]:
        """What looks odd and is not: longer batches, routine checkpoints that cost much."""
        return [finding for finding in self.findings if finding.severity is None]

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": len(self.table),
            "anomalies": [finding.anomaly() for finding in self.anomalies],
            "causes": [finding.explanation() for finding in self.findings if finding.is_alarm or not finding.severity],
            "clusters": self.clusters.to_json(),
            "notes": list(self.table.notes),
        }


def analyse(source: str | Path, k: int | None = None) -> Analysis:
    """Reads and analyses a run folder, trace file or Jaeger address; `k` sets the number of clusters.

    Raises TraceError when there is nothing to analyse.
    """
    spans = read_trace(source)
    table = step_table(spans, str(source))
    findings, scored = detect(table)
    return Analysis(printable(str(source)), spans, table, findings, scored, cluster_steps(table, scored.cold, k))


def verdict(analysis: Analysis) -> str:
    """One sentence: is this run healthy?"""
    table, alarms = analysis.table, analysis.alarms
    typical = duration(float(np.median(table.seconds)))
    ran = f"{number_of_steps(len(table))} of typically {typical}"
    if len(table) < LEAST_STEPS:
        return f"{ran}: too few to tell normal from slow."
    if not alarms:
        low = len(analysis.anomalies)
        return f"Healthy: {ran}, nothing out of the ordinary" + (f" but {low} slightly slow." if low else ".")
    lost = time_lost(analysis)
    total = table.total_seconds
    steps = len(np.unique(np.concatenate([analysis.losses[finding].steps for finding in alarms])))
    worst = max(by_cause(alarms).items(), key=lambda item: sum(lost_in(analysis, f) for f in item[1]))
    head = f"{ran}; {steps:,} of them out of the ordinary"
    return f"{head}, costing {duration(lost)} ({lost / total:.1%} of the run), most of it through {CAUSES[worst[0]]}."


def by_cause(findings: list[Finding]) -> dict[str, list[Finding]]:
    result: dict[str, list[Finding]] = {}
    for finding in findings:
        result.setdefault(finding.cause, []).append(finding)
    return result


def lost_in(analysis: Analysis, finding: Finding) -> float:
    """Seconds that a finding cost: what its steps took beyond what they should have. What is no alarm costs nothing."""
    return analysis.losses[finding].seconds if finding.is_alarm else 0.0


def time_lost(analysis: Analysis) -> float:
    return sum(lost_in(analysis, finding) for finding in analysis.alarms)


def _losses(analysis: Analysis) -> dict[Finding, Loss]:
    """A second of a step counts once, for the alarm on the fewest steps: a stall within a slow stretch is a stall."""
    table = analysis.table
    counted = np.zeros(len(table))
    result = {}
    for finding in sorted(analysis.alarms, key=lambda f: f.last_step - f.first_step):
        rows = np.arange(*np.searchsorted(table.step, (finding.first_step, finding.last_step + 1)))
        if finding.cause in (LOSS_SPIKE, SKIPPED_STEP):
            result[finding] = Loss(table.step[rows], 0.0)
        elif finding.span in PAUSES:
            result[finding] = Loss(np.array([finding.step]), max(finding.seconds - finding.expected, 0.0))
        else:
            over = _over(analysis, finding, rows)
            if finding.cause == PERIODIC:
                own = over >= _MOST_OF_A_PAUSE * (finding.seconds - finding.expected)
                rows, over = rows[own], over[own]
            over = np.maximum(over - counted[rows], 0.0)
            counted[rows] += over
            result[finding] = Loss(table.step[rows], float(np.sum(over)))
    return result


def _over(analysis: Analysis, finding: Finding, rows: Ints) -> Floats:
    """Seconds beyond the moving baseline or, on a stretch that this has followed, beyond what the finding expects."""
    table, scored = analysis.table, analysis.scored
    if finding.first_step == finding.last_step or finding.cause in (COMPILE, PERIODIC):
        return scored.step.excess[rows]
    labels = [kind.label for kind in table.kinds]
    if finding.span not in labels:
        return table.seconds[rows] - finding.expected * scored.step.factor[rows]
    kind = labels.index(finding.span)
    return table.durations[rows, kind] - finding.expected * scored.kinds.factor[rows, kind]
