"""What a session settles before it allocates: the memory budget, positions, the adapter a run starts from."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu.adapters.peft_files import save_adapter
from entrenar_gpu.adapters.spec import AdapterSpec, init_adapter
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.files.tensor_source import save_safetensors
from entrenar_gpu.graph.caps import Caps
from entrenar_gpu.model.hf_checkpoint import HFCheckpoint
from entrenar_gpu.session.graphs import training_graphs
from entrenar_gpu.session.session import Session, memory_budget
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import config_of
from tests.helpers.tiny import make_data, make_model
from tests.model.test_hf_checkpoint import nf4_tensors

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}
TRAINING = functools.partial(training_graphs, evaluates=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("session")
    make_model(path / "model", max_position_embeddings=40, **TINY)
    make_data(path / "train.jsonl", vocab=96)
    return path


def open_session(folder: Path, **options: Any) -> Session:
    config = config_of(folder, **({"device": "numpy"} | options))
    return Session.open(config, TRAINING)


def test_numpy_is_no_gpu_that_auto_takes_f16_for(folder):
    session = open_session(folder, precision="auto")
    assert session.executor.read("loss_scale") == 1
    session.close()


def test_the_memory_budget_is_said_or_known_or_assumed():
    caps = replace(Caps(), memory_bytes=10 << 30)
    assert memory_budget(TrainConfig(memory_budget=0.5), caps).nbytes == 1 << 29
    known, assumed = memory_budget(TrainConfig(), caps), memory_budget(TrainConfig(), Caps())
    assert (known.nbytes, assumed.nbytes) == (9 << 30, 16 << 30)
    assert "10.0 GiB of GPU memory" in known.source
    assert "unknown" in assumed.source
    assert "16 GiB" in assumed.source


def test_rows_longer_than_the_models_positions_are_refused(folder):
    with pytest.raises(UserError, match="--seq: 48 exceeds the model's 40 positions"):
        open_session(folder, seq=48)


def test_a_run_starts_from_a_fresh_adapter_or_the_one_it_is_given(folder, tmp_path):
    session = open_session(folder, seed=3)
    fresh = session.adapter_values()
    assert fresh.keys() == session.trainable().keys()
    wanted = init_adapter(session.adapters, 3)
    for name, values in fresh.items():
        np.testing.assert_array_equal(values, wanted[name])
    options = TrainConfig(rank=2, target="q,down", rslora=True)
    spec = AdapterSpec.from_config(options, session.checkpoint.config)
    given = {name: np.full(shape, 0.5, np.float32) for name, shape in spec.shapes().items()}
    save_adapter(tmp_path, spec, given, "x")
    loaded = open_session(folder, adapter_init=str(tmp_path))  # its rank and targets win over the options
    assert loaded.trainable() == spec.shapes()
    assert all((values == 0.5).all() for values in loaded.adapter_values().values())
    assert loaded.adapters.modules == spec.modules


@pytest.mark.parametrize(
    ("options", "argument"), [({"rank": 3}, "rank"), ({"alpha": 9.0}, "alpha"), ({"target": "q"}, "target")]
)
def test_another_adapter_than_the_one_given_is_refused(folder, tmp_path, options, argument):
    model = open_session(folder).checkpoint.config
    spec = AdapterSpec.from_config(TrainConfig(rank=2, target="q,down"), model)
    save_adapter(tmp_path, spec, init_adapter(spec, 0), "x")
    defaults = {"rank": TrainConfig.rank, "device": "numpy", "adapter_init": str(tmp_path)}
    Trainer(config_of(folder, str(tmp_path / "run"), **defaults)).session.close()  # defaults are no contradiction
    with pytest.raises(UserError, match=f"^{argument}: .* has another"):
        Trainer(config_of(folder, str(tmp_path / "other"), **(defaults | options)))


def test_full_training_has_no_adapter(folder):
    session = open_session(folder, method="full")
    assert session.adapters is None
    assert sum(map(np.prod, session.trainable().values())) == session.checkpoint.config.parameters


@pytest.mark.gpu
def test_a_session_says_which_device_it_is_on(folder, kernels):
    session = Session.open(config_of(folder), TRAINING, kernels=kernels)
    assert session.gpu_info["adapter"] == kernels.device.info["device"]
    assert session.allocated_bytes == kernels.device.allocated_bytes
    session.close()
    assert open_session(folder).gpu_info["adapter"] == "numpy"


@pytest.mark.parametrize("where", ["numpy", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_what_a_quantised_checkpoint_keeps_dense_stays_dense(tmp_path, request, where):
    """As `llm_int8_skip_modules` leaves it: in training, in evaluation and in the merged model."""
    folder = make_model(tmp_path / "model", **TINY)
    dense = HFCheckpoint.open(folder)
    skipped = ["model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.gate_proj.weight"]
    tensors: dict[str, np.ndarray] = {}
    for spec in dense.config.weights:
        quantised = spec.kind == "projection" and spec.name not in skipped
        stored = nf4_tensors(spec.name, dense.f32(spec.name), True) if quantised else {spec.name: dense.raw(spec.name)}
        tensors |= {key: np.array(values) for key, values in stored.items()}
    save_safetensors(folder / "model.safetensors", tensors)
    make_data(tmp_path / "train.jsonl", vocab=96)
    kernels = None if where == "numpy" else request.getfixturevalue("kernels")
    trainer = Trainer(config_of(tmp_path, steps=2, device="numpy" if kernels is None else None), kernels=kernels)
    assert [record.loss for record in trainer.steps()][1] > 0
    executor = trainer.session.executor
    for spec in dense.config.weights:
        if spec.kind == "projection":
            assert (spec.name in executor.tensors) == (spec.name in skipped)
            assert (f"{spec.name}.codes" in executor.tensors) == (spec.name not in skipped)
    for name in skipped:
        np.testing.assert_array_equal(executor.read(name), dense.raw(name))
    trainer.session.close()
