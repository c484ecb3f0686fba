"""Profiles of a training run: its system calls (strace) and its Python functions (py-spy), joined with its spans.

`python -m observability.profile [--otlp [URL]] [--anomaly] [--runs DIR] [--top N] [-- COMMAND...]`

COMMAND is a training run that leaves a trace under DIR; without one, the demo. It runs once under each tool that is
installed, as two tracers would slow each other's view, and once bare where neither is: a run folder that it names must
not refuse a second run. System calls and samples carry the time at which they were made, so they are put down to the
phase of the step that was running then.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from observability.detect import number_of_steps
from observability.errors import TraceError
from observability.read import PHASE, RUN_STEP, SpanTable, newest_run, read_trace, trace_path

OUTSIDE = "outside the steps"
_COLLECTOR = "http://localhost:4318"
_SAMPLE_SECONDS = 0.01  # py-spy's own rate
_CALL = re.compile(
    r"^\d+\s+(?P<at>\d+\.\d+) (?P<resumed><\.\.\. )?(?P<name>\w+)[( ].*= (?P<result>\S+).*<(?P<seconds>\d+\.\d+)>$"
)


@dataclass(frozen=True)
class Call:
    """One finished system call; `at` is its start in seconds since the epoch."""

    name: str
    at: float
    seconds: float
    failed: bool


@dataclass
class CallTotal:
    """What all calls of one name come to."""

    seconds: float = 0.0
    calls: int = 0
    errors: int = 0
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # seconds by phase


def read_calls(lines: Iterable[str]) -> Iterator[Call]:
    """The calls of `strace -f -ttt -T`; signals, exits and the first halves of interrupted calls are passed over."""
    for line in lines:
        match = _CALL.match(line.rstrip("\n"))
        if match is None:
            continue
        at, seconds = float(match["at"]), float(match["seconds"])
        start = at - seconds if match["resumed"] else at  # a resumed call's line bears the time of its end
        yield Call(match["name"], start, seconds, match["result"] == "-1")


class Phases:
    """Which phase ran when, by a run's spans."""

    def __init__(self, spans: SpanTable) -> None:
        rows = np.flatnonzero(spans.level == PHASE)
        rows = rows[np.argsort(spans.start[rows], kind="stable")]
        self._start, self._end = spans.start[rows], spans.end[rows]
        self._names = [spans.label(int(row)) for row in rows]
        steps = spans.level == RUN_STEP
        self.steps = int(steps.sum())
        self.step_seconds = float((spans.end - spans.start)[steps].sum() / 1e9)

    def at(self, seconds: float) -> str:
        """The phase that ran `seconds` after the epoch; where two overlap, the one that began later."""
        when = round(seconds * 1e9)
        index = int(np.searchsorted(self._start, when, side="right")) - 1
        return self._names[index] if index >= 0 and when <= self._end[index] else OUTSIDE

    def seconds(self) -> dict[str, float]:
        """Time by phase over the run."""
        total: dict[str, float] = defaultdict(float)
        for name, start, end in zip(self._names, self._start, self._end, strict=True):
            total[name] += int(end - start) / 1e9
        return total


def total_calls(calls: Iterable[Call], phases: Phases | None) -> dict[str, CallTotal]:
    totals: dict[str, CallTotal] = defaultdict(CallTotal)
    for call in calls:
        total = totals[call.name]
        total.seconds += call.seconds
        total.calls += 1
        total.errors += call.failed
        if phases is not None:
            total.phases[phases.at(call.at)] += call.seconds
    return totals


def read_functions(events: Sequence[Mapping[str, Any]], began: float) -> Iterator[tuple[str, float]]:
    """What the main thread was in, sample by sample: (innermost function, seconds since the epoch).

    From py-spy's chrome trace: its events, in microseconds since it began, enter a function (B) or leave it.
    """
    main, last = events[0]["tid"] if events else None, 0.0
    stack: list[str] = []
    for event in events:
        if event["tid"] != main:
            continue
        at = began + event["ts"] / 1e6
        if stack:
            yield from ((stack[-1], float(when)) for when in np.arange(last, at, _SAMPLE_SECONDS))
        if event["ph"] == "B":
            stack.append(f"{event['name']} ({Path(event['args']['filename']).name})")
        elif stack:
            stack.pop()
        last = at


def total_functions(samples: Iterable[tuple[str, float]], phases: Phases) -> dict[str, dict[str, float]]:
    """Seconds by function and phase."""
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, at in samples:
        totals[name][phases.at(at)] += _SAMPLE_SECONDS
    return totals


def _largest(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])


