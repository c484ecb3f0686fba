"""Gradients of a run's first step: where they flow to, and where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import config_of, gradients, run_micro_batches
from tests.helpers.tiny import make_data, make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gradients")
    make_model(path / "model", **TINY)
    make_data(path / "train.jsonl", vocab=96)
    return path


def first_gradients(folder: Path, **options: Any) -> tuple[Trainer, dict[str, np.ndarray]]:
    trainer = Trainer(config_of(folder, device="numpy", **options))
    run_micro_batches(trainer, next(trainer.batches))
    return trainer, gradients(trainer)


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_gradients_flow_through_a_and_b(folder, method):
    """At first B is zero, and so is A's gradient; once B is not, both have one."""
    trainer, found = first_gradients(folder, method=method)
    assert all(values.any() == name.endswith("lora_B.weight") for name, values in found.items())
    rng = np.random.default_rng(0)
    for name, shape in trainer.session.trainable().items():
        if name.endswith("lora_B.weight"):
            trainer.executor.write(name, rng.standard_normal(shape).astype(np.float32))
    run_micro_batches(trainer, next(trainer.batches))
    assert all(values.any() and np.isfinite(values).all() for values in gradients(trainer).values())


def test_every_layer_has_a_gradient(folder):
    _, found = first_gradients(folder)
    targets = {"q", "k", "v", "o", "gate", "up", "down"}
    modules = {name.rsplit(".", 2)[0] for name in found}
    assert {module.rsplit(".", 1)[1].removesuffix("_proj") for module in modules} == targets
    assert len(modules) == TINY["num_hidden_layers"] * len(targets)


def test_what_is_frozen_has_none(folder):
    trainer, found = first_gradients(folder, target="v")
    assert found.keys() == trainer.session.trainable().keys()
    graded = {name.removesuffix(".grad") for name in trainer.executor.tensors if name.endswith(".grad")}
    assert not {t.name for weight in trainer.session.weights for t in weight.tensors} & graded
