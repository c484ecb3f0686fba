"""Profiles: what strace and py-spy wrote, and the phases that system calls are put down to."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from observability import observe, profile, schema
from observability.read.trace_reader import read_trace
from tests import ROOT
from tests.helpers.step_records import START_NS, run_info, run_summary, step_record

STRACE = """\
31 1780000000.010000 openat(AT_FDCWD, "data.jsonl", O_RDONLY) = 3 <0.004000>
31 1780000000.011000 openat(AT_FDCWD, "none) = -1 <1.0>", O_RDONLY) = -1 ENOENT (No such file or directory) <0.001000>
32 1780000000.030000 futex(0x7f, FUTEX_WAIT, 0, NULL <unfinished ...>
31 1780000000.150000 write(3, "x = 1"..., 5) = 5 <0.002000>
32 1780000000.190000 <... futex resumed>) = 0 <0.160000>
31 1780000000.195000 --- SIGCHLD {si_signo=SIGCHLD} ---
31 1780000009.000000 read(3, "", 1) = 0 <0.500000>
31 1780000009.600000 +++ exited with 0 +++
"""


@pytest.fixture
def phases(tmp_path: Path) -> profile.Phases:
    """One step from 1780000000.0 to .2: data to .02, forward to .08, backward to .18, optimizer."""
    observer = observe(tmp_path)
    observer.run_started(run_info())
    observer.step_finished(step_record(1))
    observer.run_finished(run_summary(1))
    return profile.Phases(read_trace(tmp_path))


def test_calls_are_added_up_by_name_and_phase(phases: profile.Phases) -> None:
    totals = profile.total_calls(profile.read_calls(STRACE.splitlines()), phases)
    assert set(totals) == {"openat", "write", "futex", "read"}
    assert (totals["openat"].calls, totals["openat"].errors) == (2, 1)
    assert totals["openat"].seconds == pytest.approx(0.005)
    where = {name: set(total.phases) for name, total in totals.items()}
    # The futex wait began in forward: a resumed call's line bears the time of its end.
    assert where == {"openat": {"data"}, "write": {"backward"}, "futex": {"forward"}, "read": {profile.OUTSIDE}}


def test_phases_are_added_up(phases: profile.Phases) -> None:
    assert (phases.steps, phases.step_seconds) == (1, pytest.approx(0.2))
    assert phases.seconds() == pytest.approx({"data": 0.02, "forward": 0.06, "backward": 0.1, "optimizer": 0.02})
    assert phases.at(START_NS / 1e9 - 1) == profile.OUTSIDE


def test_functions_are_added_up_by_phase_without_what_they_call(phases: profile.Phases) -> None:
    def event(ms: float, kind: str, name: str, thread: int = 1) -> dict[str, Any]:
        return {"ph": kind, "name": name, "ts": ms * 1e3, "tid": thread, "args": {"filename": f"/x/{name}.py"}}

    told = [event(5, "B", "run"), event(15, "B", "wait"), event(20, "B", "other", 2), event(105, "E", "wait")]
    told += [event(125, "B", "wait"), event(155, "E", "wait"), event(175, "E", "run"), event(180, "E", "other", 2)]
    totals = profile.total_functions(profile.read_functions(told, START_NS / 1e9), phases)
    # `run` alone is at work from 5, 105 and 155 ms on, `wait` from 15 and 125 ms on.
    assert totals["run (run.py)"] == pytest.approx({"data": 0.01, "backward": 0.04})
    assert totals["wait (wait.py)"] == pytest.approx({"data": 0.01, "forward": 0.06, "backward": 0.05})
    assert set(totals) == {"run (run.py)", "wait (wait.py)"}
    lines = list(profile.function_report(totals, 1))
    assert lines[1:] == ["      0.120 s  wait (wait.py); in forward 50%, backward 42%, data 8%"]


RUN = """
import sys
from observability import observe
from tests.helpers.step_records import *
observer = observe(sys.argv[1])
observer.run_started(run_info())
observer.step_finished(step_record(1))
observer.run_finished(run_summary(1))
"""


def test_a_run_is_profiled_with_what_is_installed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "_py_spy", lambda: None)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    status = profile.main(["--anomaly", "--runs", ".", "--", sys.executable, "-c", RUN, "run"])
    said = capfd.readouterr().out
    assert status == 0
    assert "1 step of typically 200 ms: too few to tell normal from slow." in said
    assert "py-spy is not installed" in said
    assert "phases of 1 step, 0.20 s" in said
    assert ("strace is not installed" in said) == (shutil.which("strace") is None) != ("system calls, by" in said)


@pytest.mark.parametrize(
    ("code", "message"),
    [("raise SystemExit(3)", "ended with status 3"), ("pass", "left no trace under")],
)
def test_a_run_that_fails_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    monkeypatch.setattr(profile, "_py_spy", lambda: None)
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    old = tmp_path / "old" / schema.TRACE_FILE
    old.parent.mkdir()
    old.write_text("{}\n")
    os.utime(old, (0, 0))
    assert profile.main(["--runs", str(tmp_path), "--", sys.executable, "-c", code]) == 2
    assert capfd.readouterr().err.splitlines()[-1].endswith(message + (f" {tmp_path}" if "trace" in message else ""))


def test_a_command_that_is_not_there_is_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "_py_spy", lambda: None)
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    assert profile.main(["--", "/nowhere/entrenar-gpu"]) == 2
    assert capfd.readouterr().err == "profile_llama: /nowhere/entrenar-gpu: No such file or directory\n"
