"""What a reader believes first: how a run ended, time in no span, causes that the host tells, costs that add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.detection import grid, grid_cases
from observability import schema
from observability.detect import Analysis, Finding, LiveDetector, analyse, lost_in, time_lost, verdict
from observability.detect.detector import detect
from observability.detect.findings import BETWEEN_STEPS, DATA_STALL, DIVERGENCE, INTERFERENCE, SLOW_KERNEL, THROTTLE
from observability.read import StepTable
from tests.helpers import made_traces as made


def analysed(folder: Path, steps: list[made.Step], status: str | None = None, **facts: Any) -> Analysis:
    """The analysis of a trace of `steps`, with the `train` span of a run that ended with `status`."""
    named = {getattr(schema, key): value for key, value in facts.items()}
    lines = [json.dumps(line) for line in made.lines(steps, "run-1", of_run=named)]
    if status is not None:
        end = made.START_NS + 10**12
        train = made.span(schema.TRAIN, made.START_NS, end, 1, 0, "run-1", SPAN_LEVEL="run", RUN_STATUS=status)
        lines.append(json.dumps(made.request([train], {schema.RUN_ID: "run-1", **named})))
    path = folder / schema.TRACE_FILE
    path.write_text("\n".join(lines) + "\n")
    return analyse(folder)


@pytest.mark.parametrize(
    ("status", "beginning"),
    [
        ("failed: the device was lost", "Failed at step 60 of 100: the device was lost. "),
        ("interrupted", "Interrupted at step 60 of 100. "),
        (None, "Unfinished: the trace ends at step 60 of 100"),
        ("finished", "Unfinished: called finished at step 60 of 100. "),
    ],
)
def test_a_run_that_did_not_end_as_planned_says_so_first(tmp_path: Path, status: str | None, beginning: str) -> None:
    analysis = analysed(tmp_path, made.plain_steps(60), status, RUN_TOTAL_STEPS=100)
    assert verdict(analysis).startswith(beginning)
    assert "Healthy" not in verdict(analysis)
    assert beginning.startswith(str(analysis.to_json()["outcome"])[:20])


def test_a_run_that_ended_as_planned_is_healthy(tmp_path: Path) -> None:
    analysis = analysed(tmp_path, made.plain_steps(60), "finished", RUN_TOTAL_STEPS=60)
    assert verdict(analysis).startswith("Healthy: ")
    assert analysis.to_json()["outcome"] is None


def not_finite(step: made.Step) -> None:
    step.attributes |= {schema.LOSS: float("nan"), schema.SKIPPED: True}


def high(step: made.Step) -> None:
    step.attributes[schema.LOSS] = 6.0


@pytest.mark.parametrize(("fault", "words"), [(not_finite, "not finite in 40 steps in a row"), (high, "the loss rose")])
def test_divergence_is_a_finding_that_costs_no_time(
    tmp_path: Path, fault: Callable[[made.Step], None], words: str
) -> None:
    steps = made.plain_steps(120)
    for step in steps[80:]:
        fault(step)
    analysis = analysed(tmp_path, steps, "finished", RUN_TOTAL_STEPS=120)
    (finding,) = [f for f in analysis.alarms if f.cause == DIVERGENCE]
    assert words in finding.evidence
    assert finding.first_step == pytest.approx(81, abs=16)
    assert verdict(analysis).startswith(f"Diverged: {finding.evidence}. ")
    assert "costing 0" not in verdict(analysis)


def test_time_between_steps_is_named_and_counted(tmp_path: Path) -> None:
    """20 s pass before step 41: they are of the run, and no step's."""
    first, second = made.plain_steps(80)[:40], made.plain_steps(80)[40:]
    taken = sum(sum(step.phases.values()) for step in first) / 1e3
    lines = [*made.lines(first, "run-1")]
    lines += made.lines(second, "run-1", start=made.START_NS + round((taken + 20) * 1e9))
    for index, line in enumerate(lines):  # ids of the second part count on
        for span in line["resourceSpans"][0]["scopeSpans"][0]["spans"]:
            span["spanId"] = f"{index:08x}{span['spanId'][8:]}"
            if "parentSpanId" in span and span["parentSpanId"] != f"{1:016x}":
                span["parentSpanId"] = f"{index:08x}{span['parentSpanId'][8:]}"
    (tmp_path / schema.TRACE_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    analysis = analyse(tmp_path)
    (finding,) = analysis.alarms
    assert (finding.cause, finding.step) == (BETWEEN_STEPS, 41)
    assert lost_in(analysis, finding) == pytest.approx(20, rel=0.01)
    assert analysis.table.total_seconds == pytest.approx(28, rel=0.02)


def test_what_threads_waited_while_a_loader_was_late_is_taken_off_the_step_once(quiet: StepTable) -> None:
    """A late loader makes steps longer, and threads wait in all of it: what is left is no faster than before."""
    rng = np.random.default_rng(0)
    table, typical = grid.recording.rows(quiet, np.arange(100)), float(np.median(quiet.seconds))
    waits = np.where(rng.random(100) < 0.4, 0.0, typical * rng.uniform(0, 0.5, 100))
    late, rows = np.where(np.arange(100) >= 80, 4 * typical, 0.0), np.arange(100)
    table = grid_cases.added(table, rows, [grid_cases.kind_index(table, "forward")], waits)
    told = waits * (1 + late / table.seconds)
    table = grid_cases.added(table, rows, [grid_cases.kind_index(table, "data")], late)
    table = replace(table, values={**table.values, "run_delay_seconds": told, "others_cpu_seconds": told})
    found = alarms(table)
    assert {f.cause for f in found} == {"data-stall"}
    assert min(f.first_step for f in found) >= 80


def test_gaps_that_a_shared_machine_makes_all_the_time_are_counted_and_one_far_longer_is_told(
    loaded: StepTable,
) -> None:
    """Half of the steps wait for a processor before they begin: long or short, as it comes."""
    rng = np.random.default_rng(0)
    gaps = np.where(rng.random(150) < 0.5, 0.0, rng.exponential(0.4, 150)) * np.median(loaded.seconds)
    assert alarms(replace(loaded, between=gaps)) == []
    gaps[90] = 12 * np.median(loaded.seconds)
    (finding,) = alarms(replace(loaded, between=gaps))
    assert (finding.cause, finding.step) == (BETWEEN_STEPS, 91)


def test_a_stop_is_told_however_long_other_steps_waited(tmp_path: Path) -> None:
    """The host tells it apart: no program had the processors, and the process did not run."""
    rng = np.random.default_rng(0)
    table = analysed(tmp_path, made.plain_steps(136)).table
    waits = np.where(np.arange(136) < 100, 0.0, rng.uniform(1, 8, 136))  # seconds, from step 101 on
    held = np.where(np.arange(136) == 59, 2.0, 0.0)
    told = {"run_delay_seconds": waits, "others_cpu_seconds": waits, "held_seconds": held + waits}
    table = replace(table, seconds=table.seconds + waits + held, values={**table.values, **told})
    (finding,) = [f for f in alarms(table) if f.first_step <= 60 <= f.last_step]
    assert finding.cause == "interference"
    assert "the process did not run for 2" in finding.evidence


def alarms(table: StepTable) -> list[Finding]:
    return [finding for finding in detect(table)[0] if finding.is_alarm]


@pytest.fixture(scope="module")
def loaded() -> StepTable:
    """150 steps beside four programs that compute all the time."""
    return grid.windows("loaded", "tuning", 150)[5]


@pytest.fixture(scope="module")
def quiet() -> StepTable:
    """150 steps of a recording of a real run on a machine that did nothing else."""
    return grid.windows("quiet", "reported", 150)[3]


def test_no_sigma_comes_from_a_scale_of_zero(quiet: StepTable) -> None:
    """600 ms of data where it usually takes none is many steps, and not 500 billion sigmas."""
    row = np.array([70])
    (finding,) = alarms(grid_cases.added(quiet, row, [grid_cases.kind_index(quiet, "data")], np.array([0.6])))
    assert finding.cause == DATA_STALL
    assert finding.z < 0.6 / (0.02 * grid_cases.typical(quiet))


def test_a_layer_that_stays_slow_is_named_though_its_step_hardly_shows_it(quiet: StepTable) -> None:
    table, fault = grid_cases.slow_layer(0.10)(quiet, np.random.default_rng(1))
    (finding,) = alarms(table)
    assert (finding.cause, finding.span) == (SLOW_KERNEL, fault.span if fault else "")


def test_a_process_that_was_held_up_had_no_slow_kernel(quiet: StepTable) -> None:
    table, _ = grid_cases.single(5.0, "forward", (INTERFERENCE,), held=True)(quiet, np.random.default_rng(1))
    (finding,) = alarms(table)
    assert finding.cause == INTERFERENCE
    assert "the process did not run for" in finding.evidence


def test_throttling_names_clock_and_temperature(quiet: StepTable) -> None:
    table, _ = grid_cases.slower_gpu(0.3)(quiet, np.random.default_rng(1))
    reasons = np.full(len(table), "", dtype="<U9")
    reasons[75:] = "power cap"
    (finding,) = alarms(replace(table, throttle=reasons))
    assert finding.cause == THROTTLE
    assert "clock fell from 1980 to 1523 MHz at 5" in finding.evidence
    assert "power cap" in finding.evidence


def test_frequent_interference_is_priced_at_what_it_costs(quiet: StepTable) -> None:
    """A third of the steps, twice as long as they wait for a processor: no alarm, but a cost."""
    rows = np.flatnonzero(np.random.default_rng(3).random(150) < 0.35)
    waits = quiet.seconds[rows]
    table = grid_cases.stretched(quiet, rows, np.full(len(rows), 2.0))
    table = grid_cases.told(table, rows, "run_delay_seconds", lambda delay: delay + waits)
    findings, _ = detect(table)
    (priced,) = [finding for finding in findings if finding.cost is not None and finding.cause == INTERFERENCE]
    assert not priced.is_alarm
    assert priced.cost == pytest.approx(float(np.sum(waits)), rel=0.05)


def test_what_is_lost_adds_up(tmp_path: Path) -> None:
    steps = made.plain_steps(200)
    steps[100].phases["data"] += 400
    analysis = analysed(tmp_path, steps)
    assert time_lost(analysis) == pytest.approx(sum(lost_in(analysis, f) for f in analysis.losses))
    assert time_lost(analysis) == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize("machine", ["quiet", "loaded"])
def test_live_says_next_to_nothing_of_clean_steps(machine: str) -> None:
    """At most one live alarm in 20 clean windows of 150 steps."""
    told: list[Finding] = []
    for table in grid.windows(machine, "tuning", 150)[:20]:
        detector = LiveDetector(emit=lambda _: None, on_finding=told.append)
        for record in grid.records(table):
            detector.step_finished(record)
        detector.run_finished(None)
    assert len(told) <= 1
