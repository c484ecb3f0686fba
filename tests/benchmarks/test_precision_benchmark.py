"""The comparison of precisions, shortened, and what training does when a gradient overflows in f16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks import precision
from entrenar_gpu.cli import docstrings
from entrenar_gpu.cli.demo import RUN
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.equivalence import needs
from tests.helpers.runs import config_of
from tests.helpers.tiny import make_data, make_model

pytestmark = pytest.mark.gpu


def test_every_precision_is_trained_from_the_same_start(tmp_path, kernels, monkeypatch):
    calls = []
    real = precision.final_loss

    def spied(config: Any, kernels: Any) -> tuple[float, int]:
        calls.append((config.precision, real(config, kernels)))
        return calls[-1][1]

    monkeypatch.setattr(precision, "final_loss", spied)
    found = docstrings.collect()
    docstrings.Corpus(found.train[:24], found.valid[:2]).write(tmp_path)
    config = replace(RUN, batch=1, seq=128, steps=2, data=str(tmp_path))
    ((line, held),) = precision.compare({"wgpu": kernels}, ["int8"], config, [0])
    losses = [loss for _, (loss, _) in calls]
    assert [kind for kind, _ in calls] == ["f32", "int8"]
    assert losses[0] != losses[1]
    assert abs(losses[1] / losses[0] - 1) < 0.01
    assert held
    assert line.startswith(f"| 0 | {losses[0]:.4f} | {losses[1]:.4f} ({losses[1] / losses[0] - 1:+.2%}, 0 skipped)")


@pytest.mark.parametrize(("loss", "held"), [(3.0089, True), (2.9911, True), (3.0091, False), (float("nan"), False)])
def test_a_difference_over_the_bar_of_its_precision_is_told(monkeypatch, loss, held):
    found = {"f32": (3.0, 0), "f16": (loss, 0), "int8": (3.029, 0)}
    monkeypatch.setattr(precision, "final_loss", lambda config, kernels: found[config.precision])
    engines: dict[str, Any] = {"wgpu": None, "dawn": None}
    ((line, is_held),) = precision.compare(engines, ["f32", "f16", "int8"], RUN, [7])
    assert is_held == held
    assert line.count("|") == 1 + 1 + len(precision.columns(engines, ["f32", "f16", "int8"])) + 1


@pytest.mark.parametrize(("arithmetic", "skipped"), [("f16", True), ("f32", False)])
def test_a_gradient_that_overflows_skips_the_step_and_halves_the_scale(tmp_path, kernels, arithmetic, skipped):
    """A loss scale of 2^30 takes gradients past binary16's 65,504, which f32 holds."""
    needs(kernels.device, arithmetic)
    make_model(tmp_path / "model", head_dim=32, intermediate_size=128)  # whole blocks of 64, so that nothing stays f32
    make_data(tmp_path / "train.jsonl")
    trainer = Trainer(config_of(tmp_path, precision=arithmetic, steps=1), kernels=kernels)
    trainer.executor.write("loss_scale", np.array([2.0**30]))
    before = trainer.session.adapter_values()
    (record,) = trainer.steps()
    after = trainer.session.adapter_values()
    scale = float(trainer.executor.read("loss_scale")[0])
    trainer.session.close()
    assert record.skipped == skipped
    assert scale == 2.0 ** (30 - skipped)
    assert all(np.array_equal(before[name], after[name]) for name in before) == skipped
    assert np.isfinite(record.loss)
