"""Noise on embeddings (NEFTune) and a faster B (LoRA+): what they change, and what they leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.data.batches import segment_lengths
from entrenar_gpu.errors import UserError
from entrenar_gpu.executors.numpy_executor import NumpyExecutor
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import config_of
from tests.helpers.tiny import make_data, make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    make_model(folder / "model", **TINY)
    make_data(folder / "train.jsonl", vocab=96)
    return folder


def test_noise_is_uniform_within_the_magnitude_of_its_row():
    graph = Graph("g")
    x, magnitude = graph.tensor("x", (4, 20_000)), graph.tensor("magnitude", (4,))
    noisy = ops.uniform_noise(x, magnitude, graph.tensor("rng", (3,), "u32"), 0)
    executor = NumpyExecutor({"g": graph}, keep=(noisy,))
    bounds = np.array([0.0, 0.5, 2.0, 1.0], np.float32)
    executor.write("magnitude", bounds)
    executor.write("rng", np.array([1, 2, 3]))
    executor.run("g")
    found = executor.read_temporary(noisy)
    assert not found[0].any()
    for row, bound in zip(found[1:], bounds[1:], strict=True):
        assert np.abs(row).max() <= bound
        counts, _ = np.histogram(row / bound, 8, (-1, 1))
        assert np.abs(counts - 2500).max() < 5 * np.sqrt(2500 * 7 / 8)  # five standard deviations


def test_lengths_are_those_of_packed_samples():
    starts = np.array([[0, 0, 0, 3, 3, 5], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]], np.uint32)
    assert segment_lengths(starts).tolist() == [[3, 3, 3, 2, 2, 1], [1] * 6, [6] * 6]


class _Evaluations:
    def __init__(self) -> None:
        self.losses: list[float] = []

    def eval_finished(self, record: Any) -> None:
        self.losses.append(record.loss)


def losses(folder: Path, output: Path, **options: Any) -> tuple[list[float], list[float]]:
    """Of steps that change nothing, and of evaluations."""
    shape = {
        "device": "numpy",
        "lr": 0.0,
        "steps": 3,
        "batch": 1,
        "accumulate": 2,
        "method": "lora",
        "save_every": None,
    }
    told = _Evaluations()
    rows = [{"input_ids": [5, 9, 40, 3, 77, 12]}]
    config = config_of(folder, str(output), **(shape | options))
    with Trainer(config, [told], data=rows, eval_data=rows) as trainer:
        return [record.loss for record in trainer.steps()], told.losses


def test_noise_is_drawn_anew_in_training_and_not_in_evaluation(folder, tmp_path):
    plain, plainly_evaluated = losses(folder, tmp_path / "plain")
    noisy, evaluated = losses(folder, tmp_path / "noisy", neftune=5.0)
    other, _ = losses(folder, tmp_path / "other", neftune=5.0, seed=1)
    assert len(set(plain)) == 1
    assert len({*noisy, *other, plain[0]}) == 7
    assert evaluated == plainly_evaluated


def test_a_faster_b_is_faster_by_as_much(folder, tmp_path, rng):
    moved = {}
    for name, ratio in (("plain", None), ("ratio", 5.0)):
        config = config_of(folder, str(tmp_path / name), device="numpy", method="lora", lr_ratio_b=ratio,
                           optimizer="sgd", momentum=0.0, lr=1e-2, steps=1, schedule="constant")  # fmt: skip
        with Trainer(config) as trainer:
            for tensor, shape in trainer.session.trainable().items():
                values = np.random.default_rng(len(tensor)).standard_normal(shape).astype(np.float32)
                trainer.executor.write(tensor, values * np.float32(0.1))
            before = trainer.state_dict()
            list(trainer.steps())
            after = trainer.state_dict()
        moved[name] = {key: after[key] - before[key] for key in before}
    for key, change in moved["plain"].items():
        assert np.any(change)
        factor = 5.0 if "lora_B" in key else 1.0
        np.testing.assert_allclose(moved["ratio"][key], factor * change, rtol=1e-3, atol=1e-7)  # a difference of f32s


def test_full_training_has_no_b(folder, tmp_path):
    with pytest.raises(UserError, match="lr_ratio_b: method full trains no adapter that has a B"):
        Trainer(config_of(folder, str(tmp_path / "run"), device="numpy", method="full", lr_ratio_b=2.0))
