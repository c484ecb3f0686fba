"""What was told live stands in the report: confirmed, or withdrawn with the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from observability import observe, schema
from observability.detect import LiveDetector
from observability.detect.analysis import Analysis, analyse
from observability.detect.findings import LONGER_BATCH
from observability.read import Told
from observability.report.command import report
from tests.helpers import made_traces as made
from tests.helpers.step_records import run_info, run_summary, step_record
from tests.observability.detect.test_live import records


def watched(folder: Path, steps: list[made.Step]) -> list[str]:
    """A run traced into `folder` with the live detector beside it; the lines that were told."""
    lines: list[str] = []
    tracer = observe(folder)
    tracer.run_started(run_info(total_steps=len(steps)))
    detector = LiveDetector(emit=lines.append, on_finding=tracer.told)
    for made_step in records(steps):
        record = step_record(**vars(made_step))
        detector.step_finished(record)
        tracer.step_finished(record)
    detector.run_finished(None)
    tracer.run_finished(run_summary(len(steps)))
    return lines


def test_what_was_told_is_in_the_trace_and_confirmed(tmp_path: Path) -> None:
    steps = made.plain_steps(120)
    steps[79].phases["data"] += 60
    lines = watched(tmp_path, steps)
    assert len(lines) == 2  # the anomaly, and the count at the end
    page = tmp_path / "r.html"
    (judged,) = report(str(tmp_path), html=str(page), json_out=str(tmp_path / "r.json")).judged
    assert (judged.told.cause, judged.told.first_step, judged.status) == ("data-stall", 80, "confirmed")
    assert "Told while it ran" in page.read_text(encoding="utf-8")
    assert '"status": "confirmed"' in (tmp_path / "r.json").read_text()


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    steps = made.plain_steps(200)
    steps[150].attributes[schema.ROW_TOKENS] *= 2
    steps[150].attributes[schema.TOKENS] *= 2
    for times in (steps[150].phases, steps[150].layers):
        for name in times:
            times[name] *= 2
    made.slow_layer(steps[120], "backward 1", 50)
    return analyse(made.write(tmp_path_factory.mktemp("told") / "trace.jsonl", steps))


@pytest.mark.parametrize(
    ("cause", "step", "status", "reason"),
    [
        ("spike", 60, "withdrawn", "over the whole run it is "),
        ("spike", 151, "withdrawn", "explained, longer batches: "),
        ("spike", 999, "withdrawn", "the trace has no such step"),
        ("spike", 121, "confirmed", "as slow-kernel: "),
        ("slow-kernel", 121, "confirmed", ""),
    ],
)
def test_each_line_is_confirmed_or_withdrawn(
    analysis: Analysis, cause: str, step: int, status: str, reason: str
) -> None:
    assert any(f.cause == LONGER_BATCH for f in analysis.explained)
    told = Told(cause, "high", step, step, step, "step", "slow")
    (judged,) = replace(analysis, table=replace(analysis.table, told=(told,))).judged
    assert judged.status == status
    assert judged.reason.startswith(reason)
    assert bool(judged.reason) == bool(reason)


def test_a_stretch_that_turned_out_to_be_normal_is_withdrawn(analysis: Analysis) -> None:
    told = Told("throttle", "high", 20, 20, 100, "step", "+30% for 80 steps")
    (judged,) = replace(analysis, table=replace(analysis.table, told=(told,))).judged
    assert judged.status == "withdrawn"
    assert "these steps take 99" in judged.reason or "these steps take 100" in judged.reason
