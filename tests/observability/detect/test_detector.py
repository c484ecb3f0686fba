"""The detector on made-up steps: each cause named with its evidence, and nothing said of healthy runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from observability import schema
from observability.detect.analysis import Analysis, analyse, lost_in, time_lost, verdict
from observability.detect.baseline import noise_scale, score, work_exponent
from observability.detect.clusters import cluster_steps
from observability.detect.detector import detect
from observability.detect.findings import CAUSES, Finding, duration, in_a_row, severity
from observability.detect.periodic import find_period
from observability.detect.sustained import find_shifts
from observability.read.step_table import step_table
from observability.read.trace_reader import read_trace
from tests.helpers import made_traces as made

Change = Callable[[list[made.Step]], None]


def alarms_of(folder: Path, steps: list[made.Step]) -> list[Finding]:
    findings, _ = detect(step_table(read_trace(made.write(folder / "trace.jsonl", steps)), "made up"))
    return [finding for finding in findings if finding.is_alarm]


def analysed(folder: Path, steps: list[made.Step]) -> Analysis:
    return analyse(made.write(folder / "trace.jsonl", steps))


def only(folder: Path, steps: list[made.Step]) -> Finding:
    """The one alarm of a run."""
    (finding,) = alarms_of(folder, steps)
    return finding


def slower(steps: list[made.Step], factor: float) -> None:
    for step in steps:
        for times in (step.phases, step.layers):
            for name in times:
                times[name] *= factor


@pytest.mark.parametrize("seed", range(3))
def test_healthy_runs_raise_no_alarm(tmp_path: Path, seed: int) -> None:
    assert alarms_of(tmp_path, made.plain_steps(400, seed)) == []


def test_a_machine_with_heavy_tails_raises_few_alarms(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    steps = made.plain_steps(500)
    for step in steps:
        if rng.random() < 0.1:
            slower([step], 1 + rng.exponential(0.1))
    assert len(alarms_of(tmp_path, steps)) <= 2  # by the median absolute deviation alone: over twenty


def test_verdict_of_a_healthy_run(tmp_path: Path) -> None:
    assert verdict(analysed(tmp_path, made.plain_steps(100))).startswith("Healthy: 100 steps of typically ")


def test_slow_data(tmp_path: Path) -> None:
    steps = made.plain_steps(200)
    steps[120].phases["data"] += 60
    finding = only(tmp_path, steps)
    assert (finding.cause, finding.step, finding.span, finding.severity) == ("data-stall", 121, "data", "high")
    assert finding.seconds == pytest.approx(0.065, abs=0.001)
    assert "data took 64.9 ms instead of 4.99 ms" in finding.evidence


def test_slow_layer_in_one_pass(tmp_path: Path) -> None:
    steps = made.plain_steps(200)
    made.slow_layer(steps[120], "backward 1", 40)
    finding = only(tmp_path, steps)
    assert (finding.cause, finding.span) == ("slow-kernel", "layer 1 (backward)")


@pytest.mark.parametrize("layers", [True, False])
def test_a_slow_phase_whose_layers_are_well_or_not_told(tmp_path: Path, layers: bool) -> None:
    steps = made.plain_steps(200)
    for step in steps:
        step.layers = step.layers if layers else {}
    steps[120].phases["forward"] += 40
    finding = only(tmp_path, steps)
    assert (finding.cause, finding.span) == ("slow-kernel", "forward")


def test_a_pass_whose_layers_are_all_slow_is_no_one_layer(tmp_path: Path) -> None:
    steps = made.plain_steps(200)
    for layer in range(made.LAYERS):
        made.slow_layer(steps[120], f"forward {layer}", 20)
    assert only(tmp_path, steps).cause == "spike"


def test_slow_kernel_is_named_with_its_shape(tmp_path: Path) -> None:
    steps = made.plain_steps(60)
    for step in steps:
        step.kernels = 1
    made.slow_layer(steps[40], "backward 1", 40)
    assert only(tmp_path, steps).span == "matmul 0 512x64x64"


@pytest.mark.parametrize("inside", [True, False])
def test_slow_checkpoint(tmp_path: Path, inside: bool) -> None:
    steps = made.plain_steps(200)
    for step in steps[19::20]:
        step.checkpoint_beside = 4
    steps[119].checkpoint_beside = 0 if inside else 290
    if inside:
        steps[119].phases["checkpoint"] = 290
    finding = only(tmp_path, steps)
    assert (finding.cause, finding.step, finding.span) == ("checkpoint-stall", 120, "checkpoint")
    assert "checkpoint write took 290 ms" in finding.evidence


def test_checkpoints_of_the_usual_cost_are_routine_but_counted(tmp_path: Path) -> None:
    steps = made.plain_steps(300)
    for step in steps[4::5]:
        step.checkpoint_beside = 120
    analysis = analysed(tmp_path, steps)
    assert analysis.alarms == []
    (costly,) = analysis.explained
    assert costly.cause == "checkpoint-stall"
    assert "60 checkpoints took 7.2 s, 19% of the run" in costly.evidence


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_checkpoints_of_one_cost_are_routine(tmp_path: Path, count: int) -> None:
    steps = made.plain_steps(200)
    for step in steps[39 :: 160 // count][:count]:
        step.checkpoint_beside = 50 if count == 1 else 150
    assert alarms_of(tmp_path, steps) == []


def test_one_slow_checkpoint_of_two(tmp_path: Path) -> None:
    steps = made.plain_steps(200)
    steps[49].checkpoint_beside, steps[149].checkpoint_beside = 60, 290
    assert only(tmp_path, steps).step == 150


def pause(name: str, step: int, ms: float) -> str:
    """A line of the trace with a pause after (for 0 before) that step."""
    start = made.START_NS + (step * 100 - 2000) * made.MS
    attributes = {"SPAN_LEVEL": "phase", "STEP_NUMBER": step}
    span = made.span(name, start, start + ms * made.MS, 10**9 + step, 1, "run-1", **attributes)
    return json.dumps(made.request([span], {schema.RUN_ID: "run-1"})) + "\n"


@pytest.mark.parametrize(
    ("evaluations", "resumed", "slow"),
    [
        ({0: 1490, 10: 247, 20: 247}, (), None),
        ({0: 1490, 30: 247}, (), None),
        ({0: 1490, 10: 247, 20: 900, 30: 247}, (), 20),
        ({0: 247, 10: 1490, 20: 247, 30: 247}, (), 10),
        ({0: 1490, 10: 1490, 20: 247, 30: 247}, (5,), None),
        ({0: 1490, 20: 247, 30: 247}, (3, 5), None),
        ({0: 1490, 10: 1490, 20: 900, 30: 247}, (5,), 20),
    ],
)
def test_the_first_evaluation_of_a_run_and_of_a_resumed_part_is_cold(
    tmp_path: Path, evaluations: dict[int, float], resumed: tuple[int, ...], slow: int | None
) -> None:
    lines = "".join(pause("eval", step, ms) for step, ms in reversed(evaluations.items()))
    path = made.write(tmp_path / "t.jsonl", made.plain_steps(30), tail=lines)
    table = replace(step_table(read_trace(path), "made up"), restarts=resumed)
    assert [(f.step, f.span) for f in detect(table)[0] if f.is_alarm] == ([(slow, "eval")] if slow else [])


def test_a_pause_of_a_step_that_the_trace_lacks_counts_as_a_step(tmp_path: Path) -> None:
    analysis = analyse(made.write(tmp_path / "t.jsonl", made.plain_steps(40), tail=pause("checkpoint", 41, 400)))
    assert "; 1 of them out of the ordinary, costing 400 ms" in verdict(analysis)


def test_spike_of_every_phase(tmp_path: Path) -> None:
    steps = made.plain_steps(200)
    slower(steps[120:121], 2)
    finding = only(tmp_path, steps)
    assert (finding.cause, finding.step, finding.span) == ("spike", 121, "step")
    assert "time lost in backward 59%, forward 31%" in finding.evidence


def test_parts_of_a_lost_second_are_no_more_than_the_whole(tmp_path: Path) -> None:
    """Phases that are each over their own baseline may be over by more than the step is over its."""
    table = step_table(read_trace(made.write(tmp_path / "trace.jsonl", made.plain_steps(200))), "made")
    table.durations[120] *= 2
    table.seconds[120] *= 1.5
    (finding,) = [f for f in detect(table)[0] if f.is_alarm and f.step == 121]
    shares = [int(share) for share in re.findall(r"(\d+)%", finding.evidence)]
    assert shares
    assert sum(shares) <= 101


def test_time_outside_every_phase_is_said(tmp_path: Path) -> None:
    steps = made.plain_steps(200)
    lines = list(made.lines(steps, "r"))
    head = lines[120]["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    head["endTimeUnixNano"] = str(int(head["endTimeUnixNano"]) + 80 * made.MS)
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    findings, _ = detect(step_table(read_trace(path), "made up"))
    evidence = next(finding.evidence for finding in findings if finding.step == 121)
    assert re.search(r"(78|79|80)\.?\d* ms of it outside every phase", evidence)


def test_throttle_has_its_stretch(tmp_path: Path) -> None:
    steps = made.plain_steps(500)
    slower(steps[250:400], 1.2)
    finding = only(tmp_path, steps)
    assert finding.cause == "throttle"
    assert abs(finding.first_step - 251) <= 10
    assert abs(finding.last_step - 400) <= 10
    assert "+20%" in finding.evidence


def test_sigmas_of_what_took_nothing_before_can_be_believed(tmp_path: Path) -> None:
    steps = made.plain_steps(200)
    for step in steps:
        step.phases["data"] = 0.0
    for step in steps[100:]:
        step.phases["data"] = 70.0
    finding = only(tmp_path, steps)
    assert (finding.cause, finding.severity) == ("data-stall", "high")
    assert finding.z <= 200


def test_a_throttle_that_begins_before_the_baseline_is_known(tmp_path: Path) -> None:
    steps = made.plain_steps(600)
    slower(steps[20:160], 1.2)
    finding = only(tmp_path, steps)
    assert (finding.cause, finding.last_step) == ("throttle", 160)
    assert finding.first_step <= 31


def test_two_throttles_of_a_short_run(tmp_path: Path) -> None:
    steps = made.plain_steps(300)
    slower(steps[90:130], 1.2)
    slower(steps[180:220], 1.3)
    assert [(f.cause, f.first_step, f.last_step) for f in alarms_of(tmp_path, steps)] == [
        ("throttle", pytest.approx(91, abs=7), pytest.approx(130, abs=7)),
        ("throttle", pytest.approx(181, abs=7), pytest.approx(220, abs=7)),
    ]


def test_a_throttle_of_a_short_run(tmp_path: Path) -> None:
    steps = made.plain_steps(48)
    slower(steps[24:], 1.2)
    finding = only(tmp_path, steps)
    assert (finding.cause, finding.first_step, finding.last_step) == ("throttle", 25, 48)


def test_drift_has_its_slope(tmp_path: Path) -> None:
    steps = made.plain_steps(600)
    for index, step in enumerate(steps[200:]):
        slower([step], 1 + index / 1000)
    finding = only(tmp_path, steps)
    assert finding.cause == "drift"
    assert abs(finding.first_step - 201) <= 60
    assert "every 10 steps" in finding.evidence
    assert 0.006 < float(finding.evidence.split("%")[0]) / 100 < 0.013


def test_sustained_slowdown_of_one_layer_is_that_layer(tmp_path: Path) -> None:
    steps = made.plain_steps(500)
    for step in steps[250:]:
        made.slow_layer(step, "forward 2", 12)
    finding = only(tmp_path, steps)
    assert (finding.cause, finding.span) == ("slow-kernel", "layer 2 (forward)")
    assert finding.last_step == 500


def test_periodic_pause_has_its_period(tmp_path: Path) -> None:
    steps = made.plain_steps(500)
    for step in steps[30::25]:
        slower([step], 1.4)
    finding = only(tmp_path, steps)
    assert (finding.cause, finding.first_step) == ("periodic", 31)
    assert "every 25 steps" in finding.evidence


@pytest.mark.parametrize(("steps", "every"), [(300, 50), (300, 3), (1000, 200)])
def test_pauses_that_are_rare_or_make_up_a_third(tmp_path: Path, steps: int, every: int) -> None:
    run = made.plain_steps(steps)
    for step in run[every - 1 :: every]:
        step.phases["optimizer"] += 30
    finding = only(tmp_path, run)
    assert (finding.cause, finding.first_step) == ("periodic", every)
    assert f"every {every} steps" in finding.evidence


def test_separate_large_spikes_are_no_noise_however_many(tmp_path: Path) -> None:
    steps = made.plain_steps(300)
    slow = [23, 61, 70, 118, 133, 190, 204, 252, 271]  # 3% of the steps
    for index in slow:
        slower([steps[index]], 2)
    found = alarms_of(tmp_path, steps)
    assert [(f.cause, f.step) for f in found] == [("spike", index + 1) for index in slow]


def test_a_resumed_run_compiles_again_and_is_judged_as_a_whole(tmp_path: Path) -> None:
    steps = made.plain_steps(200)
    for row in (0, 80, 120):
        slower([steps[row]], 5)
    steps[40].phases["data"] += 60
    steps[150].phases["data"] += 60
    table = step_table(read_trace(made.write(tmp_path / "t.jsonl", steps)), "made up")
    findings, scored = detect(replace(table, restarts=(80, 120)))
    assert [(f.step, f.cause) for f in findings if f.is_alarm] == [
        (1, "compile"), (41, "data-stall"), (81, "compile"), (121, "compile"), (151, "data-stall"),
    ]  # fmt: skip
    assert "after a resume" not in findings[0].evidence
    assert "the first step after a resume took up to 5" in findings[2].evidence
    assert np.flatnonzero(scored.cold).tolist() == [0, 80, 120]
    assert scored.step.excess[80] == pytest.approx(0.4, rel=0.1)
    (throughout,) = (f for f in detect(table)[0] if f.step == 81)
    assert throughout.cause == "spike"  # nothing says that the run began again there


def test_a_row_of_alike_anomalies_is_read_as_one() -> None:
    def found(step: int, cause: str = "spike", z: float = 5.0, last: int = 0) -> Finding:
        return Finding(cause, step, last or step, step, "step", 0.2, 0.1, z, severity(z), f"at {step}")

    rows = [found(4), found(5, z=9.0), found(6), found(6, "data-stall"), found(8), found(9, last=12), found(13)]
    told = [(f.first_step, f.last_step, f.cause, f.z, f.evidence) for f in in_a_row(rows)]
    assert told == [
        (4, 6, "spike", 9.0, "at 5; the worst of 3 in a row"),
        (6, 6, "data-stall", 5.0, "at 6"),
        (8, 8, "spike", 5.0, "at 8"),
        (9, 13, "spike", 5.0, "at 9; the worst of 2 in a row"),
    ]


def pauses_that_come_back(steps: list[made.Step]) -> float:
    for step in steps[49::50]:
        step.phases["data"] += 300
    return 12 * 0.3


def one_layer_drifts(steps: list[made.Step]) -> float:
    for index, step in enumerate(steps[200:]):
        made.slow_layer(step, "forward 1", index / 10)
    return sum(index / 10 for index in range(400)) / 1000


def a_stall_within_a_throttle(steps: list[made.Step]) -> float:
    slower(steps[400:], 1.6)
    steps[500].phases["data"] += 60_000
    return 200 * 0.06 + 60


def a_throttle_under_work_that_varies(steps: list[made.Step]) -> float:
    for step, work in zip(steps, np.random.default_rng(0).uniform(0.5, 1.5, 600), strict=True):
        step.attributes[schema.ROW_TOKENS] = round(2048 * work)
        slower([step], float(work))
    slower(steps[400:], 1.3)
    return sum(sum(step.phases.values()) for step in steps[400:]) / 1000 * (1 - 1 / 1.3)


def a_throttle_of_steps_that_are_not_recorded_all(steps: list[made.Step]) -> float:
    slower(steps[400:], 1.6)
    for step in steps:
        step.number *= 10**12
    return 200 * 0.06


@pytest.mark.parametrize(
    ("change", "count", "dearest"),
    [
        (pauses_that_come_back, 12, "a pause that comes back"),
        (one_layer_drifts, pytest.approx(400, abs=30), "steps getting slower and slower"),
        (a_stall_within_a_throttle, 200, "waiting for data"),
        (a_throttle_under_work_that_varies, pytest.approx(200, abs=10), "sustained slowdown"),
        (a_throttle_of_steps_that_are_not_recorded_all, 200, "sustained slowdown"),
    ],
)
def test_time_lost_counts_once(
    tmp_path: Path, change: Callable[[list[made.Step]], float], count: int, dearest: str
) -> None:
    steps = made.plain_steps(600)
    lost = change(steps)
    analysis = analysed(tmp_path, steps)
    assert time_lost(analysis) == pytest.approx(lost, rel=0.02)
    told = re.search(r"; ([\d,]+) of them out of the ordinary, .* most of it through (.*)\.", verdict(analysis))
    assert told is not None
    assert (int(told[1]), told[2]) == (count, dearest)


def test_the_step_of_a_slow_checkpoint_is_out_of_the_ordinary_and_what_is_explained_costs_nothing(
    tmp_path: Path,
) -> None:
    steps = made.plain_steps(200)
    for step in steps[4::5]:
        step.checkpoint_beside = 120
    steps[119].checkpoint_beside = 900
    analysis = analysed(tmp_path, steps)
    assert "; 1 of them out of the ordinary, costing 780 ms" in verdict(analysis)
    assert [(f.cause, lost_in(analysis, f)) for f in analysis.explained] == [("checkpoint-stall", 0)]


def test_parts_of_few_steps(tmp_path: Path) -> None:
    """The first step of each is cold by precaution; it is told of only where it was slow."""
    steps = made.plain_steps(40)
    analysis = analysed(tmp_path, steps)
    parts = replace(analysis.table, restarts=tuple(range(2, 40, 2)))
    assert detect(parts)[0] == []
    slower(steps[:5], 5)
    parts = replace(analysed(tmp_path, steps).table, restarts=(1, 2, 3, 4))
    found, _ = detect(parts)
    assert [(f.cause, f.first_step, f.last_step) for f in found] == [("compile", n, n) for n in range(1, 6)]


@pytest.mark.parametrize("ends", [(1, 2), (1, 2, 3)])
def test_a_run_of_nothing_but_first_steps(tmp_path: Path, ends: tuple[int, ...]) -> None:
    table = analysed(tmp_path, made.plain_steps(ends[-1])).table
    table = replace(table, restarts=ends[:-1])
    findings, scored = detect(table)
    assert (findings, scored.cold.all()) == ([], True)
    assert cluster_steps(table, scored.cold).k == 1


def test_first_steps_of_shorter_batches_are_no_measure_of_work(tmp_path: Path) -> None:
    steps = made.plain_steps(16)
    slower(steps[:8], 5)
    for step in steps[:8]:
        step.attributes[schema.ROW_TOKENS] = 1000
    finding = only(tmp_path, steps)
    assert (finding.cause, finding.first_step, finding.last_step) == ("compile", 1, 8)


def test_first_step_that_compiles(tmp_path: Path) -> None:
    steps = made.plain_steps(100)
    slower(steps[:1], 9)
    finding = only(tmp_path, steps)
    assert (finding.cause, finding.step) == ("compile", 1)


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_longer_batches_are_explained_not_flagged(tmp_path: Path, share: float) -> None:
    rng = np.random.default_rng(1)
    steps = made.plain_steps(300, seed=1)
    for step in steps[20:]:
        if rng.random() < share:
            step.attributes[schema.ROW_TOKENS] = 4096
            slower([step], 2)
    analysis = analysed(tmp_path, steps)
    assert analysis.alarms == []
    if share < 0.1:
        assert {f.cause for f in analysis.explained} == {"longer-batch"}
        assert "2.00x the usual tokens" in analysis.explained[0].evidence


@pytest.mark.parametrize("attribute", [schema.ROW_TOKENS, schema.TOKENS])
@pytest.mark.parametrize("rows", [slice(150, 300), slice(60, 80), slice(250, 300)])
def test_longer_batches_that_stay_are_no_throttle(tmp_path: Path, rows: slice, attribute: str) -> None:
    steps = made.plain_steps(300)
    for step in steps[rows]:
        step.attributes[attribute] *= 2
        slower([step], 2.05)
    assert alarms_of(tmp_path, steps) == []


@pytest.mark.parametrize("factor", [1.2, 1.4])
def test_a_first_step_that_is_hardly_slow_is_first_all_the_same(tmp_path: Path, factor: float) -> None:
    steps = made.plain_steps(240)
    slower(steps[:1], factor)
    assert alarms_of(tmp_path, steps) == []


def test_longer_batches_may_vary_in_their_time(tmp_path: Path) -> None:
    steps = made.plain_steps(300, noise=0.004)
    rng = np.random.default_rng(0)
    for step in steps[50:70]:
        step.attributes[schema.ROW_TOKENS] = 4096
        slower([step], 2 ** rng.uniform(0.9, 1.2))
    assert alarms_of(tmp_path, steps) == []


def test_longer_batch_does_not_hide_a_stall(tmp_path: Path) -> None:
    steps = made.plain_steps(300)
    for step in steps[150:152]:
        step.attributes[schema.ROW_TOKENS] = 4096
        slower([step], 2)
    steps[151].phases["data"] += 80
    finding = only(tmp_path, steps)
    assert (finding.cause, finding.step) == ("data-stall", 152)


def test_memory_that_rises_with_the_slowdown(tmp_path: Path) -> None:
    steps = made.plain_steps(400)
    slower(steps[200:], 1.3)
    for step in steps[200:]:
        step.attributes[schema.ALLOCATED_BYTES] = 4 << 30
    finding = only(tmp_path, steps)
    assert finding.cause == "memory-pressure"
    assert "memory rose from 3 GiB to 4 GiB" in finding.evidence


def test_memory_that_keeps_growing(tmp_path: Path) -> None:
    steps = made.plain_steps(200)
    for step in steps:
        step.attributes[schema.ALLOCATED_BYTES] = (3 << 30) + step.number * (10 << 20)
    analysis = analysed(tmp_path, steps)
    assert [f.cause for f in analysis.explained] == ["memory-pressure"]


def test_skipped_steps_and_spikes_of_loss_and_gradient(tmp_path: Path) -> None:
    steps = made.plain_steps(200)
    steps[60].attributes |= {schema.LOSS: float("nan"), schema.SKIPPED: True}
    steps[100].attributes[schema.LOSS] = 9.0
    steps[140].attributes[schema.GRAD_NORM] = 50.0
    found = {f.step: (f.cause, f.evidence) for f in alarms_of(tmp_path, steps)}
    assert found[61][0] == "skipped-step"
    assert "loss was not finite" in found[61][1]
    assert found[101][0] == "loss-spike"
    assert "loss 9 where" in found[101][1]
    assert found[141][0] == "loss-spike"
    assert "gradient norm 50" in found[141][1]
    assert len(found) == 3


def test_short_runs_say_so(tmp_path: Path) -> None:
    analysis = analysed(tmp_path, made.plain_steps(3))
    assert analysis.anomalies == []
    assert "too few" in verdict(analysis)


def test_clusters_find_the_slow_kind_and_say_what_it_is(tmp_path: Path) -> None:
    steps = made.plain_steps(300)
    slow = steps[10::10]
    for step in slow:
        step.phases["data"] += 100
    clusters = analysed(tmp_path, steps).clusters
    assert clusters.k == 2
    assert clusters.silhouette is not None
    assert clusters.silhouette > 0.7
    assert "clearly apart" in clusters.meaning
    assert clusters.high_latency is not None
    assert clusters.high_latency.steps == [step.number for step in slow]
    assert any("share of data" in text for text in clusters.high_latency.distinguished_by)
    assert analyse(tmp_path / "trace.jsonl", k=4).clusters.k == 4


def test_what_sets_the_slow_kind_apart_can_be_seen(tmp_path: Path) -> None:
    steps = made.plain_steps(300)
    for step in steps:
        slow = step.number % 10 == 0
        step.phases["data"] = 0.003 if slow else 0.001
        step.attributes[schema.ALLOCATED_BYTES] += 4096 if slow else 0
        made.slow_layer(step, "forward 1", 50 if slow else 0)
    high = analysed(tmp_path, steps).clusters.high_latency
    assert high is not None
    told = [text.split(" against ") for text in high.distinguished_by]
    assert [pair for pair in told if pair[0].endswith(f" {pair[1]}")] == []
    assert len(told) == 4


def test_json_has_the_promised_form(tmp_path: Path) -> None:
    steps = made.plain_steps(300)
    steps[120].phases["data"] += 60
    slower(steps[200:], 1.3)
    value = analysed(tmp_path, steps).to_json()
    assert value["steps"] == 300
    assert set(value["anomalies"][0]) == {"step", "span", "duration_seconds", "z", "severity", "cause", "evidence"}
    assert set(value["causes"][0]) == {"cause", "first_step", "last_step", "evidence"}
    assert {"k", "silhouette", "high_latency"} <= set(value["clusters"])
    assert [cause["cause"] for cause in value["causes"]] == ["data-stall", "throttle"]


def test_causes_have_the_names_that_others_rely_on() -> None:
    names = "data-stall checkpoint-stall slow-kernel throttle periodic spike drift compile longer-batch memory-pressure"
    assert " ".join(CAUSES) == names + " loss-spike skipped-step interference between-steps divergence"


@pytest.mark.parametrize(
    ("z", "grade"), [(2.99, None), (3, "low"), (3.99, "low"), (4, "medium"), (5.01, "high"), (float("nan"), None)]
)
def test_severities(z: float, grade: str | None) -> None:
    assert severity(z) == grade


def test_noise_scale_is_about_sigma_for_a_gaussian_and_holds_out_against_heavy_tails() -> None:
    rng = np.random.default_rng(0)
    gauss = rng.normal(0, 3, 20_000)
    assert 3 <= noise_scale(gauss, 100) < 1.2 * 3
    # A quarter of the steps are disturbed by exponential delays: 4 sigmas must stay rarer than 1 in 500.
    heavy = gauss + np.where(rng.random(20_000) < 0.25, rng.exponential(20, 20_000), 0)
    assert np.mean(heavy > 4 * noise_scale(heavy, 100)) < 0.002
    assert np.mean(heavy > 4 * 1.4826 * np.median(np.abs(heavy))) > 0.05  # what the core alone would do


def test_the_moving_baseline_follows_a_drift() -> None:
    rng = np.random.default_rng(0)
    times = np.linspace(1, 2, 1000) * (1 + 0.01 * rng.normal(size=1000))
    assert np.abs(score(times, np.ones(1000)).z).max() < 5


def test_work_exponent_is_learned_where_work_varies() -> None:
    rng = np.random.default_rng(0)
    work = rng.uniform(0.5, 1.5, 400)
    noise = 1 + 0.02 * rng.normal(size=400)
    assert work_exponent(work * noise, work) == pytest.approx(1, abs=0.05)
    assert work_exponent(noise, work) == pytest.approx(0, abs=0.05)
    assert work_exponent(noise, np.ones(400)) is None


def test_bursts_are_not_taken_for_a_period() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        z = rng.normal(size=600)
        for start in rng.integers(0, 580, 8):
            z[start : start + 12] += 8
        assert find_period(z) is None


def test_shift_needs_more_than_noise() -> None:
    rng = np.random.default_rng(0)
    noise = 0.1 * (1 + 0.05 * rng.normal(size=(20, 500)))
    assert not any(find_shifts(times) for times in noise)


def test_a_stretch_far_above_levels_that_wander() -> None:
    """It is one, dated as it was, and not joined with whatever next to it lies above the start of the run."""
    found = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        times = np.exp(made.wandering(rng, 1000, 0.99, 0.013) + 0.05 * np.abs(rng.standard_t(3, 1000)))
        times[520:760] *= 2.2
        found += any(abs(shift.first - 520) <= 15 and abs(shift.last - 760) <= 15 for shift in find_shifts(times))
    assert found >= 12


def test_durations_for_people() -> None:
    assert [duration(s) for s in (0.412, 1.84, 57e-6, 320.0)] == ["412 ms", "1.84 s", "57 µs", "320 s"]


def test_findings_are_frozen_records() -> None:
    finding = Finding("spike", 1, 1, 1, "step", 1.0, 0.5, float("inf"), "high", "x")
    assert finding.anomaly()["z"] is None
    assert replace(finding, severity="low").is_alarm is False


def test_a_pause_that_only_touches_its_step_takes_no_more_than_that_from_it(tmp_path: Path) -> None:
    """A step ends by the device's clock and what follows begins by the host's, so they may overlap by microseconds."""
    steps = [
        made.span("step", start, start + 100 * made.MS, number, 0, "r", SPAN_LEVEL="step", STEP_NUMBER=number)
        for number, start in ((1, made.START_NS), (2, made.START_NS + 400 * made.MS))
    ]
    begin = made.START_NS + 99 * made.MS
    late = made.span("checkpoint", begin, begin + 290 * made.MS, 9, 1, "r", SPAN_LEVEL="phase", STEP_NUMBER=1)
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(made.request([*steps, late], {schema.RUN_ID: "r"})) + "\n")
    table = step_table(read_trace(path), "made up")
    np.testing.assert_allclose(table.seconds, [0.099, 0.1], rtol=1e-6)
    np.testing.assert_allclose(table.wall_seconds, [0.389, 0.1], rtol=1e-6)
