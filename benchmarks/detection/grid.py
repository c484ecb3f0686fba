"""The second benchmark: a grid of faults in windows of recordings of a quiet and of a loaded machine.

A fault's size is a share of the step's median (of a layer's own, for a layer), so a found share says what a user would
have been told. Tuning and reported draws come from different recordings, and so do the quiet and the loaded ones.

A sustained fault is found by an alarm that covers at least a third of its steps; a periodic one by an alarm that is
periodic or covers as much; a single one by any alarm on its step. The cause is right where the alarm that covers most
names it, and the kind of span at fault where there is one.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np

from benchmarks.detection import recording
from benchmarks.detection.rivals import RIVALS, events_above, median_shift
from benchmarks.detection.scoring import Event
from observability.detect import Finding, LiveDetector, host
from observability.detect.detector import detect
from observability.detect.findings import (
    CHECKPOINT_STALL,
    COMPILE,
    DATA_STALL,
    DRIFT,
    INTERFERENCE,
    MEMORY_PRESSURE,
    PERIODIC,
    SLOW_KERNEL,
    SPIKE,
    THROTTLE,
)
from observability.read import HOST_VALUES, Pause, StepTable

RECORDINGS: Final = Path(__file__).with_name("recordings")
MACHINES: Final = ("quiet", "loaded")
WINDOW: Final = 150
LENGTHS: Final = (8, 16, 30, 60, 1000, 10_000)  # of clean runs
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


def stretched(table: StepTable, rows: np.ndarray, factor: np.ndarray) -> StepTable:
    """Every phase and layer of `rows` longer by `factor` [rows]."""
    durations, seconds = table.durations.copy(), table.seconds.copy()
    seconds[rows] *= factor
    durations[rows] *= factor[:, None]
    return _timed(table, seconds, durations)


def added(table: StepTable, rows: np.ndarray, kinds: list[int], extra: np.ndarray) -> StepTable:
    """`extra` seconds [rows] more in each of `kinds`, and in the step."""
    durations, seconds = table.durations.copy(), table.seconds.copy()
    seconds[rows] += extra
    for kind in kinds:
        durations[rows, kind] += extra
    return _timed(table, seconds, durations)


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
    table = stretched(table, rows, factor)
    table = told(table, rows, "run_delay_seconds", lambda delay: delay + held)
    table = told(table, rows, "others_cpu_seconds", lambda cpu: cpu + 2 * table.seconds[rows])
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


@dataclass
class Score:
    """Counts of one case: runs, faults found, causes right, alarms on steps that carry no fault, steps."""

    runs: int = 0
    found: int = 0
    right: int = 0
    false_alarms: int = 0
    steps: int = 0

    def figures(self) -> dict[str, float]:
        runs = max(self.runs, 1)
        return {
            "runs": self.runs,
            "found": round(self.found / runs, 3),
            "right": round(self.right / runs, 3),
            "false_per_thousand": round(1000 * self.false_alarms / max(self.steps, 1), 2),
        }


Detect = Callable[[StepTable], list[Finding]]


def window(machine: str, which: str, length: int, rng: Rng) -> StepTable:
    """`length` steps of a recording, from anywhere in it."""
    table, _ = recording.load(RECORDINGS / f"{machine}_{which}.npz")
    first = int(rng.integers(0, len(table) - length + 1))
    return recording.rows(table, np.arange(first, first + length))


def windows(machine: str, which: str, length: int) -> list[StepTable]:
    """The recording in parts of `length` steps."""
    table, _ = recording.load(RECORDINGS / f"{machine}_{which}.npz")
    return [recording.rows(table, np.arange(i, i + length)) for i in range(0, len(table) - length + 1, length)]


def measure(case: Case, machine: str, which: str, draws: int, length: int, detect: Detect) -> Score:
    """`case` in `draws` windows; one without a fault in all parts of the recording."""
    score = Score()
    if case in CLEAN:
        for index, table in enumerate(windows(machine, which, length)):
            judged(case.inject(table, _rng(which, machine, case.name, index)), detect, score)
        return score
    for draw in range(draws):
        rng = _rng(which, machine, case.name, draw)
        judged(case.inject(window(machine, which, length, rng), rng), detect, score)
    return score


def judged(made: tuple[StepTable, Placed | None], detect: Detect, score: Score) -> None:
    table, fault = made
    alarms = [f for f in detect(table) if f.is_alarm and f.cause != COMPILE]
    score.runs += 1
    score.steps += len(table)
    if fault is None:
        score.false_alarms += len(alarms)
        return
    hits = [(shared(alarm, fault), alarm) for alarm in alarms]
    score.false_alarms += sum(not overlap for overlap, _ in hits)
    least = (fault.last - fault.first + 1) / 3 if fault.sustained else 1
    covering = [(overlap, alarm) for overlap, alarm in hits if overlap >= least]
    if not covering:
        return
    score.found += 1
    best = max(covering, key=lambda hit: (hit[0], hit[1].z))[1]
    named = fault.span is None or best.span == fault.span
    score.right += best.cause in fault.causes and named


def shared(alarm: Finding, fault: Placed) -> int:
    """Rows that an alarm and a fault share; steps of the benchmark's runs are numbered from 1."""
    return max(min(alarm.last_step - 1, fault.last) - max(alarm.first_step - 1, fault.first) + 1, 0)


