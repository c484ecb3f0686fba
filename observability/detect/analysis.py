"""A whole trace analysed: steps, findings and clusters, with the verdict in words and the JSON form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from observability import schema
from observability.detect import host
from observability.detect.causes import waited_for
from observability.detect.clusters import Clusters, cluster_steps
from observability.detect.detector import LEAST_STEPS, Scored, detect
from observability.detect.findings import (
    BETWEEN_STEPS,
    CAUSES,
    COMPILE,
    DIVERGENCE,
    INTERFERENCE,
    LOSS_SPIKE,
    PERIODIC,
    SKIPPED_STEP,
    Finding,
    duration,
    number_of_steps,
)
from observability.detect.told import Judged, judge_told
from observability.read import PAUSES, Floats, Ints, SpanTable, StepTable, printable, read_steps, whole

JSON_SCHEMA: Final = "entrenar-report/2"  # raised when a key changes its meaning or goes; keys may be added
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
    spans: SpanTable | int  # how many, of a long run
    table: StepTable
    findings: list[Finding]
    scored: Scored
    clusters: Clusters

    @property
    def span_count(self) -> int:
        return self.spans if isinstance(self.spans, int) else len(self.spans)

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

    @cached_property
    def judged(self) -> list[Judged]:
        """What was told while the run trained, confirmed or withdrawn."""
        return judge_told(self.table, self.findings, self.scored)

    @property
    def explained(self) -> list[Finding]:
        """What looks odd and is not: longer batches, routine checkpoints that cost much."""
        return [finding for finding in self.findings if finding.severity is None]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": JSON_SCHEMA,
            "run": str(self.table.facts.get(schema.RUN_ID, "")),
            "outcome": outcome(self) or None,
            "verdict": verdict(self),
            "steps": len(self.table),
            "typical_step_seconds": float(np.median(self.table.seconds)),
            "total_seconds": self.table.total_seconds,
            "time_lost_seconds": time_lost(self),
            "anomalies": [finding.anomaly() for finding in self.anomalies],
            "causes": [finding.explanation() for finding in self.findings if finding.is_alarm or not finding.severity],
            "told_live": [judged.to_json() for judged in self.judged],
            "clusters": self.clusters.to_json(),
            "notes": list(self.table.notes),
        }


def analyse(source: str | Path, k: int | None = None) -> Analysis:
    """Reads and analyses a run folder, trace file or Jaeger address; `k` sets the number of clusters.

    Raises TraceError when there is nothing to analyse.
    """
    table, spans = read_steps(source)
    findings, scored = detect(table)
    return Analysis(printable(str(source)), spans, table, findings, scored, cluster_steps(table, scored.cold, k))


def outcome(analysis: Analysis) -> str:
    """How the run ended, in words, where it did not end as planned; "" for a finished one and where nothing tells."""
    facts, last = analysis.table.facts, int(analysis.table.step[-1])
    status, total = str(facts.get(schema.RUN_STATUS, "")), whole(facts.get(schema.RUN_TOTAL_STEPS), 0)
    at = f"at step {last:,} of {total:,}" if total else f"at step {last:,}"
    if status.startswith("failed"):
        reason = status.removeprefix("failed").removeprefix(":").strip()
        return f"Failed {at}" + (f": {reason}" if reason else "")
    if status and status != "finished":
        return f"{status.capitalize()} {at}"
    if total and not status:
        return f"Unfinished: the trace ends {at}, and the run has not told its end (it goes on, or was killed)"
    if status == "finished" and last < total:
        return f"Unfinished: called finished {at}"
    return ""


def verdict(analysis: Analysis) -> str:
    """Is this run healthy? First how it ended, where that is not as planned, and whether it diverged."""
    table, alarms = analysis.table, analysis.alarms
    ended = [outcome(analysis)] if outcome(analysis) else []
    ended += [f"Diverged: {finding.evidence}" for finding in alarms if finding.cause == DIVERGENCE]
    first = "".join(f"{sentence}. " for sentence in ended)
    typical = duration(float(np.median(table.seconds)))
    ran = f"{number_of_steps(len(table))} of typically {typical}"
    if len(table) < LEAST_STEPS and not alarms:
        return f"{first}{ran}: too few to tell normal from slow."
    if host.too_short(table) and not alarms:
        return f"{first}{ran}: too few to tell slow steps from what other programs do here all the time."
    lost, total = time_lost(analysis), table.total_seconds
    share = f"{duration(lost)} ({lost / total:.1%} of the run)"
    if not alarms:
        low = len(analysis.anomalies)
        if lost > 0:
            worst = max(analysis.losses.items(), key=lambda item: item[1].seconds)[0]
            return f"{first}{ran}; {share} went to {CAUSES[worst.cause]}."
        word = f"{ran}, nothing out of the ordinary" + (f" but {low} slightly slow." if low else ".")
        return first + (word if ended else f"Healthy: {word}")
    steps = len(np.unique(np.concatenate([analysis.losses[finding].steps for finding in alarms])))
    head = f"{first}{ran}; {steps:,} of them out of the ordinary"
    costs = {cause: sum(lost_in(analysis, f) for f in group) for cause, group in by_cause(alarms).items()}
    lost = sum(costs.values())
    explained = _explained_loss(analysis, total)
    if lost <= 0:
        named = dict.fromkeys(CAUSES[finding.cause] for finding in alarms)
        return f"{head}: {', '.join(named)}.{explained}"
    share = f"{duration(lost)} ({lost / total:.1%} of the run)"
    dearest = CAUSES[max(costs, key=lambda cause: costs[cause])]
    return f"{head}, costing {share}, most of it through {dearest}.{explained}"


def _explained_loss(analysis: Analysis, total: float) -> str:
    """A sentence on what was lost beside the alarms to what is no anomaly, "" where nothing was."""
    costs = {finding: loss.seconds for finding, loss in analysis.losses.items() if not finding.is_alarm}
    lost = sum(costs.values())
    if lost <= 0:
        return ""
    worst = CAUSES[max(costs, key=lambda finding: costs[finding]).cause]
    return f" A further {duration(lost)} ({lost / total:.1%}) went to {worst}."


def by_cause(findings: list[Finding]) -> dict[str, list[Finding]]:
    result: dict[str, list[Finding]] = {}
    for finding in findings:
        result.setdefault(finding.cause, []).append(finding)
    return result


def lost_in(analysis: Analysis, finding: Finding) -> float:
    """Seconds that a finding cost: what its steps took beyond what they should have. What is explained costs nothing,
    but for what other programs took and what passed between steps."""
    return analysis.losses[finding].seconds if finding in analysis.losses else 0.0


def time_lost(analysis: Analysis) -> float:
    return sum(loss.seconds for loss in analysis.losses.values())


def _losses(analysis: Analysis) -> dict[Finding, Loss]:
    """A second of a step counts once, for the alarm on the fewest steps: a stall within a slow stretch is a stall."""
    table = analysis.table
    counted = np.zeros(len(table))
    result = {}
    priced = [finding for finding in analysis.explained if finding.cost is not None]
    for finding in [*sorted(analysis.alarms, key=lambda f: f.last_step - f.first_step), *priced]:
        rows = np.arange(*np.searchsorted(table.step, (finding.first_step, finding.last_step + 1)))
        if finding.cause in (LOSS_SPIKE, SKIPPED_STEP, DIVERGENCE):
            result[finding] = Loss(table.step[rows], 0.0)
        elif finding.cause == BETWEEN_STEPS or (finding.span in PAUSES and finding.cost is not None):
            result[finding] = Loss(table.step[rows], finding.cost or 0.0)
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
    if finding.cause == INTERFERENCE and not finding.is_alarm:
        lost, _ = waited_for(table, scored.step)
        return lost[rows]
    if finding.first_step == finding.last_step or finding.cause in (COMPILE, PERIODIC):
        return scored.step.excess[rows]
    labels = [kind.label for kind in table.kinds]
    if finding.span not in labels:
        return table.seconds[rows] - finding.expected * scored.step.factor[rows]
    kind = labels.index(finding.span)
    return table.durations[rows, kind] - finding.expected * scored.kinds.factor[rows, kind]
