"""Two runs held against each other: step by step, by kind of span, and by kernels summed over layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from observability import schema
from observability.detect import MAD_TO_SIGMA, duration
from observability.errors import TraceError
from observability.read import Floats, Ints, KernelSums, StepTable, one_line

_LEAST_CHANGE: Final = 0.03  # of a kind's time
_LEAST_SHARE: Final = 0.002  # of the step's time: smaller changes are nobody's business
_SURE_AT: Final = 4.0  # sigmas of the difference of two medians
_MEDIAN_ERROR: Final = 1.2533  # standard error of a median over that of a mean, for a Gaussian
_EXPLAINS: Final = 0.6  # of the step's change that what is named holds
_GATED: Final = 0.05  # of a step: sums that take less fail no gate of their own
_LEAST_STEPS: Final = 8  # in common, for a gate
_ALIKE: Final = 0.25  # of a sum's change, in logarithms, by which one of its parts may differ to be no news
KERNELS: Final = "kernels"  # summed over layers
LAYERS: Final = "layers"  # all layers of one pass
# The most telling first, where it holds most of the change: one kernel, the same kernel in all layers, one layer, ...
_TELLING: Final = ("kernel", KERNELS, "layer", LAYERS, "phase")
# What two runs must have alike for their times to be compared: (name, attribute).
_FACTS: Final = (
    ("GPU", schema.GPU_ADAPTER),
    ("backend", schema.GPU_BACKEND),
    ("driver", schema.GPU_DRIVER),
    ("model", schema.RUN_MODEL),
    ("parameters", schema.RUN_PARAMETERS),
    ("method", schema.RUN_METHOD),
    ("precision", schema.RUN_PRECISION),
)
# And of the configuration, where both runs tell theirs.
_SETTINGS: Final = (
    "batch", "seq", "accumulate", "pack", "rank", "target", "double_quant", "memory_budget", "tune", "trace_level",
    "engine",
)  # fmt: skip
_HARMLESS: Final = frozenset({"driver"})  # worth a word; what a gate is there to watch


@dataclass(frozen=True)
class Change:
    """What typically took `before` seconds a step in the other run and `after` in this one."""

    level: str
    label: str
    before: float
    after: float
    z: float

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else float("inf")

    @property
    def text(self) -> str:
        if not self.before:
            return f"{self.label}: new, {duration(self.after)} a step"
        if not self.after:
            return f"{self.label}: gone, was {duration(self.before)} a step"
        return f"{self.label}: {duration(self.before)} to {duration(self.after)} ({self.after / self.before - 1:+.1%})"

    def to_json(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "span": self.label,
            "before_seconds": self.before,
            "after_seconds": self.after,
            "change_percent": 100 * (self.ratio - 1) if self.before else None,
        }


@dataclass(frozen=True)
class Comparison:
    """This run against another, over the `steps` that both have; seconds and losses by common step.

    `differs` says what the runs do not have alike: times of such runs say little of each other. `gate` is the change
    in percent above which `slower` names what became slower.
    """

    other: str
    steps: Ints
    seconds: Floats
    other_seconds: Floats
    loss: Floats
    other_loss: Floats
    step_change: Change
    changes: list[Change]
    differs: list[str]
    gate: float | None = None

    def verdict(self) -> str:
        if not len(self.steps):
            return f"no step number stands in both this run and {self.other}"
        ratio = self.step_change.ratio
        if abs(self.step_change.z) < _SURE_AT or abs(ratio - 1) < _LEAST_CHANGE / 3:
            speed = "as fast as"
        else:
            speed = f"{ratio:.2f}x as slow as" if ratio > 1 else f"{1 / ratio:.2f}x as fast as"
        named = f"; most changed: {self.most_changed.text}" if self.most_changed is not None else ""
        return f"over {len(self.steps):,} common steps this run is {speed} {self.other}{named}"

    @property
    def most_changed(self) -> Change | None:
        """The most telling change that holds most of what the step changed by, else the largest."""
        step = self.step_change.after - self.step_change.before
        for level in _TELLING:
            of_level = [change for change in self.changes if change.level == level]
            telling = [c for c in of_level if (c.after - c.before) * np.sign(step) >= _EXPLAINS * abs(step)]
            if telling:
                return max(telling, key=lambda change: max(change.ratio, 1 / max(change.ratio, 1e-9)))
        return self.changes[0] if self.changes else None

    @property
    def slower(self) -> list[Change]:
        """What is slower by more than the gate, beyond doubt: the step, and sums that take a good part of it."""
        if self.gate is None:
            return []
        step = self.step_change
        watched = [c for c in self.changes if c.level in (KERNELS, LAYERS, "phase") and c.after >= _GATED * step.after]
        limit = 1 + self.gate / 100
        return [change for change in (step, *watched) if change.z >= _SURE_AT and change.ratio > limit]

    @property
    def failed(self) -> bool:
        return bool(self.slower)

    def gate_text(self) -> str:
        """How the gate was passed, or not; empty where none was asked for."""
        if self.gate is None:
            return ""
        if not self.failed:
            return f"passed: nothing is slower by more than {self.gate:g}%"
        return f"failed: slower by more than {self.gate:g}%: {'; '.join(change.text for change in self.slower)}"

    def to_json(self) -> dict[str, Any]:
        step = self.step_change
        return {
            "against": self.other,
            "verdict": self.verdict(),
            "common_steps": len(self.steps),
            "typical_step_seconds": step.after,
            "other_typical_step_seconds": step.before,
            "change_percent": 100 * (step.ratio - 1) if step.before else None,
            "differs": self.differs,
            "changes": [change.to_json() for change in self.changes],
            "fail_above_percent": self.gate,
            "failed": self.failed if self.gate is not None else None,
            "slower": [change.to_json() for change in self.slower],
        }


def compare(this: StepTable, other: StepTable, name: str, gate: float | None = None) -> Comparison:
    """`this` run held against `other`, called `name` in texts.

    Raises TraceError where a `gate` is asked for and the runs are not of the same device and shape, or too short.
    """
    steps, mine, theirs = np.intersect1d(this.step, other.step, return_indices=True)
    differs = list(_differences(this, other))
    if gate is not None:
        wrong = [text for kind, text in differs if kind not in _HARMLESS]
        if wrong:
            raise TraceError(f"--fail-above: {name} is no run of the same kind: {'; '.join(wrong)}")
        if len(steps) < _LEAST_STEPS:
            raise TraceError(f"--fail-above: {len(steps)} steps in common with {name}; {_LEAST_STEPS} are needed")
    step = _change("step", "step", other.seconds[theirs], this.seconds[mine])
    return Comparison(
        name,
        steps,
        this.seconds[mine],
        other.seconds[theirs],
        this.values["loss"][mine],
        other.values["loss"][theirs],
        step,
        _changes(this, other, mine, theirs, max(step.before, step.after)) if len(steps) else [],
        [text for _, text in differs],
        gate,
    )


def _differences(this: StepTable, other: StepTable) -> Iterator[tuple[str, str]]:
    """(what, words) that the two runs do not have alike, where both tell."""
    for what, key in _FACTS:
        was, now = other.facts.get(key), this.facts.get(key)
        if was not in (None, "") and now not in (None, "") and str(was) != str(now):
            yield what, one_line(f"{what} {str(was)[:80]} there, {str(now)[:80]} here")
    before, after = _config(other), _config(this)
    for what in _SETTINGS:
        if what in before and what in after and before[what] != after[what]:
            yield what, one_line(f"{what} {str(before[what])[:80]} there, {str(after[what])[:80]} here")
    was, now = (float(np.median(table.values["row_tokens"])) for table in (other, this))
    if was > 0 and now > 0 and abs(now / was - 1) > 0.01 and not {"batch", "seq", "accumulate"} & before.keys():
        yield "positions", f"{was:,.0f} positions a step there, {now:,.0f} here"


def _config(table: StepTable) -> dict[str, Any]:
    try:
        told = json.loads(str(table.facts.get(schema.RUN_CONFIG, "{}")))
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _changes(this: StepTable, other: StepTable, mine: Ints, theirs: Ints, step: float) -> list[Change]:
    """What changed beyond doubt, by how many seconds, the most first; parts of a sum that changed alike are no news."""
    sums = [change for change in _kernel_changes(this.kernels, other.kernels) if _matters(change, step)]
    sums = [c for c in sums if not any(_is_part(c, whole) for whole in sums if whole is not c)]
    sums += [change for change in _layer_changes(this, other, mine, theirs) if _matters(change, step)]
    columns = {(k.level, k.label): i for i, k in enumerate(this.kinds)}
    others = {(k.level, k.label): i for i, k in enumerate(other.kinds)}
    single = []
    for level, label in dict.fromkeys([*columns, *others]):
        here, there = columns.get((level, label)), others.get((level, label))
        after = this.durations[mine, here] if here is not None else np.zeros(len(mine))
        before = other.durations[theirs, there] if there is not None else np.zeros(len(theirs))
        change = _change(level, label, before, after)
        if _matters(change, step) and not any(_is_part(change, whole) for whole in sums):
            single.append(change)
    return sorted([*sums, *single], key=lambda change: -abs(change.after - change.before))


def _matters(change: Change, step: float) -> bool:
    difference = abs(change.after - change.before)
    return (
        abs(change.z) >= _SURE_AT
        and difference >= _LEAST_SHARE * step
        and difference >= _LEAST_CHANGE * max(change.before, change.after)
    )


def _is_part(change: Change, whole: Change) -> bool:
    """Whether a kernel or layer changed as the sum that it belongs to did."""
    if whole.level == KERNELS and change.level in ("kernel", KERNELS):
        own, of_all = change.label.rsplit("/", 1)[-1].split(" (")[0], whole.label.split(" (")[0]
        belongs = own.startswith(f"{of_all} ") or (own == of_all and change.level == "kernel")
    elif (change.level, whole.level) == ("layer", LAYERS):
        belongs = change.label.rpartition("(")[2] == whole.label.rpartition("(")[2]
    else:
        return False
    if not (belongs and change.before and change.after and whole.before and whole.after):
        return belongs
    apart = abs(np.log(change.ratio) - np.log(whole.ratio))
    return bool(apart <= _ALIKE * abs(np.log(whole.ratio)))


def _kernel_changes(this: KernelSums | None, other: KernelSums | None) -> Iterator[Change]:
    """By operation over all layers and shapes, and by shape where an operation has several."""
    if this is None or other is None:
        return
    for by_shape in (False, True):
        after, before = _by_key(this, by_shape), _by_key(other, by_shape)
        for key in dict.fromkeys([*after, *before]):
            nothing = (np.zeros(1), 0.0, 1)
            (now, launches, shapes), (was, launched, _) = after.get(key, nothing), before.get(key, nothing)
            if by_shape and shapes == 1:
                continue
            each = f"all {max(launches, launched):.0f} of a step" if max(launches, launched) > 1 else "one a step"
            yield _change(KERNELS, f"{' '.join(key).strip()} ({each})", was, now)


def _by_key(sums: KernelSums, by_shape: bool) -> dict[tuple[str, str], tuple[Floats, float, int]]:
    """By operation, or operation and shape: seconds by step, launches a step, and how many shapes the operation has."""
    shapes: dict[str, int] = {}
    for group in sums.groups:
        shapes[group.operation] = shapes.get(group.operation, 0) + 1
    result: dict[tuple[str, str], tuple[Floats, float, int]] = {}
    for g, group in enumerate(sums.groups):
        key = (group.operation, group.shape if by_shape else "")
        seconds, launches, _ = result.get(key, (np.zeros(len(sums.steps)), 0.0, 0))
        result[key] = seconds + sums.seconds[:, g], launches + group.launches, shapes[group.operation]
    return result


def _layer_changes(this: StepTable, other: StepTable, mine: Ints, theirs: Ints) -> Iterator[Change]:
    """All layers of a pass together."""
    passes = dict.fromkeys(kind.phase for kind in (*this.kinds, *other.kinds) if kind.level == "layer")
    for phase in passes:
        parts = []
        for table, rows in ((other, theirs), (this, mine)):
            columns = [i for i, kind in enumerate(table.kinds) if (kind.level, kind.phase) == ("layer", phase)]
            parts.append(table.durations[rows][:, columns].sum(axis=1))
        if all(np.any(part) for part in parts):
            yield _change(LAYERS, f"all layers ({phase})", *parts)


def _change(level: str, label: str, before: Floats, after: Floats) -> Change:
    if not len(before):
        return Change(level, label, 0.0, 0.0, 0.0)
    first, second = float(np.median(before)), float(np.median(after))
    error = np.hypot(_median_error(before), _median_error(after))
    return Change(level, label, first, second, (second - first) / max(float(error), 1e-3 * max(first, second), 1e-12))


def _median_error(values: Floats) -> float:
    spread = MAD_TO_SIGMA * float(np.median(np.abs(values - np.median(values))))
    return _MEDIAN_ERROR * spread / np.sqrt(len(values))