def phase_report(phases: Phases, source: Path) -> Iterator[str]:
    yield f"phases of {number_of_steps(phases.steps)}, {phases.step_seconds:.2f} s ({source})"
    for name, seconds in _largest(phases.seconds()):
        yield f"  {seconds / max(phases.step_seconds, 1e-9):6.1%} {seconds:9.3f} s  {name}"


def call_report(totals: dict[str, CallTotal], top: int) -> Iterator[str]:
    yield "system calls, by the time spent in them, waits and all threads included"
    for name, total in sorted(totals.items(), key=lambda item: -item[1].seconds)[:top]:
        errors = f", {total.errors} failed" if total.errors else ""
        yield f"  {total.seconds:9.3f} s  {name}: {total.calls} calls{errors}{_where(total.phases)}"


def function_report(totals: Mapping[str, Mapping[str, float]], top: int) -> Iterator[str]:
    yield "functions of the main thread, by the time in them alone, waits included"
    for name, phases in sorted(totals.items(), key=lambda item: -sum(item[1].values()))[:top]:
        yield f"  {sum(phases.values()):9.3f} s  {name}{_where(phases)}"


def _where(phases: Mapping[str, float]) -> str:
    """The three phases with most of the time, for the end of a line."""
    whole = max(sum(phases.values()), 1e-9)
    shares = ", ".join(f"{phase} {seconds / whole:.0%}" for phase, seconds in _largest(phases)[:3])
    return f"; in {shares}" if shares else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile a run and print what was found; exit status 2 for what the user can mend."""
    own, command = _split(list(sys.argv[1:] if arguments is None else arguments))
    parser = argparse.ArgumentParser(prog="profile_llama", description="Profile a training run.")
    parser.add_argument("--otlp", nargs="?", const=_COLLECTOR, metavar="URL", help="send spans to a collector too")
    parser.add_argument("--anomaly", action="store_true", help="end with the anomaly report")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that run folders are made in")
    parser.add_argument("--top", type=int, default=10, help="lines of each list")
    options = parser.parse_args(own)
    if options.otlp:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = options.otlp
    try:
        trace = _profile(command or _demo(), options.runs, options.top)
    except TraceError as error:
        print(f"profile_llama: {error}", file=sys.stderr)
        return 2
    if options.anomaly:
        return subprocess.run([sys.executable, "-m", "observability.report", trace], check=False).returncode
    return 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before `--` and after it."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _demo() -> list[str]:
    return [str(Path(sys.executable).with_name("entrenar-gpu")), "demo"]


def _profile(command: list[str], runs: Path, top: int) -> Path:
    """Run `command` under what is installed, print the lists, give the last run's trace."""
    strace, py_spy = shutil.which("strace"), _py_spy()
    if strace is None:
        print("strace is not installed (apt-get install strace): no system calls")
    if py_spy is None:
        print("py-spy is not installed (pip install py-spy): no functions")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "profile"
        trace = None
        if strace is not None:
            trace = _run([strace, "-f", "-ttt", "-T", "-qq", "-o", str(output), *command], runs)
            phases = Phases(read_trace(trace))
            with output.open(encoding="utf-8", errors="replace") as lines:
                totals = total_calls(read_calls(lines), phases)
            print(*phase_report(phases, trace), *call_report(totals, top), sep="\n")
        if py_spy is not None:
            # With --idle a wait counts for the function that waits, not for the last one seen before it.
            to_file, began = ["--format", "chrometrace", "--output", str(output)], time.time()
            trace = _run([py_spy, "record", "--idle", *to_file, "--", *command], runs)
            phases = Phases(read_trace(trace))
            functions = total_functions(read_functions(json.loads(output.read_bytes()), began), phases)
            print(*phase_report(phases, trace), *function_report(functions, top), sep="\n")
        if trace is None:
            trace = _run(command, runs)
            print(*phase_report(Phases(read_trace(trace)), trace), sep="\n")
    return trace


def _py_spy() -> str | None:
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


def _run(command: list[str], runs: Path) -> Path:
    """Run a command to its end; the trace of the run that it made."""
    start = time.time()
    try:
        status = subprocess.run(command, check=False).returncode
    except OSError as error:
        raise TraceError(f"{command[0]}: {error.strerror}") from None
    if status != 0:
        raise TraceError(f"{' '.join(command)}: ended with status {status}")
    trace = trace_path(newest_run(runs))
    if trace.stat().st_mtime < start:
        raise TraceError(f"{' '.join(command)}: left no trace under {runs}")
    return trace


if __name__ == "__main__":
    sys.exit(main())
