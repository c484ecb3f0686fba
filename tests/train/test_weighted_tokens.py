"""Weights of tokens in the loss: what counts twice is what stands there twice."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.train.evaluate import evaluate_data
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import gradients, run_micro_batches
from tests.helpers.tiny import make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}
A = {"input_ids": [5, 9, 40, 3, 77, 12], "labels": [-100, -100, 40, 3, 77, 12]}
B = {"input_ids": [6, 11, 95, 30]}
TWICE = [A, A, B]
WEIGHTED = [A | {"weights": [1.0] * 6}, B | {"weights": [0.5] * 4}]  # halves and wholes are as ones and twos
CLOSE = {"rtol": 2e-5, "atol": 1e-7}  # f32 sums of a few hundred terms in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weighted")
    make_model(folder / "model", **TINY)
    return folder


def config_of(folder: Path, output: Path, **options: Any) -> TrainConfig:
    shape = {"steps": 3, "seq": 8, "rank": 4, "lr": 5e-3, "shuffle": False, "pack": False, "method": "lora"}
    return TrainConfig(**(shape | {"model": str(folder / "model"), "output": str(output)} | options))


def first_step(config: TrainConfig, rows: Any, kernels: Any = None) -> tuple[float, dict[str, np.ndarray]]:
    """The loss of the first step, and its gradients."""
    with Trainer(config, kernels=kernels, data=rows) as trainer:
        run_micro_batches(trainer, next(trainer.batches))
        return float(trainer.executor.read("loss")[0]), gradients(trainer)


def check(found: tuple[float, dict[str, np.ndarray]], want: tuple[float, dict[str, np.ndarray]]) -> None:
    np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
    assert any(np.any(gradient) for gradient in want[1].values())
    for name, gradient in want[1].items():
        np.testing.assert_allclose(found[1][name], gradient, **CLOSE)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("batch", "accumulate", "pack"), [(2, 1, False), (1, 2, False), (1, 1, True)], ids=["rows", "accumulated", "packed"]
)
def test_a_step_is_the_weighted_mean(folder, tmp_path, method, batch, accumulate, pack):
    config = functools.partial(config_of, folder, tmp_path / "run", device="numpy", method=method, seq=10)
    want = first_step(config(batch=3), TWICE)
    found = first_step(config(batch=batch, accumulate=accumulate, pack=pack), WEIGHTED)
    check(found, want)
    larger = [row | {"weights": [3e5 * w for w in row["weights"]]} for row in WEIGHTED]
    check(first_step(config(batch=batch, accumulate=accumulate, pack=pack), larger), want)


def test_on_the_gpu_as_on_numpy(folder, tmp_path, kernels):
    rows = [A | {"weights": [1, 1, 0.3, 2.5, 0, 1.25]}, B | {"weights": [0, 4, 0.7, 1]}]
    config = functools.partial(config_of, folder, tmp_path / "run", batch=2)
    check(first_step(config(), rows, kernels), first_step(config(device="numpy"), rows))


def test_an_evaluation_is_the_weighted_mean(folder, tmp_path):
    config = config_of(folder, tmp_path / "run", device="numpy", batch=2)
    want, found = (evaluate_data(config, False, rows) for rows in (TWICE, WEIGHTED))
    assert found["loss"] == pytest.approx(want["loss"], rel=1e-6)
    assert (found["tokens"], want["tokens"]) == (4 + 3, 2 * 4 + 3)
    alone = evaluate_data(config, False, [B])
    assert alone["loss"] != pytest.approx(want["loss"], rel=1e-3)


def test_long_samples_keep_their_weights_in_windows(folder, tmp_path):
    config = config_of(folder, tmp_path / "run", device="numpy", batch=2, seq=4)

    def loss(weights: list[float]) -> float:
        return evaluate_data(config, False, [{"input_ids": A["input_ids"], "weights": weights}], window=2)["loss"]

    weights = [1, 1, 0.5, 1, 3, 0.25]
    alone = [loss([float(i == token) for i in range(6)]) for token in range(1, 6)]
    assert loss(weights) == pytest.approx(np.average(alone, weights=weights[1:]), rel=1e-6)


def test_weights_of_one_change_no_bit(folder, tmp_path, kernels):
    """Rows that come one by one always have weights, since later ones might."""
    plain, ones = [A, B] * 3, [row | {"weights": [1] * len(row["input_ids"])} for row in [A, B] * 3]
    runs = {"list": plain, "ones": ones, "stream": iter(plain)}
    found = {}
    for name, rows in runs.items():
        with Trainer(config_of(folder, tmp_path / name, batch=2), kernels=kernels, data=rows) as trainer:
            assert trainer.batches.weighted == (name == "stream")
            found[name] = [record.loss for record in trainer.steps()]
    assert found["list"] == found["ones"] == found["stream"]


def test_a_stream_may_bring_weights_late(folder, tmp_path):
    rows = [A, B, *WEIGHTED]
    config = functools.partial(config_of, folder, device="numpy", batch=2, steps=2)
    found = {}
    for name, given in (("list", rows), ("stream", iter(rows))):
        with Trainer(config(output=tmp_path / name), data=given) as trainer:
            found[name] = [record.loss for record in trainer.steps()]
    np.testing.assert_allclose(found["stream"], found["list"], rtol=1e-6)
