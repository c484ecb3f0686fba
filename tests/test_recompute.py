"""Recomputation: the same bits for less memory, as little of it as fits, and no more memory than was allowed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu.adapters import AdapterSpec
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.graph import Caps
from entrenar_gpu.model import Storage
from entrenar_gpu.model_config import parse_model_config
from entrenar_gpu.plan import make_plan
from entrenar_gpu.programs import RunShape, fit_training, training_graphs
from entrenar_gpu.recompute import Recompute, fit, rewrite
from entrenar_gpu.train import Trainer
from tests.runs import config_of, gradients, run_micro_batches
from tests.tiny import QWEN3, make_data, make_model

LAYERS = 6
LEVELS = [Recompute(n, 0) for n in range(LAYERS + 1)] + [Recompute(LAYERS, n) for n in range(1, LAYERS + 1)]


def run_shape(method: str = "qlora", batch: int = 4, dropout: float = 0.0) -> RunShape:
    model = parse_model_config(QWEN3 | {"num_hidden_layers": LAYERS, "vocab_size": 512})
    config = TrainConfig(method=method, batch=batch, seq=64, rank=4, dropout=dropout)
    adapters = {} if method == "full" else AdapterSpec.from_config(config, model).modules
    return RunShape(model, Storage(method, adapters=adapters), config)


def peak_of(graphs: Any, level: Recompute) -> int:
    rewritten = {name: rewrite(graph, level) for name, graph in graphs.items()}
    return make_plan(rewritten, Caps(), launches=False).peak_bytes


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_more_recomputation_takes_less_memory(method):
    graphs = training_graphs(run_shape(method), Caps(), evaluates=False)
    peaks = [peak_of(graphs, level) for level in LEVELS]
    assert peaks[LAYERS] < 0.95 * peaks[0]
    assert peaks[-1] < 0.8 * peaks[LAYERS]
    # Up to what the packing of buffers gains or loses by chance, and the last layer, which is needed at once.
    assert all(after < 1.03 * before for before, after in pairwise(peaks))


def test_the_least_level_that_fits_is_chosen():
    graphs = training_graphs(run_shape(), Caps(), evaluates=False)
    peaks = {level: peak_of(graphs, level) for level in LEVELS}
    chosen = set()
    for budget in np.linspace(min(peaks.values()), max(peaks.values()), 15).astype(int):
        level, plan, rewritten = fit(graphs, LAYERS, Caps(), int(budget))
        assert plan.peak_bytes == peaks[level] <= budget
        assert level == LEVELS[0] or peaks[LEVELS[LEVELS.index(level) - 1]] > budget
        assert any(node.recomputed for node in rewritten["micro"].nodes)
        chosen.add(level)
    assert len(chosen) > 6


def test_what_cannot_fit_is_refused_with_the_largest_batch_that_does():
    graphs = training_graphs(run_shape(batch=3), Caps(), evaluates=True)
    smallest = min(peak_of(graphs, level) for level in LEVELS)
    with pytest.raises(UserError, match=r"--batch 8 at --seq 64: needs .* GiB, over the budget .*; --batch 3 fits"):
        fit_training(run_shape(batch=8), Caps(), smallest, evaluates=True)
    assert fit_training(run_shape(batch=3), Caps(), smallest, evaluates=True)[1].peak_bytes == smallest
    with pytest.raises(UserError, match="no --batch fits: lower --seq or --rank"):
        fit_training(run_shape(batch=8), Caps(), 1 << 16, evaluates=True)


def test_what_no_binding_holds_is_refused_with_the_largest_batch_that_does():
    """A device without memory to tell of, but with small bindings: a row of swiglu takes 64 x 160 x 4 bytes."""
    caps = replace(Caps(), max_binding_bytes=5 * 64 * 160 * 4)
    with pytest.raises(UserError, match=r"--batch 9 at --seq 64: .* binds at most .*; --batch 5 fits"):
        fit_training(run_shape(batch=9), caps, 1 << 40, evaluates=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recompute")
    make_model(path / "model", hidden_size=32, intermediate_size=48, head_dim=8, vocab_size=96, num_hidden_layers=3)
    make_data(path / "train.jsonl", vocab=96)
    return path


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["qlora", "full"])
def test_every_level_gives_the_same_bits(folder, tmp_path, kernels, monkeypatch, method):
    """Loss and every gradient, dropout included: its masks are drawn again from the same counters."""
    results = {}
    for level in (Recompute(), Recompute(2, 0), Recompute(3, 0), Recompute(3, 1), Recompute(3, 3)):

        def planned(graphs: Any, layers: int, caps: Any, budget: int, trace: str, level: Recompute = level) -> Any:
            rewritten = {name: rewrite(graph, level) for name, graph in graphs.items()}
            return level, make_plan(rewritten, caps), rewritten

        monkeypatch.setattr("entrenar_gpu.programs.fit", planned)
        options = {"method": method, "dropout": 0.2, "accumulate": 2}
        trainer = Trainer(config_of(folder, str(tmp_path / level.describe()), **options), kernels=kernels)
        if "rng" in trainer.executor.tensors:
            trainer.executor.write("rng", np.array([0, 1, 0]))
        run_micro_batches(trainer, next(trainer.batches))
        results[level] = (trainer.executor.read("loss"), gradients(trainer), trainer.session.plan.peak_bytes)
        trainer.session.close()
    loss, grads, _ = results[Recompute()]
    assert np.isfinite(loss[0])
    for level, (other_loss, others, _) in results.items():
        assert other_loss.tobytes() == loss.tobytes(), level
        for name, gradient in grads.items():
            np.testing.assert_array_equal(others[name], gradient, err_msg=f"{name} at {level}")
    peaks = [peak for _, _, peak in results.values()]
    assert peaks[-1] < peaks[0]
