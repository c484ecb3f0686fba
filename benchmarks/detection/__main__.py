"""Runs the benchmark of detection, or records the step times that it rests on.

python -m benchmarks.detection                          table on the terminal, figures in results.json
python -m benchmarks.detection --tuning                 the tuning half, for whoever changes the detector
python -m benchmarks.detection record RUN -- COMMAND    COMMAND trains into folder RUN; its times are kept
(the grid's recordings with --output FILE, the loaded ones with --beside 4: so many programs compute meanwhile)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.detection import bench, faults, recording
from benchmarks.detection.scoring import Tally

RESULTS = Path(__file__).with_name("results.json")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection", description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=10, help="runs with faults for each recorded run, kind and size")
    parser.add_argument("--tuning", action="store_true", help="the tuning half of the data, without the rivals")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    commands = parser.add_subparsers(dest="command")
    record = commands.add_parser("record", help="record step times of a real run")
    record.add_argument("--output", type=Path, default=recording.FILE, help="where they go (default: recorded.npz)")
    record.add_argument("--beside", type=int, default=0, help="programs that compute beside it, all the time")
    record.add_argument("run", type=Path, help="run folder that COMMAND trains into")
    record.add_argument("training", nargs="+", metavar="COMMAND", help="what to run")
    options = parser.parse_args()
    if options.command == "record":
        from benchmarks.detection.record import record_run

        record_run(options.run, options.training, options.output, options.beside)
        return 0
    which = "tuning" if options.tuning else "reported"
    detectors = {"this detector": bench.ours} | (
        {} if options.tuning else bench.tuned_rivals(max(options.draws // 5, 1))
    )
    measured = {name: bench.measure(which, detector, options.draws) for name, detector in detectors.items()}
    _show(which, measured)
    if not options.tuning:
        options.json.write_text(json.dumps(_figures(measured), indent=1) + "\n")
    return 0


def _show(which: str, measured: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    noise = ", ".join(f"{faults.sigma(run) / np.median(run.seconds):.1%}" for run in bench.segments(which))
    console.print(f"{which} half: runs of {bench.SEGMENT} recorded steps, whose own sigma is {noise} of a step")
    table = Table("", *measured)
    ours = next(iter(measured.values()))
    rows = [("false alarms in 1,000 clean steps", lambda m: f"{m['clean'].false_per_thousand:.2f}")]
    rows += [(f"{kind}, at least 6 sigmas", lambda m, kind=kind: _kind(m["large"][kind])) for kind in ours["large"]]
    rows += [
        ("all, at least 6 sigmas: F1", lambda m: f"{m['total'].f1:.3f}"),
        ("right cause named", lambda m: f"{m['total'].cause_rate:.1%}" if m["total"].cause_right else "-"),
        *((f"{kind}, size as stated", lambda m, kind=kind: _kind(m["stated"][kind])) for kind in faults.STATED),
        *((f"F1 at {size} sigmas", lambda m, size=size: f"{m['curve'][size].f1:.3f}") for size in bench.CURVE),
    ]
    for title, cell in rows:
        table.add_row(title, *(cell(figures) for figures in measured.values()))
    console.print(table)


def _kind(result: Tally) -> str:
    if result.decoys:
        return f"{result.decoys_flagged} of {result.decoys} flagged"
    return f"{result.found} of {result.faults} found"


def _figures(measured: dict[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Tally):
            return value.figures()
        return {str(key): plain(item) for key, item in value.items()}

    _, about = recording.load()
    return {"recorded": {key: value for key, value in about.items() if key != "kinds"}, **plain(measured)}


if __name__ == "__main__":
    sys.exit(main())
