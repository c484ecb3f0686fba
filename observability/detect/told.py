"""What the live detector told, held against what the whole run shows: confirmed, or withdrawn with the reason.

Live, only what came before a step is known. The report knows all of the run, so it may think better of a line; it never
passes over one in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from observability.detect.detector import Scored
from observability.detect.findings import ALARM_AT, CAUSES, INTERFERENCE, Finding, duration
from observability.read import Ints, StepTable, Told

CONFIRMED: Final = "confirmed"
WITHDRAWN: Final = "withdrawn"


@dataclass(frozen=True)
class Judged:
    """One thing that was told live; `reason` says why it is withdrawn, or as what it is confirmed."""

    told: Told
    status: str
    reason: str

    @property
    def place(self) -> str:
        told = self.told
        if told.first_step == told.last_step:
            return f"step {told.first_step:,}"
        return f"steps {told.first_step:,} to {told.last_step:,}"

    def to_json(self) -> dict[str, Any]:
        told = self.told
        return {
            "cause": told.cause,
            "severity": told.severity,
            "first_step": told.first_step,
            "last_step": told.last_step,
            "evidence": told.evidence,
            "status": self.status,
            "reason": self.reason,
        }


def judge_told(table: StepTable, findings: list[Finding], scored: Scored) -> list[Judged]:
    """Every anomaly that was told live, in order."""
    return [_judge(told, table, findings, scored) for told in table.told]


def _judge(told: Told, table: StepTable, findings: list[Finding], scored: Scored) -> Judged:
    alike = [f for f in findings if f.first_step <= told.last_step and f.last_step >= told.first_step]
    alarms = [f for f in alike if f.is_alarm]
    same = [f for f in alarms if f.cause == told.cause]
    if same:
        return Judged(told, CONFIRMED, "")
    if alarms:
        named = max(alarms, key=lambda f: min(f.last_step, told.last_step) - max(f.first_step, told.first_step))
        return Judged(told, CONFIRMED, f"as {named.cause}: {named.evidence}")
    return Judged(told, WITHDRAWN, _reason(told, alike, table, scored))


def _reason(told: Told, alike: list[Finding], table: StepTable, scored: Scored) -> str:
    """Why the report does not say what was told."""
    rows = np.arange(*np.searchsorted(table.step, (told.first_step, told.last_step + 1)))
    if not len(rows):
        return "the trace has no such step"
    for finding in alike:
        if finding.severity is None:
            what = "priced with the rest of it" if finding.cause == INTERFERENCE else "explained"
            return f"{what}, {CAUSES[finding.cause]}: {finding.evidence}"
    if np.all(scored.cold[rows]):
        return "these first steps compile, and count for no baseline"
    for finding in alike:
        return f"over the whole run it is only {finding.z:.1f}σ, below an alarm ({ALARM_AT:.0f}σ)"
    if len(rows) == 1:
        return _one_step(told, int(rows[0]), table, scored)
    return _stretch(rows, table)


def _one_step(told: Told, row: int, table: StepTable, scored: Scored) -> str:
    labels = [kind.label for kind in table.kinds]
    if told.span in labels:
        kind = labels.index(told.span)
        seconds, expected, z = (
            float(part[row, kind]) for part in (table.durations, scored.kinds.expected, scored.kinds.z)
        )
        what = told.span
    else:
        seconds, expected, z = (float(part[row]) for part in (table.seconds, scored.step.expected, scored.step.z))
        what = "it"
    return f"over the whole run {what} is {duration(seconds)} where {duration(expected)} is usual: {z:.1f}σ"


def _stretch(rows: Ints, table: StepTable) -> str:
    others = np.ones(len(table), dtype=bool)
    others[rows] = False
    now = float(np.median(table.seconds[rows]))
    if not others.any():
        return f"the whole run is like that ({duration(now)} a step), so it is what is normal"
    rest = float(np.median(table.seconds[others]))
    return (
        f"these steps take {duration(now)} and the others {duration(rest)}, which is within what levels of this run"
        " do on their own"
    )
