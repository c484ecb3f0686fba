"""Adapters of the embedding and the head: what options and files ask for, training, resuming, merging, exporting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu import cli
from entrenar_gpu.adapters import AdapterSpec, adapted, load_adapter
from entrenar_gpu.adapters.lora import LoraEmbedding, LoraHead
from entrenar_gpu.adapters.tables import SavedTable, TrainedTokens
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.export.convert import export_model
from entrenar_gpu.export.merge import merge_adapter
from entrenar_gpu.files.safetensors_file import SafetensorsFile
from entrenar_gpu.model import HFCheckpoint, Storage
from entrenar_gpu.model.registry import parse_model_config
from entrenar_gpu.session import RunShape
from entrenar_gpu.session.plan_report import caps_for, plan_run
from tests.helpers.runs import train
from tests.helpers.tiny import QWEN3, make_data, make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}
MODEL = parse_model_config(QWEN3 | TINY)
PREFIX = "base_model.model."
TOKENS = "model.embed_tokens.token_adapter.trainable_tokens_delta"
# By what is asked for: the tensors in PEFT's file beside the projections', and their shapes.
RUNS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "lora": (
        {"target": "q,embed_tokens,lm_head"},
        {
            **{"model.embed_tokens.lora_embedding_A": (4, 96), "model.embed_tokens.lora_embedding_B": (32, 4)},
            **{"lm_head.lora_A.weight": (4, 32), "lm_head.lora_B.weight": (96, 4)},
        },
    ),
    "whole": (
        {"target": "q", "modules_to_save": "embed_tokens,lm_head"},
        {"model.embed_tokens.weight": (96, 32), "lm_head.weight": (96, 32)},
    ),
    "tokens": ({"target": "q", "trainable_token_indices": "95,7"}, {TOKENS: (2, 32)}),
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tables")
    make_model(path / "model", tie_word_embeddings=request.param, **TINY)
    make_data(path / "train.jsonl", vocab=96)
    return path


@pytest.mark.parametrize("run", RUNS)
def test_training_and_going_on(folder, tmp_path, run):
    """To the bit; what is trained differs from where it began, and the file holds PEFT's tensors and no others."""
    asked, tensors = RUNS[run]
    options = {"device": "numpy", "steps": 4, "save_every": 2} | asked
    whole = train(folder, str(tmp_path / "whole"), **options)
    resumed = train(folder, str(tmp_path / "on"), resume=str(tmp_path / "whole/checkpoint-000002"), **options)
    assert resumed == whole[2:]
    held = SafetensorsFile(tmp_path / "whole/adapter_model.safetensors")
    assert held.tensors.keys() == SafetensorsFile(tmp_path / "on/adapter_model.safetensors").tensors.keys()
    for name in held.tensors:
        np.testing.assert_array_equal(held[name], SafetensorsFile(tmp_path / "on/adapter_model.safetensors")[name])
    own = {name: info.shape for name, info in held.tensors.items() if "q_proj" not in name}
    assert own == {PREFIX + name: shape for name, shape in tensors.items()}
    base = HFCheckpoint.open(folder / "model").f32("model.embed_tokens.weight")
    if run == "whole":
        assert np.abs(held[f"{PREFIX}model.embed_tokens.weight"] - base).max() > 0
    if run == "tokens":
        assert (np.abs(held[PREFIX + TOKENS] - base[[95, 7]]).max(axis=1) > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("run", RUNS)
def test_gpu_and_numpy_train_alike(folder, tmp_path, kernels, monkeypatch, run):
    """With tables in several shards; losses and what comes of them."""
    monkeypatch.setattr("entrenar_gpu.model.tables.TABLE_SHARD_BYTES", 64 * 32 * 4)
    options = {"steps": 3} | RUNS[run][0]
    ours = train(folder, str(tmp_path / "gpu"), kernels, **options)
    wanted = train(folder, str(tmp_path / "host"), device="numpy", **options)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)
    files = [SafetensorsFile(tmp_path / where / "adapter_model.safetensors") for where in ("gpu", "host")]
    for name in files[0].tensors:
        np.testing.assert_allclose(files[0][name], files[1][name], rtol=0, atol=2e-4)  # steps of 5e-3 by sign


def test_a_merged_model_that_is_no_longer_tied(folder, tmp_path):
    train(folder, str(tmp_path / "run"), device="numpy", steps=1, target="q", modules_to_save="lm_head")
    merge_adapter(HFCheckpoint.open(folder / "model"), tmp_path / "run", tmp_path / "merged")
    merged, values = HFCheckpoint.open(tmp_path / "merged"), SafetensorsFile(tmp_path / "run/adapter_model.safetensors")
    assert not merged.config.tie_word_embeddings
    np.testing.assert_array_equal(merged.f32("lm_head.weight"), values[f"{PREFIX}lm_head.weight"])
    base = HFCheckpoint.open(folder / "model")
    np.testing.assert_array_equal(merged.f32("model.embed_tokens.weight"), base.f32("model.embed_tokens.weight"))


def test_layouts_that_have_no_place_for_them_are_refused(folder, tmp_path):
    train(folder, str(tmp_path / "run"), device="numpy", steps=1, target="q,embed_tokens")
    for to, alone in (("mlx", False), ("gguf", True)):
        with pytest.raises(UserError, match=r"model\.embed_tokens"):
            export_model(str(folder / "model"), tmp_path / f"{to}.out", to, tmp_path / "run", adapter_only=alone)
        assert not (tmp_path / f"{to}.out").exists()


