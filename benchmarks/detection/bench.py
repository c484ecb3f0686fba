"""The benchmark of detection: recorded clean steps, faults put in, alarms scored by event.

Tuning draws and reported draws differ in their seeds and in the recorded steps they rest on: segments alternate
between the two. Detector constants were chosen, and the rivals' thresholds are chosen here, on tuning draws alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from benchmarks.detection import faults, recording
from benchmarks.detection.rivals import QUANTILES, RIVALS, events_above
from benchmarks.detection.scoring import Event, Tally, events_of, tally
from observability.detect.detector import detect
from observability.read.step_table import StepTable

SEGMENT: Final = 1000  # steps a run
CURVE: Final = (2, 3, 4, 5, 6, 8, 10, 12)  # sigmas
SEEDS: Final = {"tuning": 1000, "reported": 2000}
Detector = Callable[[StepTable], list[Event]]
Size = Callable[[str, StepTable, np.random.Generator], float]


def segments(which: str) -> list[StepTable]:
    """The recorded runs of one half, "tuning" or "reported"."""
    table, _ = recording.load()
    starts = range(0, len(table) - SEGMENT + 1, SEGMENT)
    chosen = list(starts)[0 if which == "tuning" else 1 :: 2]
    return [recording.rows(table, np.arange(start, start + SEGMENT)) for start in chosen]


def ours(table: StepTable) -> list[Event]:
    findings, _ = detect(table)
    return events_of(findings)


def clean_runs(which: str, detector: Detector) -> Tally:
    result = Tally()
    for index, base in enumerate(segments(which)):
        table = faults.with_checkpoints(base, _rng(which, "clean", index))
        result.add(tally(detector(table), [], len(table)))
    return result


def faulty_runs(which: str, kind: str, size: Size | float, draws: int, detector: Detector) -> Tally:
    """`draws` runs a segment with faults of `kind`; `size` is in sigmas, or chooses the size for each run."""
    result = Tally()
    for index, base in enumerate(segments(which)):
        for draw in range(draws):
            rng = _rng(which, kind, index, draw, size if isinstance(size, float) else size.__name__)
            chosen = size if isinstance(size, float) else size(kind, base, rng)
            table, placed = faults.KINDS[kind](faults.with_checkpoints(base, rng), faults.sigma(base), chosen, rng)
            result.add(tally(detector(table), placed, len(table), f"segment {index} draw {draw} size {chosen:.1f}"))
    return result


def _rng(which: str, *parts: object) -> np.random.Generator:
    return np.random.default_rng([SEEDS[which], zlib.crc32(repr(parts).encode())])


def tuned_rivals(draws: int) -> dict[str, Detector]:
    """The rivals with, for each, the quantile of scores that did best on the tuning draws."""
    return {name: _tuned(name, draws) for name in RIVALS}


def _tuned(name: str, draws: int) -> Detector:
    scorer = RIVALS[name]

    def at(quantile: float) -> Detector:
        return lambda table: events_above(scores := scorer(table), float(np.quantile(scores, quantile)))

    def f1(quantile: float) -> float:
        result = clean_runs("tuning", at(quantile))
        for kind in faults.KINDS:
            result.add(faulty_runs("tuning", kind, faults.large_size, draws, at(quantile)))
        return result.f1

    return at(max(QUANTILES, key=f1))


def measure(which: str, detector: Detector, draws: int) -> dict[str, Any]:
    """Every figure of one detector on one half of the data."""
    clean = clean_runs(which, detector)
    large = {kind: faulty_runs(which, kind, faults.large_size, draws, detector) for kind in faults.KINDS}
    stated = {kind: faulty_runs(which, kind, faults.stated_size, draws, detector) for kind in faults.STATED}
    total, curve = Tally(), {}
    for result in large.values():
        total.add(result)
    for size in CURVE:
        curve[size] = Tally()
        for kind in faults.KINDS:
            curve[size].add(faulty_runs(which, kind, float(size), draws, detector))
    return {"clean": clean, "large": large, "stated": stated, "total": total, "curve": curve}
