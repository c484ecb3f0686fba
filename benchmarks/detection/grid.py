"""The second benchmark: a grid of faults in windows of recordings of a quiet, a loaded and a changing machine.

On the loaded one four programs compute all the time, beside whatever else it does. On the changing one compilers and
test suites come and go, so that what is called clean there has real interference in it. A fault's size is a share of
the step's median (of a layer's own, for a layer), so a found share says what a user would have been told. Tuning and
reported draws come from different recordings.

A sustained fault is found by an alarm that covers at least a third of its steps; a periodic one by an alarm that is
periodic or covers as much; a single one by any alarm on its step. The cause is right where the alarm that covers most
names it, and the kind of span at fault where there is one.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np

from benchmarks.detection import recording
from benchmarks.detection.grid_cases import CLEAN, OTHER, SUSTAINED, Case, Placed, Rng
from benchmarks.detection.rivals import RIVALS, events_above, median_shift
from benchmarks.detection.scoring import Event
from observability.detect import Finding, LiveDetector
from observability.detect.detector import detect
from observability.detect.findings import COMPILE
from observability.read import HOST_VALUES, StepTable

RECORDINGS: Final = Path(__file__).with_name("recordings")
MACHINES: Final = ("quiet", "loaded", "changing")
WINDOW: Final = 150
LENGTHS: Final = (8, 16, 30, 60, 1000, 10_000)  # of clean runs


@dataclass
class Score:
    """Counts of one case: runs, faults found, causes right, alarms on steps that carry no fault, steps.

    `causes` are those of the alarms on runs without a fault.
    """

    runs: int = 0
    found: int = 0
    right: int = 0
    false_alarms: int = 0
    steps: int = 0
    causes: Counter[str] = field(default_factory=Counter)

    def figures(self) -> dict[str, Any]:
        runs = max(self.runs, 1)
        alarms = {"alarms": dict(self.causes)} if self.causes else {}
        return alarms | {
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
        score.causes.update(alarm.cause for alarm in alarms)
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


def alarms_by_length(machine: str, which: str, detect: Detect) -> dict[str, dict[str, Any]]:
    """Alarms on clean runs of other lengths; longer ones than the recording go through it again and again."""
    table, _ = recording.load(RECORDINGS / f"{machine}_{which}.npz")
    figures = {}
    for length in LENGTHS:
        count = max(len(table) // length, 1)
        score = Score()
        for index in range(count):
            rows = np.arange(index * length, (index + 1) * length) % len(table)
            judged((recording.rows(table, rows), None), detect, score)
        told = score.figures()
        figures[str(length)] = {key: told[key] for key in ("runs", "alarms", "false_per_thousand") if key in told}
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
    parser.add_argument("--machine", action="append", choices=MACHINES, help="only this machine; may be given again")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    which = "tuning" if options.tuning else "reported"
    figures: dict[str, Any] = {"which": which, "length": options.length, "draws": options.draws}
    for machine in options.machine or MACHINES:
        detectors: dict[str, Detect] = {"this detector": lambda table: detect(table)[0]}
        if not (options.tuning or options.alone or machine == "changing"):
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


def _line(machine: str, case: Case, figures: dict[str, dict[str, Any]]) -> str:
    ours = figures["this detector"]
    others = " ".join(
        f"{name} {f['false_per_thousand'] if case in CLEAN else f['found']:.2f}"
        for name, f in list(figures.items())[1:]
    )
    if case in CLEAN:
        causes = ", ".join(f"{count} {cause}" for cause, count in ours.get("alarms", {}).items())
        told = f"{ours['false_per_thousand']:.2f} alarms per 1,000 steps" + (f" ({causes})" if causes else "")
        return f"{machine:7} {case.name:30} {told}   {others}"
    bar = case.quiet_bar if machine == "quiet" else case.loaded_bar
    asked = f"(asked {bar})" if bar is not None else ""
    return f"{machine:7} {case.name:30} found {ours['found']:.2f} right {ours['right']:.2f} {asked:14} {others}"


if __name__ == "__main__":
    sys.exit(main())
