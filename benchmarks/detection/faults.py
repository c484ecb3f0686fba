"""Faults of known place, size and cause, put into recorded steps.

A fault's size is in sigmas of the recorded run's own noise, see `sigma`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np

from observability import schema
from observability.detect.baseline import moving_median
from observability.detect.findings import (
    CHECKPOINT_STALL,
    DATA_STALL,
    DRIFT,
    LONGER_BATCH,
    PERIODIC,
    SLOW_KERNEL,
    SPIKE,
    THROTTLE,
)
from observability.read.step_table import Pause, StepTable

CHECKPOINT_EVERY: Final = 50  # steps; every run writes checkpoints that cost a routine two sigmas
_ROUTINE_SIGMAS: Final = 2.0
_MARGIN: Final = 60  # steps at both ends that stay free of single faults
POINT_FAULTS_A_RUN: Final = 3


@dataclass(frozen=True)
class Fault:
    """Rows `first` to `last` (inclusive) carry a fault of this cause."""

    cause: str
    first: int
    last: int


Inject = Callable[[StepTable, float, float, np.random.Generator], tuple[StepTable, list[Fault]]]


def sigma(table: StepTable) -> float:
    """One sigma of a clean run's own noise, seconds: its standard deviation about the moving median, or more.

    Step times have heavy tails. An alarm at 4 sigmas can only be as rare as one in 1,000 clean steps if no more of them
    lie beyond 4 sigmas, so sigma is at least a quarter of the excess that one clean step in 1,000 passes.
    """
    excess = table.seconds - moving_median(table.seconds)
    return max(float(np.std(excess)), float(np.quantile(excess, 0.999)) / 4)


def with_checkpoints(table: StepTable, rng: np.random.Generator) -> StepTable:
    """The run with its routine checkpoints, of about the same cost each."""
    cost = _ROUTINE_SIGMAS * sigma(table)
    steps = table.step[CHECKPOINT_EVERY - 1 :: CHECKPOINT_EVERY]
    return replace(
        table,
        pauses=tuple(Pause(schema.CHECKPOINT, int(step), cost * rng.uniform(0.9, 1.1)) for step in steps),
    )


def data_stall(table: StepTable, one: float, size: float, rng: np.random.Generator) -> tuple[StepTable, list[Fault]]:
    faults = _places(table, rng, DATA_STALL, longest=3)
    return _slow_kind(table, faults, [_index(table, "phase", schema.DATA)], size * one), faults


def slow_kernel(table: StepTable, one: float, size: float, rng: np.random.Generator) -> tuple[StepTable, list[Fault]]:
    faults = _places(table, rng, SLOW_KERNEL, longest=20)
    for fault in faults:
        layers = [i for i, kind in enumerate(table.kinds) if kind.level == "layer"]
        layer = int(rng.choice(layers))
        phase = _index(table, "phase", table.kinds[layer].phase)
        table = _slow_kind(table, [fault], [layer, phase], size * one)
    return table, faults


def disk_stall(table: StepTable, one: float, size: float, rng: np.random.Generator) -> tuple[StepTable, list[Fault]]:
    pauses = list(table.pauses)
    chosen = rng.choice(np.arange(1, len(pauses)), size=min(POINT_FAULTS_A_RUN, len(pauses) - 1), replace=False)
    faults = []
    for index in sorted(chosen.tolist()):
        pauses[index] = replace(pauses[index], seconds=pauses[index].seconds + size * one)
        row = int(np.searchsorted(table.step, pauses[index].step))
        faults.append(Fault(CHECKPOINT_STALL, row, row))
    return replace(table, pauses=tuple(pauses)), faults


def spike(table: StepTable, one: float, size: float, rng: np.random.Generator) -> tuple[StepTable, list[Fault]]:
    faults = _places(table, rng, SPIKE, longest=1)
    for fault in faults:
        rows = np.arange(fault.first, fault.last + 1)
        table = _stretched(table, rows, 1 + size * one / table.seconds[rows])
    return table, faults


def throttle(table: StepTable, one: float, size: float, rng: np.random.Generator) -> tuple[StepTable, list[Fault]]:
    length = int(rng.integers(120, 300))
    first = int(rng.integers(150, len(table) - length))
    rows = np.arange(first, first + length)
    factor = 1 + size * one / float(np.median(table.seconds))
    return _stretched(table, rows, np.full(length, factor)), [Fault(THROTTLE, first, first + length - 1)]


def drift(table: StepTable, one: float, size: float, rng: np.random.Generator) -> tuple[StepTable, list[Fault]]:
    """Up to `size` sigmas at the end of the run, 1% of a step every 10 steps where that is the size."""
    length = int(rng.integers(250, 400))
    rows = np.arange(len(table) - length, len(table))
    factor = 1 + size * one / float(np.median(table.seconds)) * np.arange(1, length + 1) / length
    return _stretched(table, rows, factor), [Fault(DRIFT, int(rows[0]), int(rows[-1]))]


def periodic(table: StepTable, one: float, size: float, rng: np.random.Generator) -> tuple[StepTable, list[Fault]]:
    every = int(rng.integers(10, 50))
    rows = np.arange(int(rng.integers(0, every)) + every, len(table), every)
    table = _stretched(table, rows, 1 + size * one * rng.uniform(0.9, 1.1, len(rows)) / table.seconds[rows])
    return table, [Fault(PERIODIC, int(rows[0]), int(rows[-1]))]


def longer_batch(table: StepTable, one: float, size: float, rng: np.random.Generator) -> tuple[StepTable, list[Fault]]:
    """The decoy: more tokens, and the time they take."""
    faults = _places(table, rng, LONGER_BATCH, longest=10)
    work = table.values["row_tokens"].copy()
    for fault in faults:
        rows = np.arange(fault.first, fault.last + 1)
        factor = 1 + size * one / float(np.median(table.seconds))
        work[rows] *= factor
        table = _stretched(table, rows, factor ** rng.uniform(0.95, 1.15, len(rows)))
    return replace(table, values={**table.values, "row_tokens": np.round(work)}), faults


KINDS: Final[dict[str, Inject]] = {
    "data stall": data_stall,
    "disk stall": disk_stall,
    "slow kernel": slow_kernel,
    "throttle": throttle,
    "periodic pause": periodic,
    "spike": spike,
    "drift": drift,
    "longer batch (decoy)": longer_batch,
}


# Sizes that the project's goals state in parts of a step: a throttle of 20%, a spike of 2x, a drift of 1% in 10 steps
# (over the 325 steps that one lasts on average), batches of twice the tokens.
STATED: Final = {"throttle": 0.20, "spike": 1.0, "drift": 0.325, "longer batch (decoy)": 1.0}


def stated_size(kind: str, table: StepTable, rng: np.random.Generator) -> float:
    """The stated size of a fault in sigmas of the run; drawn from 6 to 12 where none is stated."""
    drawn = float(rng.uniform(6, 12))
    return STATED[kind] * float(np.median(table.seconds)) / sigma(table) if kind in STATED else drawn


def large_size(kind: str, table: StepTable, rng: np.random.Generator) -> float:
    """A size of 6 to 12 sigmas, or the stated one where that is larger."""
    return max(float(rng.uniform(6, 12)), stated_size(kind, table, rng))


def _places(table: StepTable, rng: np.random.Generator, cause: str, longest: int) -> list[Fault]:
    """Places for single faults of up to `longest` steps, one in each part of the run."""
    edges = np.linspace(_MARGIN, len(table) - _MARGIN, POINT_FAULTS_A_RUN + 1).astype(int)
    faults = []
    for begin, end in pairwise(edges.tolist()):
        length = int(rng.integers(1, longest + 1))
        first = int(rng.integers(begin + 10, end - length - 10))
        faults.append(Fault(cause, first, first + length - 1))
    return faults


def _index(table: StepTable, level: str, name: str) -> int:
    return next(i for i, kind in enumerate(table.kinds) if kind.level == level and kind.name == name)


def _slow_kind(table: StepTable, faults: list[Fault], columns: list[int], extra: float) -> StepTable:
    durations, added = table.durations.copy(), np.zeros(len(table))
    for fault in faults:
        durations[fault.first : fault.last + 1, columns] += extra
        added[fault.first : fault.last + 1] += extra
    return replace(table, durations=durations, seconds=table.seconds + added, wall_seconds=table.wall_seconds + added)


def _stretched(table: StepTable, rows: np.ndarray, factor: np.ndarray) -> StepTable:
    """Every phase and layer of these rows longer by a factor."""
    durations, seconds, wall = table.durations.copy(), table.seconds.copy(), table.wall_seconds.copy()
    wall[rows] += seconds[rows] * (factor - 1)
    seconds[rows] *= factor
    durations[rows] *= factor[:, None]
    return replace(table, durations=durations, seconds=seconds, wall_seconds=wall)
