"""Claims that training must not falsify: convergence of LoRA (F-CONV), and its edge cases (F-EDGE).

Each is named by its number. On the NumPy device, whose arithmetic the GPU's is held to elsewhere; seeds are fixed, so
that a claim holds always or never. Losses are bounded by what such runs reach with a margin, not by "lower" alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import config_of, train
from tests.helpers.tiny import make_model

HIDDEN, LAYERS, VOCAB, ROW = 32, 2, 96, 8
TINY = {"hidden_size": HIDDEN, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
QV: dict[str, Any] = {
    **{"method": "lora", "rank": 8, "alpha": 16.0, "target": "q,v", "seq": ROW, "batch": 1, "device": "numpy"},
    **{"lr": 0.01, "schedule": "constant", "warmup": 0, "shuffle": False},
}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("falsification") / "model", max_position_embeddings=ROW, **TINY)


@pytest.fixture
def rows_of(model: Path, tmp_path: Path) -> Make:
    """A folder for runs over `count` rows of eight tokens, each of which the token before it tells."""

    def make(count: int) -> Path:
        (tmp_path / "model").symlink_to(model)
        rows = [[(7 * i + j + 1) % (VOCAB - 1) + 1 for j in range(ROW + 1)] for i in range(count)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        return tmp_path

    return make


def test_f_conv_003_lora_lowers_the_loss_over_200_steps(rows_of):
    losses = train(rows_of(1), steps=200, **QV)
    assert losses[0] > 0
    assert losses[-1] < 0.2 * losses[0]


def test_f_conv_005_rslora_is_stable_at_a_high_rank(rows_of):
    """At the model's width: alpha / sqrt(rank) there is eleven times what alpha / rank is at rank 8."""
    losses = train(rows_of(1), steps=80, **QV | {"rank": HIDDEN, "alpha": 2.0 * HIDDEN, "rslora": True})
    assert np.isfinite(losses).all()
    assert max(losses) < 2 * losses[0]
    assert losses[-1] < 0.2 * losses[0]


def test_f_conv_006_a_higher_rank_fits_no_worse(rows_of):
    folder = rows_of(4)
    last = {
        rank: train(folder, f"rank{rank}", steps=50, **QV | {"rank": rank, "alpha": 2.0 * rank})[-1]
        for rank in (1, 4, 16)
    }
    assert last[16] <= 1.05 * last[4] <= 1.05 * 1.05 * last[1]


def test_f_conv_007_training_beats_the_untrained_model(rows_of):
    folder = rows_of(20)
    untrained = np.mean(train(folder, "untrained", steps=20, **QV | {"lr": 0.0}))
    trained = np.mean(train(folder, "trained", steps=100, **QV)[-20:])
    assert trained < 0.7 * untrained


def test_f_conv_008_what_was_learnt_is_not_forgotten_over_epochs(rows_of):
    losses = np.reshape(train(rows_of(20), epochs=3.0, steps=None, **QV), (3, 20))
    assert (np.diff(losses.mean(axis=1)) < 0).all()


def test_f_edge_001_rank_one_learns(rows_of):
    losses = train(rows_of(1), steps=50, **QV | {"rank": 1, "alpha": 2.0})
    assert losses[-1] < 0.9 * losses[0]


def test_f_edge_002_the_rank_may_be_the_models_width(rows_of):
    trainer = Trainer(config_of(rows_of(1), steps=50, **QV | {"rank": HIDDEN, "alpha": 2.0 * HIDDEN}))
    assert trainer.session.adapters is not None
    assert {module.rank for module in trainer.session.adapters.modules.values()} == {HIDDEN}
    losses = [record.loss for record in trainer.steps()]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.5 * losses[0]


def held(trainer: Trainer) -> dict[str, np.ndarray]:
    """Every weight, trained or not, by name."""
    tensors = trainer.executor.tensors.values()
    return {t.name: trainer.executor.read(t.name).copy() for t in tensors if t.role in ("weight", "param")}


def test_f_edge_003_one_target_trains_its_adapters_and_nothing_else(rows_of):
    trainer = Trainer(config_of(rows_of(4), steps=10, **QV | {"target": "q"}))
    before = held(trainer)
    list(trainer.steps())
    after = held(trainer)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(LAYERS)]
    assert changed == {f"{path}.lora_{part}.weight" for path in paths for part in "AB"}
    assert "model.layers.0.self_attn.v_proj.weight" in before


def test_f_edge_006_without_lora_every_weight_is_trained(rows_of):
    trainer = Trainer(config_of(rows_of(4), steps=10, **QV | {"method": "full"}))
    assert trainer.session.adapters is None
    before = held(trainer)
    list(trainer.steps())
    after = held(trainer)
    unchanged = {name for name in before if np.array_equal(before[name], after[name])}
    assert not {name for name in unchanged if name in trainer.session.trainable()}
    assert trainer.session.trainable().keys() == {t.name for weight in trainer.session.weights for t in weight.tensors}


def test_f_edge_007_gradients_of_four_micro_batches_are_one_update(rows_of):
    """Nothing is updated before the fourth; then all at once, by the mean over all of them."""
    folder = rows_of(8)
    trainer = Trainer(config_of(folder, steps=2, accumulate=4, **QV))
    before, step = held(trainer), next(trainer.batches)
    trainer.executor.write("inv_tokens", np.array([1 / step.weight]))
    for number, batch in enumerate(step.micro_batches):
        trainer.session.write_batch(batch)
        trainer.executor.run("micro", number)
    assert len(step.micro_batches) == 4
    assert all(np.array_equal(before[name], values) for name, values in held(trainer).items())
    trainer.session.close()
    together = train(folder, "accumulated", steps=8, **QV | {"accumulate": 4})
    at_once = train(folder, "at once", steps=8, **QV | {"batch": 4})
    np.testing.assert_allclose(together, at_once, rtol=1e-5)
    assert together[-1] < together[0]
