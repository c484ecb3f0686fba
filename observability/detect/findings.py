"""What the detector says: findings, their severity and their causes by name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

DATA_STALL: Final = "data-stall"
CHECKPOINT_STALL: Final = "checkpoint-stall"
SLOW_KERNEL: Final = "slow-kernel"
THROTTLE: Final = "throttle"
PERIODIC: Final = "periodic"
SPIKE: Final = "spike"
DRIFT: Final = "drift"
COMPILE: Final = "compile"
LONGER_BATCH: Final = "longer-batch"
MEMORY_PRESSURE: Final = "memory-pressure"
LOSS_SPIKE: Final = "loss-spike"
SKIPPED_STEP: Final = "skipped-step"
INTERFERENCE: Final = "interference"
BETWEEN_STEPS: Final = "between-steps"
DIVERGENCE: Final = "divergence"

# In words, as the report's headings have them.
CAUSES: Final = {
    DATA_STALL: "waiting for data",
    CHECKPOINT_STALL: "slow checkpoint writes",
    SLOW_KERNEL: "one slow kernel or layer",
    THROTTLE: "sustained slowdown",
    PERIODIC: "a pause that comes back",
    SPIKE: "single slow steps",
    DRIFT: "steps getting slower and slower",
    COMPILE: "first-step compilation",
    LONGER_BATCH: "longer batches",
    MEMORY_PRESSURE: "memory pressure",
    LOSS_SPIKE: "spikes of loss or gradient",
    SKIPPED_STEP: "skipped steps",
    INTERFERENCE: "other programs, or the process held up",
    BETWEEN_STEPS: "time between steps",
    DIVERGENCE: "training that diverged",
}

LOW: Final = "low"
MEDIUM: Final = "medium"
HIGH: Final = "high"
NOTICED_AT: Final = 3.0
ALARM_AT: Final = 4.0
_HIGH_AT: Final = 5.0


@dataclass(frozen=True)
class Finding:
    """One anomaly, or one explained peculiarity (`severity` None), on steps `first_step` to `last_step`.

    `span` names the kind of span at fault ("step" where no single one is), `seconds` its time in the worst step (the
    typical one of a sustained slowdown), `expected` what it should have taken, `z` how many sigmas lie between.
    """

    cause: str
    first_step: int
    last_step: int
    step: int
    span: str
    seconds: float
    expected: float
    z: float
    severity: str | None
    evidence: str
    cost: float | None = None  # seconds lost, where that is more than its worst step tells

    @property
    def is_alarm(self) -> bool:
        return self.severity in (MEDIUM, HIGH)

    def anomaly(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "span": self.span,
            "duration_seconds": self.seconds,
            "z": round(self.z, 2) if math.isfinite(self.z) else None,
            "severity": self.severity,
            "cause": self.cause,
            "evidence": self.evidence,
        }

    def explanation(self) -> dict[str, Any]:
        return {
            "cause": self.cause,
            "first_step": self.first_step,
            "last_step": self.last_step,
            "evidence": self.evidence,
        }


def in_a_row(findings: Iterable[Finding]) -> list[Finding]:
    """`findings` in order of steps, those for one cause and span on neighbouring steps as one, for people to read.

    It is the worst of them, over all their steps.
    """
    groups: list[list[Finding]] = []
    for finding in sorted(findings, key=lambda f: (f.cause, f.span, f.first_step)):
        before = groups[-1][-1] if groups else None
        alike = before is not None and (before.cause, before.span) == (finding.cause, finding.span)
        if before is not None and alike and finding.first_step == finding.last_step == before.last_step + 1:
            groups[-1].append(finding)
        else:
            groups.append([finding])
    return sorted(map(_as_one, groups), key=lambda f: f.first_step)


def _as_one(group: list[Finding]) -> Finding:
    worst = max(group, key=lambda f: f.z)
    if len(group) == 1:
        return worst
    evidence = f"{worst.evidence}; the worst of {len(group)} in a row"
    return replace(worst, first_step=group[0].first_step, last_step=group[-1].last_step, evidence=evidence)


def severity(z: float) -> str | None:
    """low from 3 sigmas, medium from 4, high from 5; None below."""
    if not z >= NOTICED_AT:
        return None
    return LOW if z < ALARM_AT else MEDIUM if z < _HIGH_AT else HIGH


def duration(seconds: float) -> str:
    """Seconds for people: 412 ms, 1.84 s, 57 µs, 17.6 min."""
    if abs(seconds) >= 600:
        return f"{seconds / 3600:.3g} h" if abs(seconds) >= 7200 else f"{seconds / 60:.3g} min"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}" if abs(seconds) < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def number_of_steps(count: int) -> str:
    """1 step, 1,203 steps."""
    return f"{count:,} {'step' if count == 1 else 'steps'}"


def size(count: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError
