"""Alarms as events, matched to the faults that were put in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.detection.faults import Fault
from observability.detect.findings import COMPILE, LONGER_BATCH, Finding

_NEAR = 3  # steps: alarms so close are one event, and an alarm so close to a fault is its
_SUSTAINED = 30  # steps: a fault at least so long may be dated by up to that much wrongly


@dataclass(frozen=True)
class Event:
    """One alarm, or alarms close together, on rows `first` to `last`; `causes` maps each cause named to its steps."""

    first: int
    last: int
    causes: dict[str, int]


@dataclass
class Tally:
    """Counts over runs; rates follow from them."""

    faults: int = 0
    found: int = 0
    cause_right: int = 0
    false_alarms: int = 0
    clean_steps: int = 0
    decoys: int = 0
    decoys_flagged: int = 0
    misses: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for name in ("faults", "found", "cause_right", "false_alarms", "clean_steps", "decoys", "decoys_flagged"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.misses += other.misses

    def figures(self) -> dict[str, float]:
        """For JSON: the counts and the rates."""
        counts = {name: value for name, value in vars(self).items() if name != "misses"}
        rates = {"f1": self.f1, "cause_rate": self.cause_rate, "false_per_thousand": self.false_per_thousand}
        return counts | {name: round(value, 4) for name, value in rates.items()}

    @property
    def f1(self) -> float:
        """Harmonic mean of recall (faults found) and precision (events that were faults)."""
        wrong = self.false_alarms + self.decoys_flagged
        return 2 * self.found / max(self.found + wrong + self.faults, 1)

    @property
    def cause_rate(self) -> float:
        return self.cause_right / max(self.found, 1)

    @property
    def false_per_thousand(self) -> float:
        return 1000 * self.false_alarms / max(self.clean_steps, 1)


def events_of(findings: Sequence[Finding]) -> list[Event]:
    """Alarms (medium severity and up) as events in rows; steps of the benchmark's runs are numbered from 1."""
    alarms = [f for f in findings if f.is_alarm and f.cause != COMPILE]
    return merged([(f.first_step - 1, f.last_step - 1, f.cause) for f in alarms])


def merged(spans: list[tuple[int, int, str]]) -> list[Event]:
    """Events from (first row, last row, cause); what is close together becomes one."""
    events: list[Event] = []
    for first, last, cause in sorted(spans):
        if events and first <= events[-1].last + _NEAR:
            before = events.pop()
            causes = dict(before.causes)
            causes[cause] = causes.get(cause, 0) + last - first + 1
            events.append(Event(before.first, max(before.last, last), causes))
        else:
            events.append(Event(first, last, {cause: last - first + 1}))
    return events


def tally(events: Sequence[Event], faults: Sequence[Fault], rows: int, name: str = "") -> Tally:
    """Each fault is found when an event overlaps it; each event that overlaps no fault is a false alarm."""
    result = Tally(clean_steps=rows - sum(fault.last - fault.first + 1 for fault in faults))
    matched: set[int] = set()
    for fault in faults:
        slack = _SUSTAINED if fault.last - fault.first >= _SUSTAINED else _NEAR
        hits = [i for i, e in enumerate(events) if e.first <= fault.last + slack and e.last >= fault.first - slack]
        matched.update(hits)
        if fault.cause == LONGER_BATCH:
            result.decoys += 1
            result.decoys_flagged += bool(hits)
            continue
        result.faults += 1
        result.found += bool(hits)
        named: dict[str, int] = {}
        for i in hits:
            for cause, steps in events[i].causes.items():
                named[cause] = named.get(cause, 0) + steps
        best = max(named, key=lambda cause: named[cause]) if named else "nothing"
        result.cause_right += best == fault.cause
        if best != fault.cause:
            result.misses.append(f"{name}: {fault.cause} at {fault.first}-{fault.last}: {best}")
    result.false_alarms = len(events) - len(matched)
    return result
