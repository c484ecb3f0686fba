"""Live detection: records in, at most a few lines out, and every anomaly counted."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from entrenar_gpu.cli import main
from entrenar_gpu.cli.display import Progress
from observability import schema
from observability.detect.findings import Finding
from observability.detect.live import LiveDetector
from tests.helpers import made_traces as made


def records(steps: list[made.Step]) -> Iterator[Any]:
    """The records of a run, as the trainer hands them to observers: steps, and checkpoints beside them."""
    now = made.START_NS
    for step in steps:
        start, spans = now, []
        for phase, ms in step.phases.items():
            begin, parent = now, len(spans)
            spans.append(span(phase, "phase", begin, begin + round(ms * made.MS)))
            for name, layer_ms in step.layers.items():
                if name.startswith(phase + " "):
                    end = now + round(layer_ms * made.MS)
                    spans.append(span(f"layer {name.split()[1]}", "layer", now, end, parent))
                    now = end
            now = begin + round(ms * made.MS)
        yield SimpleNamespace(
            step=step.number,
            start_ns=start,
            end_ns=now,
            loss=step.attributes[schema.LOSS],
            grad_norm=step.attributes[schema.GRAD_NORM],
            tokens=step.attributes[schema.TOKENS],
            row_tokens=step.attributes[schema.ROW_TOKENS],
            allocated_bytes=step.attributes[schema.ALLOCATED_BYTES],
            skipped=step.attributes.get(schema.SKIPPED, False),
            spans=tuple(spans),
        )
        if step.checkpoint_beside:
            end = now + round(step.checkpoint_beside * made.MS)
            yield SimpleNamespace(step=step.number, path="c", bytes=1 << 20, start_ns=now, end_ns=end)
            now = end


def span(name: str, kind: str, start: int, end: int, parent: int | None = None) -> Any:
    return SimpleNamespace(name=name, kind=kind, start_ns=start, end_ns=end, parent=parent, attributes={}, on_gpu=False)


def watch(steps: list[made.Step], **options: Any) -> tuple[LiveDetector, list[str]]:
    lines: list[str] = []
    detector = LiveDetector(**({"emit": lines.append} | options))
    for record in records(steps):
        (detector.checkpoint_saved if hasattr(record, "path") else detector.step_finished)(record)
    return detector, lines


def scaled(step: made.Step, factor: float) -> None:
    for times in (step.phases, step.layers):
        for name in times:
            times[name] *= factor


def test_a_healthy_run_is_silent() -> None:
    for seed in range(3):
        detector, lines = watch(made.plain_steps(300, seed))
        assert lines == []
        assert detector.summary() == ""


def test_slow_data_in_one_line() -> None:
    steps = made.plain_steps(150)
    steps[119].phases["data"] += 60
    _, lines = watch(steps)
    (line,) = lines
    assert re.fullmatch(r"step 120: 159 ms, \d\d\.\dσ over 99.9 ms: data took 65.1 ms instead of 4.99 ms, .*", line)


@pytest.mark.parametrize("inside", [True, False])
def test_slow_checkpoint_in_one_line(inside: bool) -> None:
    steps = made.plain_steps(150, step_ms=118)
    if inside:
        steps[119].phases["checkpoint"] = 290.0
    else:
        steps[119].checkpoint_beside = 290.0
    _, lines = watch(steps)
    (line,) = lines
    assert line.startswith("step 120: 408 ms, ")
    assert "over 118 ms: checkpoint write took 290 ms" in line


def test_a_terminal_without_sigma_gets_the_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    monkeypatch.setattr(sys, "argv", ["entrenar-gpu", "--version"])
    with pytest.raises(SystemExit):
        main.main()
    steps = made.plain_steps(60)
    steps[40].phases["data"] += 300
    watch(steps, emit=Progress().say)
    sys.stdout.flush()
    assert b"? over " in written.getvalue()


def test_a_checkpoint_told_twice_counts_once() -> None:
    steps = made.plain_steps(150)
    steps[119].phases["checkpoint"] = 290.0
    steps[119].checkpoint_beside = 290.0
    detector, lines = watch(steps)
    assert len(lines) == 1
    assert detector.summary() == "1 anomaly: 1 checkpoint-stall"


def test_a_slow_stretch_is_one_anomaly_and_then_a_throttle() -> None:
    steps = made.plain_steps(500)
    for step in steps[250:]:
        scaled(step, 1.25)
    detector, lines = watch(steps)
    assert detector.counts["spike"] == 1
    assert detector.counts["throttle"] == 1
    assert any("+25%" in line and "throttle" not in line for line in lines)


def test_a_pause_that_comes_back_is_told_once_and_then_expected() -> None:
    steps = made.plain_steps(600)
    for step in steps[29::20]:
        step.phases["optimizer"] += 40
    steps[549].phases["data"] += 200
    detector, lines = watch(steps, lines_a_minute=99)
    detector.run_finished(None)
    (told,) = (line for line in lines if "every 20 steps" in line)
    assert told.startswith("steps 30 to ")
    assert detector.counts["periodic"] == 1
    assert detector.counts["slow-kernel"] <= 9  # those before it was known
    assert detector.counts["data-stall"] == 1  # longer than the pause that was due


def test_a_second_throttle_is_told_too_and_the_last_one_at_the_end() -> None:
    steps = made.plain_steps(780)
    for step in (*steps[200:320], *steps[480:580], *steps[720:]):
        scaled(step, 1.25)
    detector, _ = watch(steps)
    assert detector.counts["throttle"] == 2
    detector.run_finished(None)
    assert detector.counts["throttle"] == 3


def test_noise_of_two_modes_becomes_what_is_normal() -> None:
    steps = made.plain_steps(200)
    rng = np.random.default_rng(1)
    for step in steps[25:]:
        if rng.random() < 0.2:
            scaled(step, 1.15)
    detector, _ = watch(steps)
    assert sum(detector.counts.values()) <= 3


def test_a_long_stall_does_not_hide_the_next() -> None:
    steps = made.plain_steps(200)
    for step in (*steps[120:128], *steps[152:154]):
        step.phases["data"] += 20
    assert watch(steps)[0].counts == {"data-stall": 2}


def test_skipped_step_and_loss_spike() -> None:
    steps = made.plain_steps(150)
    steps[99].attributes |= {schema.LOSS: float("nan"), schema.SKIPPED: True}
    steps[119].attributes[schema.LOSS] = 9.0
    _, lines = watch(steps)
    assert lines[0] == "step 100: the loss was not finite, so the update was skipped"
    assert lines[1].startswith("step 120: loss 9 where ")


def test_longer_batch_is_silent() -> None:
    steps = made.plain_steps(150)
    steps[119].attributes[schema.ROW_TOKENS] = 4096
    scaled(steps[119], 2)
    assert watch(steps)[1] == []


def test_lines_are_limited_and_the_rest_is_counted() -> None:
    steps = made.plain_steps(300)
    for index in np.random.default_rng(0).choice(np.arange(50, 150), 20, replace=False) * 2:
        steps[index].phases["data"] += 60
    found: list[Finding] = []
    detector, lines = watch(steps, lines_a_minute=4, clock=lambda: 0.0, on_finding=found.append)
    assert len(lines) == 4
    assert len(found) == detector.counts["data-stall"] == 20
    assert detector.summary() == "20 anomalies: 20 data-stall (16 not shown as they came too fast)"
    detector.run_finished(None)
    assert lines[-1] == detector.summary()


def test_what_is_new_or_far_worse_is_told_even_when_lines_are_used_up() -> None:
    steps = made.plain_steps(300)
    for number in (60, 71, 85, 92, 110, 123, 141, 150, 168, 187):
        steps[number - 1].phases["data"] += 60
    steps[204].phases["data"] += 600
    steps[249].attributes |= {schema.LOSS: float("nan"), schema.SKIPPED: True}
    steps[269].phases["data"] += 600
    detector, lines = watch(steps, lines_a_minute=2, clock=lambda: 0.0)
    assert [line.split(":")[0] for line in lines] == ["step 60", "step 71", "step 205", "step 250"]
    assert detector.unsaid == 8 + 1


def test_a_far_worse_step_after_a_slow_one_is_another_anomaly() -> None:
    steps = made.plain_steps(150)
    for step in steps[117:119]:
        step.phases["data"] += 60
    steps[119].phases["data"] += 600
    _, lines = watch(steps)
    assert [line.split(":")[0] for line in lines] == ["step 118", "step 120"]


def test_the_first_steps_are_not_judged() -> None:
    steps = made.plain_steps(60)
    scaled(steps[0], 10)
    assert watch(steps)[1] == []


def test_it_costs_little() -> None:
    steps = made.plain_steps(600)
    made_records = list(records(steps))
    detector = LiveDetector(emit=lambda _: None)
    began = time.process_time()
    for record in made_records:
        detector.step_finished(record)
    # 2% of a step of 100 ms; measured: 0.4 ms on a machine of two cores
    assert (time.process_time() - began) / len(steps) < 2e-3
