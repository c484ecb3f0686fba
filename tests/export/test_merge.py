"""An adapter folded into its base model."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from entrenar_gpu import cli
from entrenar_gpu.adapters.peft_files import save_adapter
from entrenar_gpu.adapters.spec import AdapterSpec
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.export.hf_writer import copy_model_files
from entrenar_gpu.export.merge import merge_adapter, merged_weight
from entrenar_gpu.files.tensor_source import save_safetensors
from entrenar_gpu.model.hf_checkpoint import HFCheckpoint
from tests.data.test_chat import model_folder
from tests.helpers import chat_templates
from tests.helpers.tiny import make_model, projections
from tests.model.test_hf_checkpoint import nf4_tensors

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 2}


def make_adapter(folder: Path, checkpoint: HFCheckpoint) -> dict[str, np.ndarray]:
    """An adapter on q and down; returns scale * B A by the weight it changes, in float64."""
    spec = AdapterSpec.from_config(TrainConfig(rank=3, alpha=5.0, target="q,down", rslora=True), checkpoint.config)
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape, np.float32) for name, shape in spec.shapes().items()}
    save_adapter(folder, spec, values, "x")
    return {
        f"{m.path}.weight": 5 / np.sqrt(3) * values[m.b_name].astype(np.float64) @ values[m.a_name]
        for m in spec.modules.values()
    }


@pytest.mark.parametrize(("dtype", "epsilon"), [("float32", 2e-7), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_adapted_weights_change_and_no_others(tmp_path, dtype, epsilon):
    base = HFCheckpoint.open(make_model(tmp_path / "model", dtype=dtype, **TINY))
    updates = make_adapter(tmp_path / "adapter", base)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    merged = HFCheckpoint.open(tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["torch_dtype"] == dtype
    assert len(updates) == 4
    for name in [spec.name for spec in base.config.weights]:
        kind = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
        assert merged.raw(name).dtype == kind
        if name not in updates:
            np.testing.assert_array_equal(merged.raw(name), base.raw(name))
            continue
        wanted = base.f32(name) + updates[name]
        # one rounding to the stored type, and products of three terms before it
        np.testing.assert_allclose(merged.f32(name), wanted, rtol=epsilon, atol=1e-5 if dtype == "float32" else 2e-6)


def test_an_adapter_is_merged_once(tmp_path):
    """Folded in a second time it would count twice; others may follow it."""
    base = HFCheckpoint.open(make_model(tmp_path / "model", **TINY))
    make_adapter(tmp_path / "adapter", base)
    spec = AdapterSpec.from_config(TrainConfig(rank=3, target="q"), base.config)
    save_adapter(tmp_path / "other", spec, {n: np.ones(s, np.float32) for n, s in spec.shapes().items()}, "x")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "once")
    merge_adapter(HFCheckpoint.open(tmp_path / "once"), tmp_path / "other", tmp_path / "both")
    for folder in (tmp_path / "once", tmp_path / "both"):
        with pytest.raises(UserError, match=f"--model: {folder} has the adapter .* merged into it already"):
            merge_adapter(HFCheckpoint.open(folder), tmp_path / "adapter", tmp_path / "twice")
        with pytest.raises(UserError, match="merged into it already"):
            merged_weight(HFCheckpoint.open(folder), tmp_path / "adapter", None)
    assert not (tmp_path / "twice").exists()


def test_each_tensor_keeps_its_own_dtype(tmp_path):
    """One norm in float32 does not widen a bfloat16 model."""
    base = HFCheckpoint.open(make_model(tmp_path / "model", dtype="bfloat16", **TINY))
    tensors = {name: np.array(base.raw(name)) for name in [spec.name for spec in base.config.weights]}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    save_safetensors(tmp_path / "model/model.safetensors", tensors)
    base = HFCheckpoint.open(tmp_path / "model")
    make_adapter(tmp_path / "adapter", base)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    merged = HFCheckpoint.open(tmp_path / "merged")
    assert {n: merged.info(n).dtype for n in tensors} == {n: base.info(n).dtype for n in tensors}
    assert json.loads((tmp_path / "merged/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_quantised_weights_are_dequantised(tmp_path):
    folder = make_model(tmp_path / "model", **TINY)
    dense = HFCheckpoint.open(folder)
    tensors: dict[str, np.ndarray] = {}
    for name in [spec.name for spec in dense.config.weights]:
        stored = (
            nf4_tensors(name, dense.f32(name), True) if name in projections(dense.config) else {name: dense.raw(name)}
        )
        tensors |= {key: np.array(values) for key, values in stored.items()}
    save_safetensors(folder / "model.safetensors", tensors)
    base = HFCheckpoint.open(folder)
    updates = make_adapter(tmp_path / "adapter", base)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    merged = HFCheckpoint.open(tmp_path / "merged")
    for name in projections(base.config):
        assert not merged.is_nf4(name)
        np.testing.assert_allclose(merged.f32(name), base.f32(name) + updates.get(name, 0), rtol=2e-7, atol=1e-5)


def test_nothing_is_overwritten(tmp_path):
    base = HFCheckpoint.open(make_model(tmp_path / "model", **TINY))
    make_adapter(tmp_path / "adapter", base)
    before = (tmp_path / "model/model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"--output: .*model already holds a model"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("flag", ["--adapter", "--output"])
def test_no_folder_is_not_the_current_one(tmp_path, monkeypatch, capsys, flag):
    base = make_model(tmp_path / "model", **TINY)
    make_adapter(tmp_path / "here", HFCheckpoint.open(base))
    monkeypatch.chdir(tmp_path / "here")
    before = sorted(tmp_path.rglob("*"))
    folders = {"--model": str(base), "--adapter": ".", "--output": str(tmp_path / "merged")} | {flag: ""}
    assert cli.run(["merge", *(word for pair in folders.items() for word in pair)]) == 2
    assert capsys.readouterr().err == f"error: {flag}: missing; name a folder\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_the_adapter_of_another_model_is_refused(tmp_path):
    base = HFCheckpoint.open(make_model(tmp_path / "model", **TINY))
    wider = HFCheckpoint.open(make_model(tmp_path / "wider", **(TINY | {"hidden_size": 48})))
    make_adapter(tmp_path / "adapter", wider)
    with pytest.raises(UserError, match="is it the adapter of another model"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# --- generation_config.json


def with_tokenizer(folder: Path, template: str | None, **files: object) -> Path:
    config = {"eos_token": "<|endoftext|>"} | ({} if template is None else {"chat_template": template})
    return model_folder(folder, config, **files)


def generation_config(folder: Path, target: Path) -> dict | None:
    copy_model_files(folder, target, "float32")
    path = target / "generation_config.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_what_closes_a_turn_is_written_beside_what_was_there(tmp_path):
    """A base model: EOS ends documents, and its chat template closes turns with another token."""
    files = {
        "config": {"eos_token_id": 257, "bos_token_id": 264},
        "generation_config": {"eos_token_id": 257, "top_p": 0.5},
    }
    folder = with_tokenizer(tmp_path / "model", chat_templates.QWEN25, **files)
    assert generation_config(folder, tmp_path / "a") == {"eos_token_id": [257, 259], "top_p": 0.5}
    (folder / "generation_config.json").unlink()
    assert generation_config(folder, tmp_path / "b") == {"bos_token_id": 264, "eos_token_id": [257, 259]}


def test_a_generation_config_that_stops_there_already_is_copied_as_it_is(tmp_path):
    files = {"config": {"eos_token_id": 257}, "generation_config": {"eos_token_id": [259, 257], "x": 1.0}}
    folder = with_tokenizer(tmp_path / "model", chat_templates.QWEN25, **files)
    generation_config(folder, tmp_path / "a")
    assert (tmp_path / "a/generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()
    plain = with_tokenizer(tmp_path / "plain", None, config={"eos_token_id": 257})
    assert generation_config(plain, tmp_path / "b") is None  # config.json says it


def test_named_templates_are_copied(tmp_path):
    folder = with_tokenizer(tmp_path / "model", None, config={}, generation_config={"eos_token_id": 257})
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "chat_template.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{"chat_template": "x"}')
    copy_model_files(folder, tmp_path / "copy", "float32")
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "chat_template.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()


def test_a_broken_tokenizer_does_not_keep_weights_from_being_written(tmp_path):
    folder = with_tokenizer(tmp_path / "model", "{% for %}", config={}, generation_config={"eos_token_id": 3})
    assert generation_config(folder, tmp_path / "copy") == {"eos_token_id": 3}
