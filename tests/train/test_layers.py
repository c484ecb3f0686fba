"""--layers and --layers-to-transform: what is trained, and that nothing is computed or kept below it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from entrenar_gpu.adapters import AdapterSpec, trained_weights
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.graph.caps import Caps
from entrenar_gpu.model import Storage, parse_model_config
from entrenar_gpu.ops.registry import OPS
from entrenar_gpu.session.graphs import RunShape, micro_graph, training_graphs
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import config_of, fit_for, gradients, run_micro_batches
from tests.helpers.tiny import QWEN3, make_data, make_model

SIZES = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96}
MODEL = parse_model_config(QWEN3 | SIZES)


def shape_of(**options):
    config = TrainConfig(batch=2, seq=32, rank=4, precision="f32", **options)
    modules = {} if config.method == "full" else AdapterSpec.from_config(config, MODEL).modules
    return RunShape(MODEL, Storage(config.method, trained=trained_weights(config, MODEL), adapters=modules), config)


def backward_of(shape):
    return [node for node in micro_graph(shape, Caps()).nodes if node.phase == "backward"]


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_the_backward_pass_ends_where_training_does(method):
    some, every = (backward_of(shape_of(method=method, layers=layers)) for layers in (1, None))
    assert {node.layer for node in some if node.layer is not None} == {3}
    cost = [sum(OPS[n.op].flops(n) for n in nodes if n.layer is not None) for nodes in (some, every)]
    # Of the first layer that is trained, what it read needs no gradient: a little less than one layer in four.
    assert 0.15 < cost[0] / cost[1] < 0.25


def test_activations_below_are_not_kept():
    peaks = []
    for layers in (1, None):
        fitted = fit_for(shape_of(method="lora", layers=layers), Caps(), 1 << 40)
        peaks.append(fitted.plan.peak_bytes)
    kept = 32 * 2 * 4 * (2 * 48 + 6 * 32)  # of a layer at the very least: its activations in f32, in bytes
    assert peaks[1] - peaks[0] > 2 * kept


def test_gradients_are_those_of_training_all(tmp_path):
    """Fresh adapters add nothing, so that those below change no gradient above."""
    make_model(tmp_path / "model", **SIZES)
    make_data(tmp_path / "train.jsonl", vocab=96)
    found = []
    for options in ({"layers": 2}, {"layers_to_transform": "3, 2"}, {}):
        trainer = Trainer(config_of(tmp_path, device="numpy", method="lora", **options))
        run_micro_batches(trainer, next(trainer.batches))
        found.append(gradients(trainer))
        trainer.session.close()
    last, listed, every = found
    assert last.keys() == listed.keys() == {name for name in every if name.split(".")[2] in "23"}
    for name, gradient in last.items():
        np.testing.assert_array_equal(gradient, every[name])
        np.testing.assert_array_equal(gradient, listed[name])


def test_full_training_of_the_last_layers_leaves_the_rest(tmp_path):
    from safetensors.numpy import load_file

    make_model(tmp_path / "model", **SIZES)
    make_data(tmp_path / "train.jsonl", vocab=96)
    trainer = Trainer(config_of(tmp_path, device="numpy", method="full", layers=1, steps=2, lr=1e-2))
    list(trainer.steps())
    trainer.session.close()
    before, after = load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "run/model.safetensors")
    changed = {name for name, values in before.items() if not np.array_equal(values, after[name])}
    assert changed == {name for name in before if ".layers.3." in name or name == "model.norm.weight"}


def test_an_adapter_of_some_layers_names_them(tmp_path):
    make_model(tmp_path / "model", **SIZES)
    make_data(tmp_path / "train.jsonl", vocab=96)
    trainer = Trainer(config_of(tmp_path, device="numpy", method="lora", layers=1, target="q,v", steps=1))
    list(trainer.steps())
    trainer.session.close()
    config = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.3.self_attn.{name}_proj" for name in "qv"]


WRONG = {
    "more than there are": ({"layers": 5}, "--layers: 5 is more than the model's 4"),
    "both": ({"layers": 1, "layers_to_transform": "0"}, "--layers: give it or --layers-to-transform, not both"),
    "outside": ({"layers_to_transform": "0,4"}, "--layers-to-transform: '4' is not a layer of 0 to 3"),
    "no number": ({"layers_to_transform": "last"}, "--layers-to-transform: 'last' is not a layer of 0 to 3"),
    "full": ({"layers_to_transform": "1", "method": "full"}, "--layers-to-transform: is for adapters"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_layers_that_are_not_there_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        training_graphs(shape_of(**options), Caps(), evaluates=False)
