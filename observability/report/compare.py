"""Two runs held against each other: step by step, and by kind of span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from observability.detect import MAD_TO_SIGMA, duration
from observability.read import Floats, Ints, StepTable

_LEAST_CHANGE: Final = 0.03  # of a kind's time
_LEAST_SHARE: Final = 0.002  # of the step's time: smaller changes are nobody's business
_SURE_AT: Final = 4.0  # sigmas of the difference of two medians
_MEDIAN_ERROR: Final = 1.2533  # standard error of a median over that of a mean, for a Gaussian


@dataclass(frozen=True)
class Change:
    """A kind of span whose typical seconds a step went from `before` (the other run) to `after` (this run)."""

    level: str
    label: str
    before: float
    after: float
    z: float

    @property
    def text(self) -> str:
        if not self.before:
            return f"{self.label}: new, {duration(self.after)} a step"
        if not self.after:
            return f"{self.label}: gone, was {duration(self.before)} a step"
        return f"{self.label}: {duration(self.before)} to {duration(self.after)} ({self.after / self.before - 1:+.1%})"


@dataclass(frozen=True)
class Comparison:
    """This run against another, over the `steps` that both have; seconds and losses by common step."""

    other: str
    steps: Ints
    seconds: Floats
    other_seconds: Floats
    loss: Floats
    other_loss: Floats
    step_change: Change
    changes: list[Change]

    def verdict(self) -> str:
        if not len(self.steps):
            return f"no step number stands in both this run and {self.other}"
        ratio = self.step_change.after / self.step_change.before
        if abs(self.step_change.z) < _SURE_AT or abs(ratio - 1) < _LEAST_CHANGE / 3:
            speed = "as fast as"
        else:
            speed = f"{ratio:.2f}x as slow as" if ratio > 1 else f"{1 / ratio:.2f}x as fast as"
        named = "; most changed: " + self.changes[0].text if self.changes else ""
        return f"over {len(self.steps):,} common steps this run is {speed} {self.other}{named}"


def compare(this: StepTable, other: StepTable, name: str) -> Comparison:
    """`this` run held against `other`, called `name` in texts."""
    steps, mine, theirs = np.intersect1d(this.step, other.step, return_indices=True)
    whole = _change("step", "step", other.seconds[theirs], this.seconds[mine])
    return Comparison(
        name,
        steps,
        this.seconds[mine],
        other.seconds[theirs],
        this.values["loss"][mine],
        other.values["loss"][theirs],
        whole,
        _changed_kinds(this, other, mine, theirs, max(whole.before, whole.after)) if len(steps) else [],
    )


def _changed_kinds(this: StepTable, other: StepTable, mine: Ints, theirs: Ints, step: float) -> list[Change]:
    """Kinds whose time changed beyond doubt, by how many seconds, the most first."""
    columns = {(k.level, k.label): i for i, k in enumerate(this.kinds)}
    others = {(k.level, k.label): i for i, k in enumerate(other.kinds)}
    changes = []
    for level, label in dict.fromkeys([*columns, *others]):
        here, there = columns.get((level, label)), others.get((level, label))
        after = this.durations[mine, here] if here is not None else np.zeros(len(mine))
        before = other.durations[theirs, there] if there is not None else np.zeros(len(theirs))
        change = _change(level, label, before, after)
        difference = abs(change.after - change.before)
        if (
            abs(change.z) >= _SURE_AT
            and difference >= _LEAST_SHARE * step
            and difference >= _LEAST_CHANGE * max(change.before, change.after)
        ):
            changes.append(change)
    return sorted(changes, key=lambda change: -abs(change.after - change.before))


def _change(level: str, label: str, before: Floats, after: Floats) -> Change:
    if not len(before):
        return Change(level, label, 0.0, 0.0, 0.0)
    first, second = float(np.median(before)), float(np.median(after))
    error = np.hypot(_median_error(before), _median_error(after))
    return Change(level, label, first, second, (second - first) / max(float(error), 1e-3 * max(first, second), 1e-12))


def _median_error(values: Floats) -> float:
    spread = MAD_TO_SIGMA * float(np.median(np.abs(values - np.median(values))))
    return _MEDIAN_ERROR * spread / np.sqrt(len(values))
