"""Checkpoints that name or tie weights otherwise than config.json lets expect: what is in the file counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from entrenar_gpu import cli
from entrenar_gpu.adapters import AdapterSpec, init_adapter, save_adapter
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.export import merge_adapter
from entrenar_gpu.model.hf_checkpoint import HFCheckpoint
from entrenar_gpu.train import evaluate_data
from tests.helpers.tiny import make_data, make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def change(folder: Path, **changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Replace tensors of a model's file, or take them out."""
    tensors = load_file(folder / "model.safetensors") | changes
    tensors = {name: values for name, values in tensors.items() if values is not None}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def loss_of(folder: Path) -> float:
    data = make_data(folder.parent / "valid.jsonl", 4, vocab=96)
    options = {"method": "lora", "device": "numpy", "seq": 32}
    return evaluate_data(TrainConfig(model=str(folder), data=str(data), **options), False)["loss"]


def merged(folder: Path) -> Path:
    """The model with an adapter that adds nothing."""
    base, output = HFCheckpoint.open(folder), folder.parent / f"{folder.name}-merged"
    spec = AdapterSpec.from_config(TrainConfig(rank=2, target="q"), base.config)
    save_adapter(folder.parent / "adapter", spec, init_adapter(spec, 0), "x")
    merge_adapter(base, folder.parent / "adapter", output)
    return output


def test_a_head_of_its_own_wins_over_a_config_that_ties(tmp_path):
    head = np.random.default_rng(5).standard_normal((96, 32)).astype(np.float32)
    untied = make_model(tmp_path / "untied", **TINY, tie_word_embeddings=False)
    change(untied, **{HEAD: head})
    tied = make_model(tmp_path / "tied", **TINY)
    change(tied, **load_file(untied / "model.safetensors"))
    checkpoint = HFCheckpoint.open(tied)
    assert not checkpoint.config.tie_word_embeddings
    assert checkpoint.notes == [
        f"{tied / 'model.safetensors'}: lm_head.weight is not the embedding, though config.json ties them: it is used"
    ]
    assert loss_of(tied) == loss_of(untied)
    output = merged(tied)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_file(output / "model.safetensors")[HEAD], head)
    assert loss_of(output) == loss_of(untied)


@pytest.mark.parametrize("other", ["the same", "of another shape"])
def test_a_head_that_adds_nothing_leaves_the_model_tied(tmp_path, other):
    folder = make_model(tmp_path / "model", **TINY)
    table = load_file(folder / "model.safetensors")[EMBEDDING]
    change(folder, **{HEAD: table if other == "the same" else np.ones((3, 3), np.float32)})
    checkpoint = HFCheckpoint.open(folder)
    assert checkpoint.config.tie_word_embeddings
    assert not checkpoint.notes


def test_a_tied_pair_may_be_stored_as_its_head(tmp_path):
    folder = make_model(tmp_path / "model", **TINY)
    loss = loss_of(folder)
    table = load_file(folder / "model.safetensors")[EMBEDDING]
    change(folder, **{EMBEDDING: None, HEAD: table})
    assert loss_of(folder) == loss
    np.testing.assert_array_equal(load_file(merged(folder) / "model.safetensors")[EMBEDDING], table)


@pytest.mark.parametrize(("tied", "as_head"), [(True, False), (False, False), (True, True)])
def test_names_may_lack_the_prefix(tmp_path, tied, as_head):
    folder = make_model(tmp_path / "model", **TINY, tie_word_embeddings=tied)
    loss, names = loss_of(folder), set(load_file(folder / "model.safetensors"))
    tensors = load_file(folder / "model.safetensors")
    if as_head:
        tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file({name.removeprefix("model."): v for name, v in tensors.items()}, folder / "model.safetensors")
    assert loss_of(folder) == loss
    assert set(load_file(merged(folder) / "model.safetensors")) == names


def test_runs_say_that_a_head_is_used(tmp_path, capsys):
    folder = make_model(tmp_path / "model", **TINY)
    change(folder, **{HEAD: np.ones((96, 32), np.float32)})
    data = make_data(tmp_path / "train.jsonl", 4, vocab=96)
    common = ["--model", str(folder), "--data", str(data), "--device", "numpy", "--seq", "32"]
    said = "lm_head.weight is not the embedding, though config.json ties them: it is used"
    assert cli.run(["eval", *common]) == 0
    assert capsys.readouterr().err == f"base: as stored; {folder / 'model.safetensors'}: {said}\n"
    assert cli.run(["train", *common, "--steps", "1", "--batch", "1", "--output", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert said in captured.out + captured.err
