"""The faults of the grid, and what is no fault: each changes a window of a recording, and says what it did.

A fault's size is a share of the step's median; of a layer's own, for a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from observability import schema
from observability.detect import host
from observability.detect.findings import (
    CHECKPOINT_STALL,
    DATA_STALL,
    DRIFT,
    INTERFERENCE,
    MEMORY_PRESSURE,
    PERIODIC,
    SLOW_KERNEL,
    SPIKE,
    THROTTLE,
)
from observability.read import Pause, StepTable

Rng = np.random.Generator


@dataclass(frozen=True)
class Placed:
    """Rows `first` to `last` carry a fault; any of `causes` is right, with `span` at fault where that is not None."""

    causes: tuple[str, ...]
    first: int
    last: int
    span: str | None = None
    sustained: bool = True


Inject = Callable[[StepTable, Rng], tuple[StepTable, Placed | None]]


@dataclass(frozen=True)
class Case:
    """One row of the grid: `bar` is the found share that is asked for on each machine, None where none is."""

    name: str
    inject: Inject
    quiet_bar: float | None = None
    loaded_bar: float | None = None


def typical(table: StepTable) -> float:
    return float(np.median(table.seconds))


def longer(table: StepTable, rows: np.ndarray, factor: np.ndarray) -> StepTable:
    """Every phase and layer of `rows` longer by `factor` [rows]; the host tells nothing of it."""
    durations, seconds = table.durations.copy(), table.seconds.copy()
    seconds[rows] *= factor
    durations[rows] *= factor[:, None]
    return _timed(table, seconds, durations)


def stretched(table: StepTable, rows: np.ndarray, factor: np.ndarray) -> StepTable:
    """Every phase and layer of `rows` longer by `factor` [rows], as the GPU computes for so much longer."""
    return _computed(longer(table, rows, factor), rows, factor)


def added(table: StepTable, rows: np.ndarray, kinds: list[int], extra: np.ndarray) -> StepTable:
    """`extra` seconds [rows] more in each of `kinds`, and in the step; those of the GPU are computed."""
    durations, seconds = table.durations.copy(), table.seconds.copy()
    seconds[rows] += extra
    for kind in kinds:
        durations[rows, kind] += extra
    made = _timed(table, seconds, durations)
    on_gpu = [kind for kind in kinds if table.kinds[kind].name != schema.DATA]
    return _computed(made, rows, seconds[rows] / table.seconds[rows]) if on_gpu else made


def _computed(table: StepTable, rows: np.ndarray, factor: np.ndarray) -> StepTable:
    """What a GPU made of software computes for longer takes more processor time, and waits more for it.

    As others have their share of the processors meanwhile. Such are the recordings whose threads always wait.
    """
    if not host.busy(table):
        return table
    for key in ("cpu_seconds", "run_delay_seconds", "others_cpu_seconds"):
        table = told(table, rows, key, lambda seconds: seconds * factor)
    return table


def _timed(table: StepTable, seconds: np.ndarray, durations: np.ndarray) -> StepTable:
    start = np.concatenate([[0.0], np.cumsum(seconds)[:-1]])
    return replace(table, seconds=seconds, wall_seconds=seconds.copy(), durations=durations, start=start)


def told(table: StepTable, rows: np.ndarray, key: str, change: Callable[[np.ndarray], np.ndarray]) -> StepTable:
    """What the host or the step tells of `rows` changed, where the recording has it."""
    values = table.values.get(key)
    if values is None:
        return table
    values = values.copy()
    values[rows] = change(values[rows])
    return replace(table, values={**table.values, key: values})


def second_half(table: StepTable) -> np.ndarray:
    return np.arange(len(table) // 2, len(table))


def _span(rows: np.ndarray) -> tuple[int, int]:
    return int(rows[0]), int(rows[-1])


def slower_gpu(share: float) -> Inject:
    """The GPU slower by `share` from half the run on; its clock lower where the recording has it."""

    def inject(table: StepTable, rng: Rng) -> tuple[StepTable, Placed]:
        rows = second_half(table)
        table = stretched(table, rows, np.full(len(rows), 1 + share))
        table = told(table, rows, "gpu_clock_mhz", lambda clock: clock / (1 + share))
        return table, Placed((THROTTLE,), *_span(rows))

    return inject


def busy_loops(table: StepTable, rng: Rng) -> tuple[StepTable, Placed]:
    """Two busy loops from half the run on: 2.2 times as long, give or take 35%, by step."""
    rows = second_half(table)
    factor = np.maximum(2.2 * (1 + 0.35 * rng.standard_normal(len(rows))), 1.0)
    # Waits of all threads are summed, and a GPU made of software computes in one on each of the two processors.
    threads = 2 if host.busy(table) else 1
    held = threads * table.seconds[rows] * (factor - 1)
    table = longer(table, rows, factor)
    table = told(table, rows, "run_delay_seconds", lambda delay: delay + held)
    table = told(
        table, rows, "others_cpu_seconds", lambda cpu: cpu + (held if threads > 1 else 2 * table.seconds[rows])
    )
    has_host = bool(np.any(np.isfinite(table.values.get("run_delay_seconds", np.array([np.nan])))))
    return table, Placed((INTERFERENCE,) if has_host else (THROTTLE, INTERFERENCE), *_span(rows))


def kind_index(table: StepTable, name: str, phase: str = "") -> int:
    return next(i for i, kind in enumerate(table.kinds) if (kind.name, kind.phase) == (name, phase))


def slow_phase(name: str, share: float, cause: str) -> Inject:
    """A phase longer by `share` of a step from half the run on."""

    def inject(table: StepTable, rng: Rng) -> tuple[StepTable, Placed]:
        rows = second_half(table)
        extra = np.full(len(rows), share * typical(table))
        return added(table, rows, [kind_index(table, name)], extra), Placed((cause,), *_span(rows), span=name)

    return inject


def ramp(share: float) -> Inject:
    """The loader slower and slower from a third of the run on, by `share` of a step in the end."""

    def inject(table: StepTable, rng: Rng) -> tuple[StepTable, Placed]:
        rows = np.arange(len(table) // 3, len(table))
        extra = share * typical(table) * np.linspace(0, 1, len(rows))
        table = added(table, rows, [kind_index(table, "data")], extra)
        return table, Placed((DRIFT, DATA_STALL), *_span(rows), span="data")

    return inject


def gpu_ramp(share: float) -> Inject:
    """All of the GPU slower and slower from a third of the run on."""

    def inject(table: StepTable, rng: Rng) -> tuple[StepTable, Placed]:
        rows = np.arange(len(table) // 3, len(table))
        table = stretched(table, rows, 1 + share * np.linspace(0, 1, len(rows)))
        return table, Placed((DRIFT,), *_span(rows))

    return inject


def slow_layer(share: float) -> Inject:
    """One layer of one pass longer by `share` of its own from half the run on."""

    def inject(table: StepTable, rng: Rng) -> tuple[StepTable, Placed]:
        rows = second_half(table)
        kind = int(rng.choice([i for i, kind in enumerate(table.kinds) if kind.level == "layer"]))
        phase = kind_index(table, table.kinds[kind].phase)
        table = added(table, rows, [kind, phase], share * table.durations[rows, kind])
        return table, Placed((SLOW_KERNEL,), *_span(rows), span=table.kinds[kind].label)

    return inject


def memory(table: StepTable, rng: Rng) -> tuple[StepTable, Placed]:
    """Memory up by a tenth, and 1.4 times as long, from half the run on."""
    rows = second_half(table)
    held = np.full(len(table), 3.0 * 2**30)
    held[rows] *= 1.1
    table = stretched(table, rows, np.full(len(rows), 1.4))
    return replace(table, values={**table.values, "allocated_bytes": held}), Placed((MEMORY_PRESSURE,), *_span(rows))


def every(period: int, share: float) -> Inject:
    """`share` of a step more every so many steps, outside every phase."""

    def inject(table: StepTable, rng: Rng) -> tuple[StepTable, Placed]:
        rows = np.arange(int(rng.integers(0, period)), len(table), period)
        table = added(table, rows, [], np.full(len(rows), share * typical(table)))
        return table, Placed((PERIODIC,), *_span(rows))

    return inject


def single(share: float, name: str | None, causes: tuple[str, ...], held: bool = False) -> Inject:
    """One step longer by `share` of a step: in the phase `name`, or outside every phase, the process `held` or not."""

    def inject(table: StepTable, rng: Rng) -> tuple[StepTable, Placed]:
        row = np.array([int(rng.integers(len(table) // 5, len(table) - 2))])
        extra = np.array([share * typical(table)])
        table = added(table, row, [kind_index(table, name)] if name else [], extra)
        if held:
            table = told(table, row, "held_seconds", lambda seconds: np.nan_to_num(seconds) + extra)
        return table, Placed(causes, int(row[0]), int(row[0]), name, sustained=False)

    return inject


def slow_checkpoints(share: float) -> Inject:
    """Checkpoints every tenth step, longer by `share` of a step from half the run on."""

    def inject(table: StepTable, rng: Rng) -> tuple[StepTable, Placed]:
        cost, half = 0.5 * typical(table), len(table) // 2
        late = share * typical(table)
        pauses = tuple(
            Pause("checkpoint", int(table.step[row]), cost * rng.uniform(0.9, 1.1) + (late if row >= half else 0.0))
            for row in range(9, len(table), 10)
        )
        return replace(table, pauses=pauses), Placed((CHECKPOINT_STALL,), half, len(table) - 1)

    return inject


def clean(table: StepTable, rng: Rng) -> tuple[StepTable, None]:
    return table, None


def heavy_tails(table: StepTable, rng: Rng) -> tuple[StepTable, None]:
    """Noise with tails that fall off as the third power, on every step; no fault."""
    factor = 1 + 0.02 * np.abs(rng.standard_t(3, len(table)))
    return stretched(table, np.arange(len(table)), factor), None


def wandering(table: StepTable, rng: Rng) -> tuple[StepTable, None]:
    """A level that wanders by a few percent on its own, as temperatures and neighbours make it; no fault."""
    walk = np.zeros(len(table))
    for row in range(1, len(table)):
        walk[row] = 0.98 * walk[row - 1] + 0.004 * rng.standard_normal()
    return stretched(table, np.arange(len(table)), np.exp(walk)), None


def two_lengths(table: StepTable, rng: Rng) -> tuple[StepTable, None]:
    """Batches of two lengths, and the time that each takes; no fault."""
    long = rng.random(len(table)) < 0.3
    factor = np.where(long, 1.6, 1.0)
    table = stretched(table, np.arange(len(table)), factor)
    work = np.round(table.values["row_tokens"] * factor)
    return replace(table, values={**table.values, "row_tokens": work, "tokens": work}), None


def longer_batches(table: StepTable, rng: Rng) -> tuple[StepTable, None]:
    """Twice the tokens in five steps; no fault."""
    rows = rng.choice(np.arange(10, len(table)), 5, replace=False)
    table = stretched(table, rows, np.full(5, 2.0) * rng.uniform(0.95, 1.1, 5))
    work = table.values["row_tokens"].copy()
    work[rows] *= 2
    return replace(table, values={**table.values, "row_tokens": work, "tokens": work}), None


SUSTAINED: Final = (
    Case("GPU 10% slower", slower_gpu(0.10), 0.8),
    Case("GPU 30% slower", slower_gpu(0.30), 0.8),
    Case("GPU x 1.5", slower_gpu(0.50), 0.8, 0.95),
    Case("GPU x 2", slower_gpu(1.0), 0.8, 0.95),
    Case("two busy loops", busy_loops, 0.8, 0.95),
    Case("loader + 0.1 step", slow_phase("data", 0.1, DATA_STALL), 0.8),
    Case("loader + 0.7 step", slow_phase("data", 0.7, DATA_STALL), 0.8, 0.95),
    Case("optimizer + 0.5 step", slow_phase("optimizer", 0.5, SLOW_KERNEL), 0.8, 0.95),
    Case("loader ramp to + 0.7 step", ramp(0.7), 0.8, 0.95),
    Case("GPU ramp to x 2", gpu_ramp(1.0), 0.8, 0.95),
    Case("one layer + 10%", slow_layer(0.10), 0.8),
    Case("one layer + 30%", slow_layer(0.30), 0.8),
    Case("one layer x 1.5", slow_layer(0.50), 0.8, 0.95),
    Case("one layer x 3", slow_layer(2.0), 0.8, 0.95),
    Case("memory + 10%, x 1.4", memory, 0.8, None),
    Case("checkpoints + 1 step", slow_checkpoints(1.0), 0.8, 0.95),
)
OTHER: Final = (
    Case("every 17th step + 0.1", every(17, 0.1), 0.8),
    Case("every 17th step + 0.5", every(17, 0.5), 0.8, 0.8),
    Case("every 17th step + 2", every(17, 2.0), 0.8, 0.8),
    Case("loader + 1 step, once", single(1.0, "data", (DATA_STALL,)), 0.8, 0.8),
    Case("sleep of 2 steps, once", single(2.0, None, (SPIKE,)), 0.8, 0.8),
    Case("process held for 5 steps, once", single(5.0, None, (INTERFERENCE,), held=True), 0.8, 0.8),
)
CLEAN: Final = (
    Case("clean", clean),
    Case("heavy tails", heavy_tails),
    Case("wandering level", wandering),
    Case("two batch lengths", two_lengths),
    Case("longer batches", longer_batches),
)
