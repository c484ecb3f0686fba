"""What `eval`, `generate` and `merge` take for the base, and that they say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from entrenar_gpu import cli
from entrenar_gpu.export import merge_adapter
from entrenar_gpu.model.hf_checkpoint import HFCheckpoint
from entrenar_gpu.quant.nf4 import Nf4Weight
from tests.helpers.runs import train
from tests.helpers.tiny import make_data, make_model, projections
from tests.helpers.word_tokenizer import word_tokenizer

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and a run of each method on it."""
    path = tmp_path_factory.mktemp("base")
    make_model(path / "model", **TINY)
    make_data(path / "train.jsonl", 8, vocab=96)
    for method in ("qlora", "lora", "full"):
        train(path, method, method=method, device="numpy", steps=3, lr=2e-2, rank=2)
    return path


def run(capsys, *arguments: object) -> tuple[str, str]:
    assert cli.run([str(word) for word in arguments]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def loss(capsys, folder: Path, *arguments: object) -> tuple[float, str]:
    """(loss, what is said of the base) of an evaluation."""
    data = ("--data", folder / "train.jsonl", "--seq", 32, "--device", "numpy", "--json")
    out, err = run(capsys, "eval", *data, *arguments)
    return json.loads(out)["loss"], err


@pytest.mark.parametrize(("method", "words"), [("qlora", "NF4"), ("lora", "as stored")])
@pytest.mark.parametrize("place", ["", "checkpoint-000003"])
def test_an_adapter_is_judged_on_what_it_was_trained_on(folder, capsys, method, words, place):
    where = ("--model", folder / "model", "--adapter", folder / method / place)
    by_default, said = loss(capsys, folder, *where)
    run_folder = (folder / method).resolve() if place else folder / method
    assert said == f"base: {words}, as {run_folder / 'run.json'} says\n"
    assert by_default == loss(capsys, folder, *where, "--method", method)[0]
    other = {"qlora": "lora", "lora": "qlora"}[method]
    assert by_default != loss(capsys, folder, *where, "--method", other)[0]


def test_the_name_of_a_run_does_not_steer_the_terminal(folder, tmp_path, capsys):
    """Which both ways of saying what the base is show."""
    named = tmp_path / "a\x1b[31m\nb"
    shutil.copytree(folder / "lora", named)
    where = ("--model", folder / "model", "--adapter", named)
    told = [loss(capsys, folder, *where)[1]]
    word_tokenizer(folder / "model", 96)
    told.append(run(capsys, "generate", *where, "--prompt", "w1", "--max-tokens", 1, "--device", "numpy")[1])
    assert [said.count("a\\x1b[31m\\nb/run.json says\n") for said in told] == [1, 1], told


def test_a_model_without_an_adapter_is_read_as_stored(folder, capsys):
    by_default, said = loss(capsys, folder, "--model", folder / "full")
    assert said == "base: as stored\n"
    assert by_default == loss(capsys, folder, "--model", folder / "full", "--method", "lora")[0]
    quantised, said = loss(capsys, folder, "--model", folder / "full", "--method", "qlora")
    assert said == "base: NF4, by --method\n"
    assert quantised != by_default


def test_a_run_folder_that_says_nonsense_is_named(folder, tmp_path, capsys):
    shutil.copytree(folder / "lora", tmp_path / "run")
    (tmp_path / "run/run.json").write_text('{"config": []}')
    where = ["--model", folder / "model", "--adapter", tmp_path / "run", "--data", folder / "train.jsonl"]
    assert cli.run(["eval", *map(str, where)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'run/run.json'}: not the options of a training run\n"


def test_merge_says_on_what_it_folds(folder, tmp_path, capsys):
    """Into NF4 what was trained there stays what it was: the merged model has the adapter's loss."""
    where = ("--model", folder / "model", "--adapter", folder / "qlora")
    out, _ = run(capsys, "merge", *where, "--output", tmp_path / "stored")
    assert out.splitlines()[0] == f"merged model: {tmp_path / 'stored'}, on the stored weights"
    assert "the adapter was trained on the NF4 form of them; --base nf4" in out
    out, _ = run(capsys, "merge", *where, "--output", tmp_path / "nf4", "--base", "nf4")
    assert out == f"merged model: {tmp_path / 'nf4'}, on the NF4 form of the weights\n"
    trained, _ = loss(capsys, folder, *where)
    assert loss(capsys, folder, "--model", tmp_path / "nf4")[0] == pytest.approx(trained, rel=1e-6)
    assert loss(capsys, folder, "--model", tmp_path / "stored")[0] != pytest.approx(trained, rel=1e-4)


def test_merge_into_nf4_is_the_base_and_the_update(folder, tmp_path):
    base = HFCheckpoint.open(folder / "model")
    merge_adapter(base, folder / "lora", tmp_path / "out", double_quant=False)
    merge_adapter(base, folder / "lora", tmp_path / "plain")
    nf4, plain = (HFCheckpoint.open(tmp_path / name) for name in ("out", "plain"))
    for name in projections(base.config):
        update = plain.f32(name) - base.f32(name)
        wanted = Nf4Weight.from_dense(base.f32(name), False).dequantize() + update
        np.testing.assert_allclose(nf4.f32(name), wanted, atol=1e-6)
    np.testing.assert_array_equal(nf4.f32("model.norm.weight"), base.f32("model.norm.weight"))


@pytest.mark.parametrize("place", ["base", "overflow", "adapter"])
def test_what_is_not_finite_is_not_merged(folder, tmp_path, capsys, place):
    """NaN in a weight of the base or of the adapter, or a sum beyond float16: named, and nothing is left behind."""
    shutil.copytree(folder / "lora", tmp_path / "run")
    model = make_model(tmp_path / "model", dtype="float16", **TINY) / "model.safetensors"
    name, lora_b = "model.layers.0.mlp.up_proj.weight", "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    tensors, adapter = load_file(model), load_file(tmp_path / "run/adapter_model.safetensors")
    if place == "base":
        tensors[name][3, 4] = np.nan
    else:
        adapter[lora_b][0, 0] = np.inf if place == "adapter" else 3e6
    save_file(tensors, model)
    save_file(adapter, tmp_path / "run/adapter_model.safetensors")
    where = ["--model", tmp_path / "model", "--adapter", tmp_path / "run", "--output", tmp_path / "out"]
    assert cli.run(["merge", *map(str, where)]) == 2
    told = capsys.readouterr().err
    culprit = (tmp_path / "run/adapter_model.safetensors", lora_b) if place == "adapter" else (model, name)
    assert told.startswith(f"error: {culprit[0]}: tensor {culprit[1]!r}")
    assert "not finite" in told
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".safetensors")]


def test_a_loss_that_is_not_finite_is_no_result(folder, tmp_path, capfd):
    """Finite weights whose products overflow: one line, none of NumPy's, and nothing that reads like a loss."""
    shutil.copytree(folder / "lora", tmp_path / "run")
    config = tmp_path / "run/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 1e29}))
    where = ["--model", folder / "model", "--adapter", tmp_path / "run", "--data", folder / "train.jsonl"]
    assert cli.run(["eval", *map(str, where), "--seq", "32", "--device", "numpy"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 2
    assert "error: --model: " in err.split("\n")[1]
    assert f"with the adapter {tmp_path / 'run'}: the loss is not finite" in err


def test_json_prints_null_for_what_is_not_finite(folder, capsys, monkeypatch):
    monkeypatch.setattr("entrenar_gpu.train.evaluate_data", lambda *_, **__: {"loss": np.nan, "rows": [np.inf, 1.0]})
    out, _ = run(capsys, "eval", "--model", folder / "model", "--data", folder / "train.jsonl", "--json")
    assert json.loads(out) == {"loss": None, "rows": [None, 1.0]}
    assert "NaN" not in out
