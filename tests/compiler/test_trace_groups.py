"""GPU ticks to spans on the host's clock."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from entrenar_gpu.compiler.trace_groups import TraceGroup
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.gpu.clock import GpuClock, phase_spans
from tests.helpers.tiny import make_data, make_model


def group(phase: str, layer: int | None, name: str = "", shape: str = "") -> TraceGroup:
    return TraceGroup(0, 0, phase, layer, name or phase, 10, 100, shape)


def test_clock_is_held_to_what_must_be_true() -> None:
    clock = GpuClock()
    clock.calibrate(tick=1_000, before_ns=50_000, after_ns=52_000)
    ticks = np.array([[2_000, 3_000]])
    assert clock.place(ticks, 0, 10**9).tolist() == [[52_000, 53_000]]
    # the report arrived before the mapped end: the offset shrinks, and stays
    assert clock.place(ticks, 0, 52_500).tolist() == [[51_500, 52_500]]
    assert clock.place(ticks, 0, 10**9).tolist() == [[51_500, 52_500]]
    # nothing begins before it was submitted
    assert clock.place(ticks, 60_000, 10**9).tolist() == [[60_000, 61_000]]


def test_spans_nest_layers_in_phases_and_kernels_in_layers() -> None:
    groups = [
        group("forward", None, "embed", "4"),
        group("forward", 0, "layers.0/norm", "4"),
        group("forward", 0, "layers.0/matmul", "4"),
        group("forward", 1, "layers.1/matmul", "4"),
        group("backward", 1, "layers.1/matmul", "4"),
    ]
    times = np.array([[0, 1], [1, 3], [3, 6], [6, 7], [7, 9]])
    spans = phase_spans(groups, times, parent=0)
    tree = [(s.name, s.start_ns, s.end_ns, None if s.parent is None else spans[s.parent].name) for s in spans]
    assert tree == [
        ("forward", 0, 7, None),
        ("embed", 0, 1, "forward"),
        ("layer 0", 1, 6, "forward"),
        ("layers.0/norm", 1, 3, "layer 0"),
        ("layers.0/matmul", 3, 6, "layer 0"),
        ("layer 1", 6, 7, "forward"),
        ("layers.1/matmul", 6, 7, "layer 1"),
        ("backward", 7, 9, None),
        ("layer 1", 7, 9, "backward"),
        ("layers.1/matmul", 7, 9, "layer 1"),
    ]
    assert spans[0].attributes["flops"] == 40
    assert spans[2].attributes["bytes"] == 200


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["step", "phase", "layer", "kernel"])
def test_a_steps_spans_lie_within_it(tmp_path: Path, level: str) -> None:
    from entrenar_gpu.train.trainer import Trainer

    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "train.jsonl")
    config = TrainConfig(
        model=str(model), data=str(data), output=str(tmp_path / "run"), steps=3, batch=2, seq=48, rank=4,
        accumulate=2, trace_level=level,  # type: ignore[arg-type]
    )  # fmt: skip
    trainer = Trainer(config)
    records = list(trainer.steps())
    assert trainer.session.plan is not None
    assert trainer.session.plan.peak_bytes == trainer.session.allocated_bytes
    trainer.session.close()
    for before, record in pairwise(records):
        assert before.end_ns <= record.start_ns
    for record in records:
        kinds = {s.kind for s in record.spans}
        assert kinds == {"step": {"phase"}, "phase": {"phase"}, "layer": {"phase", "layer"}}.get(
            level, {"phase", "layer", "kernel"}
        )
        for span in record.spans:
            assert span.start_ns <= span.end_ns <= record.end_ns
            if span.parent is not None:
                assert record.spans[span.parent].start_ns <= span.start_ns
                assert span.end_ns <= record.spans[span.parent].end_ns
        if level != "step":
            phases = [s.name for s in record.spans if s.kind == "phase"]
            assert phases == ["forward", "backward"] * 2 + ["optimizer", "data"]
