"""A whole trace analysed: steps, findings and clusters, with the verdict in words and the JSON form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from observability import schema
from observability.clusters import Clusters, cluster_steps
from observability.detect import LEAST_STEPS, Scored, detect
from observability.findings import CAUSES, COMPILE, LOSS_SPIKE, PERIODIC, SKIPPED_STEP, Finding, duration
from observability.otlp_read import read_trace
from observability.spans import SpanTable
from observability.steps import StepTable, step_table


@dataclass(frozen=True)
class Analysis:
    """What is known of one run. `source` is where its trace came from."""

    source: str
    spans: SpanTable
    table: StepTable
    findings: list[Finding]
    scored: Scored
    clusters: Clusters

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
    return Analysis(str(source), spans, table, findings, scored, cluster_steps(table, scored.cold, k))


def verdict(analysis: Analysis) -> str:
    """One sentence: is this run healthy?"""
    table, alarms = analysis.table, analysis.alarms
    typical = duration(float(np.median(table.seconds)))
    ran = f"{len(table):,} {'step' if len(table) == 1 else 'steps'} of typically {typical}"
    if len(table) < LEAST_STEPS:
        return f"{ran}: too few to tell normal from slow."
    if not alarms:
        low = len(analysis.anomalies)
        return f"Healthy: {ran}, nothing out of the ordinary" + (f" but {low} slightly slow." if low else ".")
    lost = time_lost(analysis)
    total = table.total_seconds
    steps = len({step for finding in alarms for step in range(finding.first_step, finding.last_step + 1)})
    worst = max(by_cause(alarms).items(), key=lambda item: sum(lost_in(analysis, f) for f in item[1]))
    head = f"{ran}; {steps:,} of them out of the ordinary"
    return f"{head}, costing {duration(lost)} ({lost / total:.1%} of the run), most of it through {CAUSES[worst[0]]}."


def by_cause(findings: list[Finding]) -> dict[str, list[Finding]]:
    result: dict[str, list[Finding]] = {}
    for finding in findings:
        result.setdefault(finding.cause, []).append(finding)
    return result


def lost_in(analysis: Analysis, finding: Finding) -> float:
    """Seconds that a finding cost: what its steps took beyond what they should have."""
    if finding.cause in (LOSS_SPIKE, SKIPPED_STEP):
        return 0.0
    if finding.span in (schema.CHECKPOINT, schema.EVAL):
        return max(finding.seconds - finding.expected, 0.0)
    table = analysis.table
    rows = (table.step >= finding.first_step) & (table.step <= finding.last_step)
    if finding.first_step == finding.last_step or finding.cause == COMPILE:
        return float(np.sum(np.maximum(analysis.scored.step.excess[rows], 0.0)))
    if finding.cause == PERIODIC:
        count = max(int(np.sum(analysis.scored.step.z[rows] > 1)), 1)
    elif finding.span == schema.STEP:
        return float(np.sum(np.maximum(table.seconds[rows] - finding.expected, 0.0)))
    else:
        count = int(np.sum(rows))
    return count * max(finding.seconds - finding.expected, 0.0)


def time_lost(analysis: Analysis) -> float:
    return sum(lost_in(analysis, finding) for finding in analysis.alarms)
