"""Real faults in a real run, each found and named: a slow loader, a stopped process, a slow disk, busy processors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from observability.detect import Finding
from observability.detect.analysis import Analysis, analyse
from tests import ROOT
from tests.helpers.faulty_run import BUSY, DISK, LOADER, STEPS, STOPPED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="signals, and what the host tells, are Linux's"),
]


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "tests.helpers.faulty_run", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return analyse(folder / "run")


def found(analysis: Analysis, cause: str, first: int, last: int) -> list[Finding]:
    """Alarms of this cause on these steps; the host is up to two steps ahead of the device."""
    return [f for f in analysis.alarms if f.cause == cause and f.first_step <= last + 2 and f.last_step >= first]


def test_a_slow_loader_is_found_and_named(analysis: Analysis) -> None:
    (finding,) = found(analysis, "data-stall", LOADER, LOADER)
    assert finding.seconds >= 0.9
    assert "data took" in finding.evidence


def test_a_stopped_process_is_found_and_named(analysis: Analysis) -> None:
    findings = found(analysis, "interference", STOPPED, STOPPED)
    assert findings, analysis.alarms
    assert any("the process did not run for" in finding.evidence for finding in findings)


def test_a_slow_disk_is_found_and_named(analysis: Analysis) -> None:
    (finding,) = found(analysis, "checkpoint-stall", DISK, DISK)
    assert finding.seconds >= 0.9
    assert "checkpoint write took" in finding.evidence


def test_busy_processors_are_found_and_named(analysis: Analysis) -> None:
    told = [f for f in analysis.findings if f.cause == "interference" and f.last_step >= BUSY]
    covered = {step for f in told for step in range(max(f.first_step, BUSY), f.last_step + 1)}
    assert len(covered) >= (STEPS - BUSY) / 2, analysis.findings
    assert any("waited" in finding.evidence for finding in told)


def test_what_was_told_live_of_them_stands(analysis: Analysis) -> None:
    causes = {judged.told.cause for judged in analysis.judged if judged.status == "confirmed"}
    assert {"data-stall", "checkpoint-stall", "interference"} <= causes