def test_what_options_ask_for():
    def spec_of(**options: Any) -> AdapterSpec:
        return AdapterSpec.from_config(TrainConfig(rank=4, **options), MODEL)

    assert not spec_of().tables  # all-linear is every projection, as PEFT means it
    both = spec_of(target="all,embed_tokens,lm_head")
    assert both.modules == spec_of().modules
    assert both.tables == {
        "model.embed_tokens": LoraEmbedding("model.embed_tokens", 96, 32, 4, 8),
        "lm_head": LoraHead("lm_head", 32, 96, 4, 8),
    }
    assert spec_of(modules_to_save="lm_head").tables == {"lm_head": SavedTable("lm_head", 96, 32)}
    tokens = {"model.embed_tokens": TrainedTokens("model.embed_tokens", 96, 32, (9, 1))}
    assert spec_of(trainable_token_indices="9, 1").tables == tokens


WRONG = {
    "--modules-to-save: 'norm'": {"modules_to_save": "norm"},
    "--modules-to-save: is for adapters": {"modules_to_save": "lm_head", "method": "full"},
    "--trainable-token-indices: '96' is not": {"trainable_token_indices": "3,96"},
    "--trainable-token-indices: '99999999999999999999' is not": {"trainable_token_indices": "9" * 5000},
    "--layers-to-transform: '99999999999999999999' is not": {"layers_to_transform": "9" * 5000},
    "--trainable-token-indices: '-1' is not": {"trainable_token_indices": "-1"},
    "--trainable-token-indices: a token is there twice": {"trainable_token_indices": "3,3"},
    "embed_tokens: modules_to_save and trainable_token_indices": {
        **{"modules_to_save": "embed_tokens", "trainable_token_indices": "3"},
    },
    "--target: embed_tokens lies in none": {"target": "q,embed_tokens", "layers": 1},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_are_told(message):
    with pytest.raises(UserError, match=message):
        AdapterSpec.from_config(TrainConfig(rank=4, **WRONG[message]), MODEL)


WRONG_KEYS = [
    ({"modules_to_save": ["norm"]}, "modules_to_save 'norm' is not supported"),
    ({"modules_to_save": "lm_head"}, "modules_to_save must be"),
    ({"trainable_token_indices": [1, "2"]}, "trainable_token_indices must be"),
    ({"trainable_token_indices": {"embed_tokens": []}}, "trainable_token_indices must be"),
    ({"trainable_token_indices": {"norm": [1]}}, "trainable_token_indices 'norm' is not supported"),
    ({"trainable_token_indices": [96]}, "adapter_config.json: trainable_token_indices: 96 is not a token"),
    ({"target_modules": ["norm"]}, "target_modules includes 'model.norm'"),
]


@pytest.mark.parametrize(("keys", "message"), WRONG_KEYS)
def test_wrong_keys_of_a_file_are_told(tmp_path, keys, message):
    raw = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]} | keys
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message) as told:
        AdapterSpec.from_peft(tmp_path, MODEL)
    assert "\n" not in str(told.value)


def test_plan_counts_what_is_trained(folder, tmp_path):
    def parts(**options: Any) -> dict[str, Any]:
        config = TrainConfig(model=str(folder / "model"), batch=1, seq=16, rank=4, target="q", **options)
        return plan_run(config, caps_for(None, None, None), 1 << 30, evaluates=False).to_mapping()

    table = 96 * 32 * 4
    for key in ("adapter_bytes", "gradient_bytes"):
        assert parts(modules_to_save="lm_head")[key] - parts()[key] == table
        assert 0 < parts(trainable_token_indices="3")[key] - parts()[key] <= 256


def test_plan_takes_the_flags(folder, capsys):
    base = ["plan", "--model", str(folder / "model"), "--seq", "16", "--rank", "4", "--target", "q", "--json"]
    found = []
    for more in ([], ["--modules-to-save", "lm_head"], ["--trainable-token-indices", "3,5"]):
        assert cli.run(base + more) == 0
        found.append(json.loads(capsys.readouterr().out)["adapter_bytes"])
    assert found[0] < found[2] < found[1]


def test_the_b_of_a_head_is_one_that_is_made_faster(folder):
    """As in PEFT's LoRA+, which has the embedding's apart."""
    config = TrainConfig(model=str(folder / "model"), batch=1, seq=16, target="q,embed_tokens,lm_head", lr_ratio_b=4.0)
    spec = AdapterSpec.from_config(config, MODEL)
    shape = RunShape(MODEL, adapted(Storage(), spec), config)
    assert shape.faster_parameters == {"model.layers.0.self_attn.q_proj.lora_B.weight", "lm_head.lora_B.weight"}


def test_a_copy_of_the_base_beside_lora_of_a_table_is_passed_over(folder, tmp_path):
    """PEFT saves one unasked."""
    train(folder, str(tmp_path / "run"), device="numpy", steps=1, target="q,embed_tokens")
    spec, values = load_adapter(tmp_path / "run", HFCheckpoint.open(folder / "model").config)
    assert isinstance(spec.tables["model.embed_tokens"], LoraEmbedding)
    assert np.abs(values["model.embed_tokens.lora_embedding_A"]).max() > 0
