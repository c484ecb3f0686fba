"""Whole runs: NumPy executor against GPU, recorded results of transformers and PEFT, and what a loss is the mean of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu.data.samples import IGNORE
from entrenar_gpu.train.evaluate import evaluate
from entrenar_gpu.train.trainer import Trainer
from tests.golden import training_cases
from tests.helpers.runs import config_of, gradients, run_micro_batches, train
from tests.helpers.tiny import make_data, make_model

pytestmark = pytest.mark.gpu

NUMPY_BAR = 1e-5  # on every loss of 20 steps: DESIGN's bar for the two executors

# Head size, ranks and widths that no tile divides, so that the edges of kernels are at work in every step.
TINY = {"hidden_size": 36, "intermediate_size": 52, "head_dim": 10, "vocab_size": 97}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("training")
    make_model(path / "model", **TINY)
    make_data(path / "train.jsonl", vocab=97)
    return path


RUNS: dict[str, dict[str, Any]] = {
    "qlora": {"weight_decay": 0.1},
    "qlora, single quantisation, sgd": {"double_quant": False, "optimizer": "sgd", "lr": 0.2},
    "lora, dropout, two micro-batches": {"method": "lora", "dropout": 0.2, "accumulate": 2, "rank": 3},
    "noisy, B faster": {"neftune": 5.0, "lr_ratio_b": 4.0, "lr": 3e-3},
    "lora, unpacked, smoothed": {"method": "lora", "pack": False, "label_smoothing": 0.1, "target": "q,v,down"},
    "full": {"method": "full", "lr": 2e-3, "weight_decay": 0.1},
    "full, adam": {"method": "full", "lr": 2e-3, "weight_decay": 0.01, "optimizer": "adam", "clip": 0.0},
}


@pytest.mark.parametrize("run", RUNS)
def test_twenty_steps_are_those_of_numpy(folder, tmp_path, kernels, run):
    options = {"lr": 1e-2, "steps": 20} | RUNS[run]
    ours = train(folder, str(tmp_path / "gpu"), kernels, **options)
    numpy = train(folder, str(tmp_path / "numpy"), device="numpy", **options)
    np.testing.assert_allclose(ours, numpy, rtol=0, atol=NUMPY_BAR)
    assert np.mean(ours[-4:]) < np.mean(ours[:4]) - 0.1


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_webgpus_default_limits_train_the_same(folder, tmp_path, kernels, limited_kernels, method):
    options = {"method": method, "accumulate": 2}
    limited = train(folder, str(tmp_path / "limited"), limited_kernels, **options)
    np.testing.assert_allclose(limited, train(folder, str(tmp_path / "full"), kernels, **options), rtol=0, atol=1e-5)


def test_tables_in_several_pages_train_the_same(folder, tmp_path, kernels, monkeypatch):
    """Embeddings larger than a binding are split by rows; here after 64 of 97."""
    whole = train(folder, str(tmp_path / "whole"), kernels, method="full", steps=4)
    monkeypatch.setattr("entrenar_gpu.model.tables.TABLE_SHARD_BYTES", 64 * 36 * 4)
    trainer = Trainer(config_of(folder, str(tmp_path / "paged"), method="full", steps=4), kernels=kernels)
    assert {
        "model.embed_tokens.weight.shard0",
        "model.embed_tokens.weight.shard1",
    } <= trainer.session.trainable().keys()
    paged = [record.loss for record in trainer.steps()]
    trainer.session.close()
    # the loss sums the vocabulary shard by page, in another order
    np.testing.assert_allclose(paged, whole, rtol=1e-6)


@pytest.mark.parametrize("name", training_cases.CASES)
def test_recorded_training(tmp_path, kernels, name):
    """Ten losses and gradient norms of transformers + PEFT with torch's AdamW, and each first gradient."""
    recorded = json.loads(training_cases.FILE.read_text())["cases"][name]
    folder = training_cases.write(tmp_path, name)
    config = config_of(
        folder, adapter_init=str(folder / "adapter"), **training_cases.OPTIONS, **training_cases.CASES[name][1]
    )
    trainer = Trainer(config, kernels=kernels)
    try:
        start = trainer.batches.state()
        run_micro_batches(trainer, next(trainer.batches))
        norms = {key: float(np.linalg.norm(value)) for key, value in gradients(trainer).items()}
        assert norms.keys() == recorded["gradients"].keys()
        np.testing.assert_allclose(list(norms.values()), [recorded["gradients"][key] for key in norms], rtol=2e-5)
        for key in norms:
            trainer.executor.write(f"{key}.grad", np.zeros(trainer.executor.tensors[key].shape))
        trainer.executor.write("loss", np.zeros(1))
        trainer.batches.restore(start)
        records = list(trainer.steps())
    finally:
        trainer.session.close()
    np.testing.assert_allclose([r.loss for r in records], recorded["losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose([r.grad_norm for r in records], recorded["grad_norms"], rtol=1e-4)


def test_a_batch_is_learned_by_heart(tmp_path, kernels):
    make_model(tmp_path / "model", **TINY)
    make_data(tmp_path / "train.jsonl", samples=2, vocab=97, longest=12)
    options = {"batch": 1, "steps": 60, "lr": 1e-2, "method": "full"}
    losses = train(tmp_path, kernels=kernels, **options)
    assert losses[0] > 4
    assert losses[-1] < 0.02


def test_micro_batches_are_rows(folder, tmp_path, kernels):
    """The loss of a step is the mean over all tokens of all its rows, however they are spread over micro-batches."""
    options = {"shuffle": False, "steps": 4, "lr": 1e-2}
    rows = train(folder, str(tmp_path / "rows"), kernels, batch=2, **options)
    micro = train(folder, str(tmp_path / "micro"), kernels, batch=1, accumulate=2, **options)
    np.testing.assert_allclose(micro, rows, rtol=2e-6)


def test_every_step_and_micro_batch_drops_other_elements(tmp_path, kernels):
    """At a learning rate of zero over one sample, only dropout can change a loss."""
    folder = training_cases.write(tmp_path, "qwen2-lora")
    make_data(folder / "train.jsonl", samples=1, vocab=80, longest=12)
    options = {"adapter_init": str(folder / "adapter"), "method": "lora", "lr": 0.0, "steps": 4, "seq": 24}

    def losses(name: str, **more: Any) -> list[float]:
        return train(folder, name, kernels, **options, **more)

    assert len(set(losses("without"))) == 1
    dropped = losses("with", dropout=0.3)
    assert len(set(dropped)) == 4
    assert set(dropped).isdisjoint(losses("seed", dropout=0.3, seed=1))
    # two micro-batches with the masks of the first would have the mean of one
    assert set(dropped).isdisjoint(losses("micro", dropout=0.3, accumulate=2))


def test_decay_shrinks_matrices_and_leaves_norms_and_biases(tmp_path, kernels):
    """An update without gradients is decay alone: w (1 - lr decay)."""
    make_model(tmp_path / "model", **(TINY | {"architectures": ["Qwen2ForCausalLM"]}))
    make_data(tmp_path / "train.jsonl", vocab=97)
    trainer = Trainer(config_of(tmp_path, method="full", weight_decay=0.5), kernels=kernels)
    before = {name: trainer.executor.read(name) for name in trainer.session.trainable()}
    trainer.executor.write("lr", np.array([0.1]))
    trainer.executor.run("update")
    kinds = set()
    for name, values in before.items():
        kinds.add(name.rpartition(".")[2] if values.ndim == 1 else "matrix")
        wanted = values if values.ndim == 1 else values * np.float32(0.95)
        np.testing.assert_allclose(trainer.executor.read(name), wanted, rtol=2e-7, err_msg=name)
    assert kinds == {"matrix", "weight", "bias"}
    trainer.session.close()


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.evaluations: list[Any] = []
        self.checkpoints: list[Any] = []
        self.summary: Any = None

    def step_finished(self, record: Any) -> None:
        self.steps.append(record)

    def eval_finished(self, record: Any) -> None:
        self.evaluations.append(record)

    def checkpoint_saved(self, record: Any) -> None:
        self.checkpoints.append(record)

    def run_finished(self, summary: Any) -> None:
        self.summary = summary


def test_a_run_tells_its_observers_and_its_metrics_file(folder, tmp_path, kernels):
    recorder, data = Recorder(), str(folder / "train.jsonl")
    config = config_of(folder, str(tmp_path / "run"), steps=7, eval_data=data, eval_every=3, save_every=4, accumulate=2)
    trainer = Trainer(config, [recorder], kernels)
    summary = trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trainer.session.close()
    assert [r.step for r in recorder.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [r.step for r in recorder.evaluations] == [0, 3, 6, 7]
    assert [r.step for r in recorder.checkpoints] == [4, 7]
    assert (summary.status, summary.steps, summary.final_loss) == ("finished", 7, recorder.steps[-1].loss)
    assert recorder.summary == summary
    assert recorder.evaluations[-1].loss < recorder.evaluations[0].loss
    steps = [line for line in lines if "loss" in line]
    keys = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds"}
    assert all(keys <= line.keys() for line in steps)
    assert [line["loss"] for line in steps] == [r.loss for r in recorder.steps]
    assert [line["eval_loss"] for line in lines if "eval_loss" in line] == [r.loss for r in recorder.evaluations]
    for record in recorder.steps:
        assert record.row_tokens == 2 * 2 * 32
        assert record.tokens < record.row_tokens
        assert record.end_ns - record.start_ns == pytest.approx(record.step_seconds * 1e9)


def test_evaluation_is_the_mean_over_tokens(folder, tmp_path, kernels):
    """Whatever the batches: every unmasked token counts once. Held against the loss of training on one sample a row."""
    data = str(make_data(tmp_path / "few.jsonl", samples=8, vocab=97))
    options = {"data": data, "eval_data": data, "method": "lora", "target": "q"}
    results = {}
    for number, shape in enumerate([{"batch": 2}, {"batch": 8, "pack": False}]):
        trainer = Trainer(config_of(folder, str(tmp_path / str(number)), **options, **shape), kernels=kernels)
        results[number] = evaluate(trainer.session, trainer.eval_samples)
        if "pack" in shape:
            step = next(trainer.batches)
            run_micro_batches(trainer, step)
            mean, tokens = float(trainer.executor.read("loss")[0]), step.tokens
        trainer.session.close()
    samples = trainer.eval_samples
    assert tokens == np.count_nonzero(samples.targets != IGNORE) == samples.trained_tokens
    for loss, count in results.values():
        assert count == tokens
        assert loss == pytest.approx(mean, rel=2e-6)
