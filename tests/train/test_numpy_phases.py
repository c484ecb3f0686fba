"""The NumPy device says where a step's time goes, as a GPU does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.events import StepRecord
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.tiny import make_data, make_model


@pytest.mark.parametrize(("level", "kinds"), [("layer", {"phase", "layer"}), ("kernel", {"phase", "layer", "kernel"})])
def test_a_step_on_numpy_has_phases_that_lie_in_it_and_follow_each_other(
    tmp_path: Path, level: Any, kinds: set[str]
) -> None:
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "train.jsonl", samples=8)
    config = TrainConfig(
        model=str(model), data=str(data), output=str(tmp_path / "run"), steps=2, batch=1, seq=16, rank=2, accumulate=2,
        device="numpy", trace_level=level,
    )  # fmt: skip
    records: list[StepRecord] = []

    class Watch:
        def step_finished(self, record: StepRecord) -> None:
            records.append(record)

    trainer = Trainer(config)
    trainer.observe(Watch())
    trainer.run()
    trainer.session.close()
    for record in records:
        assert {span.kind for span in record.spans} == kinds
        assert not any(span.on_gpu for span in record.spans)
        phases = [span for span in record.spans if span.kind == "phase" and span.name != "data"]
        names = [span.name for span in phases]
        assert names == ["forward", "backward", "forward", "backward", "optimizer"]
        edges = [record.start_ns, *(t for span in phases for t in (span.start_ns, span.end_ns)), record.end_ns]
        assert edges == sorted(edges)
        layers = [span for span in record.spans if span.kind == "layer" and span.name == "layer 0"]
        assert [record.spans[span.parent or 0].name for span in layers] == ["forward", "backward"] * 2
        computing = sum(span.end_ns - span.start_ns for span in phases)
        assert computing >= 0.5 * (record.end_ns - record.start_ns)
