"""Training from scratch: what weights start as, and that such a run learns, resumes and is made once."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.train.random_base import with_random_base
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.tiny import QWEN3, make_data

TINY = {"num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 64, "head_dim": 8, "vocab_size": 96}
GEMMA = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "pad_token_id": 3, "rope_theta": 1e4}


def made(folder, changes, **options):
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(QWEN3 | TINY | changes))
    make_data(folder / "train.jsonl", vocab=96)
    paths = {"model": str(folder / "model"), "data": str(folder / "train.jsonl"), "output": str(folder / "run")}
    return TrainConfig(
        **({"init": "random", "method": "full", "batch": 2, "seq": 32, "device": "numpy"} | paths | options)
    )


def test_weights_start_as_in_transformers(tmp_path):
    config = with_random_base(made(tmp_path, GEMMA | {"attention_bias": True, "initializer_range": 0.05}, seed=4))
    weights = load_file(tmp_path / "run/base/model.safetensors")
    assert config.model == str(tmp_path / "run/base")
    assert (weights["model.norm.weight"] == 0).all()  # Gemma's, which one is added to
    assert (weights["model.layers.0.self_attn.q_proj.bias"] == 0).all()
    table = weights["model.embed_tokens.weight"]
    assert (table[3] == 0).all()
    for values in (np.delete(table, 3, 0), weights["model.layers.0.mlp.up_proj.weight"]):
        assert values.std() == pytest.approx(0.05, rel=0.05)
        assert abs(values.mean()) < 0.05 / 16
    assert not np.array_equal(
        weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.0.mlp.gate_proj.weight"]
    )


def test_a_run_from_scratch_learns_and_goes_on(tmp_path):
    options = {"steps": 12, "lr": 1e-2, "schedule": "constant"}
    whole = list(Trainer(made(tmp_path, {}, save_every=6, **options)).steps())
    assert whole[0].loss == pytest.approx(np.log(96), abs=0.1)  # nothing is known yet
    assert whole[-1].loss < whole[0].loss - 0.5
    base = (tmp_path / "run/base/model.safetensors").stat().st_mtime_ns
    paths = {"model": str(tmp_path / "model"), "data": str(tmp_path / "train.jsonl"), "output": str(tmp_path / "run")}
    again = TrainConfig(**paths, **options, init="random", method="full", batch=2, seq=32, device="numpy",
                        resume=str(tmp_path / "run/checkpoint-000006"))  # fmt: skip
    assert [step.loss for step in Trainer(again).steps()] == [step.loss for step in whole[6:]]
    assert (tmp_path / "run/base/model.safetensors").stat().st_mtime_ns == base


def test_a_shape_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("entrenar_gpu.config.presets", fromlist=["SHAPES"]).SHAPES, "tiny", QWEN3 | TINY)
    config = with_random_base(made(tmp_path, {}, model="tiny"))
    assert json.loads((tmp_path / "run/base/config.json").read_text())["hidden_size"] == 48
    assert config.model == str(tmp_path / "run/base")


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_of_random_weights_are_refused(tmp_path, method):
    with pytest.raises(UserError, match="--init: random weights are trained with --method full"):
        with_random_base(made(tmp_path, {}, method=method))