def records(table: StepTable) -> Iterator[Any]:
    """The steps of a recording as the trainer hands them to observers."""
    now = 1_700_000_000 * 10**9
    told = [key for key in HOST_VALUES if key in table.values]
    for row in range(len(table)):
        end = now + round(table.seconds[row] * 1e9)
        spans, at = [], {"": None}
        for index, kind in sorted(enumerate(table.kinds), key=lambda item: item[1].level != "phase"):
            seconds = float(table.durations[row, index])
            at.setdefault(kind.name, len(spans))
            spans.append(
                SimpleNamespace(
                    name=kind.name,
                    kind=kind.level,
                    start_ns=now,
                    end_ns=now + round(seconds * 1e9),
                    parent=at[kind.phase],
                    attributes={},
                )
            )
        host_stats = SimpleNamespace(**{key: float(table.values[key][row]) for key in told})
        work = float(table.values["row_tokens"][row])
        yield SimpleNamespace(
            step=int(table.step[row]), start_ns=now, end_ns=end, loss=1.0, grad_norm=1.0, tokens=work, row_tokens=work,
            allocated_bytes=1, skipped=False, spans=spans, host=host_stats,
        )  # fmt: skip
        now = end


def alarms_by_length(machine: str, which: str, detect: Detect) -> dict[str, dict[str, float]]:
    """Alarms on clean runs of other lengths; longer ones than the recording go through it again and again."""
    table, _ = recording.load(RECORDINGS / f"{machine}_{which}.npz")
    figures = {}
    for length in LENGTHS:
        count = max(len(table) // length, 1)
        score = Score()
        for index in range(count):
            rows = np.arange(index * length, (index + 1) * length) % len(table)
            judged((recording.rows(table, rows), None), detect, score)
        figures[str(length)] = {"runs": count, "false_per_thousand": score.figures()["false_per_thousand"]}
        print(f"{machine:7} clean, {length:6,} steps: {score.false_alarms} alarms in {count} runs", flush=True)
    return figures


def live_alarms(machine: str, which: str) -> dict[str, int]:
    """Lines that the live detector tells of step times in clean windows."""
    found: list[Finding] = []
    parts = windows(machine, which, WINDOW)[:20]
    for table in parts:
        detector = LiveDetector(emit=lambda line: None, on_finding=found.append)
        for record in records(table):
            detector.step_finished(record)
        detector.run_finished(None)
    print(f"{machine:7} clean, live: {len(found)} alarms in {len(parts)} windows", flush=True)
    return {"windows": len(parts), "alarms": len(found)}


def _rng(*parts: object) -> Rng:
    return np.random.default_rng(zlib.crc32(repr(parts).encode()))


def as_findings(events: Sequence[Event]) -> list[Finding]:
    """A rival's events as alarms: they name no cause."""
    return [Finding("", e.first + 1, e.last + 1, e.first + 1, "step", 0.0, 0.0, 9.0, "high", "") for e in events]


def rivals(machine: str, length: int) -> dict[str, Detect]:
    """What others make of the same windows, each with the threshold that gives one false alarm per 1,000 clean steps.

    Thresholds come from the tuning recording. Isolation forest and z-score score single steps; a sustained fault counts
    as found by them when a third of its steps are alarms.
    """
    clean = windows(machine, "tuning", length)
    found: dict[str, Detect] = {}
    for name in ("IsolationForest", "plain z-score"):
        scorer = RIVALS[name]
        allowed = max(round(sum(map(len, clean)) / 1000), 1)
        threshold = float(np.sort(np.concatenate([scorer(table) for table in clean]))[-allowed])
        found[name] = lambda table, s=scorer, t=threshold: _joined(events_above(s(table), t))
    for threshold in (4.0, 6.0, 8.0, 12.0, 20.0, 50.0):
        if sum(len(median_shift(table, threshold)) for table in clean) <= max(sum(map(len, clean)) / 1000, 1):
            break
    found["median shift"] = lambda table, t=threshold: as_findings(median_shift(table, t))
    return found


def _joined(events: Sequence[Event]) -> list[Finding]:
    """Single alarms, and one over the stretch that a third of whose steps are alarms."""
    alarms = as_findings(events)
    rows = sum(e.last - e.first + 1 for e in events)
    if events and rows >= (events[-1].last - events[0].first + 1) / 3 and len(events) > 1:
        alarms.append(as_findings([Event(events[0].first, events[-1].last, {})])[0])
    return alarms


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection.grid", description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=40, help="windows with each fault, on each machine")
    parser.add_argument("--length", type=int, default=WINDOW, help="steps of a window")
    parser.add_argument("--tuning", action="store_true", help="the tuning recordings, without the rivals")
    parser.add_argument("--alone", action="store_true", help="without the rivals, which take most of the time")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    which = "tuning" if options.tuning else "reported"
    figures: dict[str, Any] = {"which": which, "length": options.length, "draws": options.draws}
    for machine in MACHINES:
        detectors: dict[str, Detect] = {"this detector": lambda table: detect(table)[0]}
        if not (options.tuning or options.alone):
            detectors |= rivals(machine, options.length)
        figures[machine] = {}
        for case in (*CLEAN, *SUSTAINED, *OTHER):
            scores = {n: measure(case, machine, which, options.draws, options.length, d) for n, d in detectors.items()}
            figures[machine][case.name] = {name: score.figures() for name, score in scores.items()}
            print(_line(machine, case, figures[machine][case.name]), flush=True)
        figures.setdefault("clean, by length", {})[machine] = alarms_by_length(
            machine, which, detectors["this detector"]
        )
        figures.setdefault("clean, live", {})[machine] = live_alarms(machine, which)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _line(machine: str, case: Case, figures: dict[str, dict[str, float]]) -> str:
    ours = figures["this detector"]
    others = " ".join(
        f"{name} {f['false_per_thousand'] if case in CLEAN else f['found']:.2f}"
        for name, f in list(figures.items())[1:]
    )
    if case in CLEAN:
        return f"{machine:7} {case.name:30} {ours['false_per_thousand']:.2f} alarms per 1,000 steps   {others}"
    bar = case.quiet_bar if machine == "quiet" else case.loaded_bar
    asked = f"(asked {bar})" if bar is not None else ""
    return f"{machine:7} {case.name:30} found {ours['found']:.2f} right {ours['right']:.2f} {asked:14} {others}"


if __name__ == "__main__":
    sys.exit(main())
