"""Adapters: which modules get one, how A starts, and the files that PEFT reads and writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from entrenar_gpu.adapters import pattern
from entrenar_gpu.adapters.peft_files import load_adapter, save_adapter
from entrenar_gpu.adapters.selection import chosen_targets
from entrenar_gpu.adapters.spec import AdapterSpec, adapter_spec, init_adapter
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.model.registry import parse_model_config

MODEL = parse_model_config(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    }
)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def spec_of(folder: Path, **changes) -> AdapterSpec:
    (folder / "adapter_config.json").write_text(json.dumps(PEFT | changes))
    return AdapterSpec.from_peft(folder, MODEL)


def short(spec: AdapterSpec) -> dict[str, tuple[int, float]]:
    """(rank, alpha) by "layer.projection"."""
    parts = {path: path.split(".") for path in spec.modules}
    return {f"{parts[path][2]}.{parts[path][4]}": (m.rank, m.alpha) for path, m in spec.modules.items()}


def test_the_defaults_are_all_projections_with_alpha_twice_the_rank():
    spec = AdapterSpec.from_config(TrainConfig(), MODEL)
    assert len(spec.modules) == 12 * 7
    assert list(spec.modules)[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    down = spec.modules["model.layers.3.mlp.down_proj"]
    assert (down.in_features, down.out_features, down.rank, down.alpha, down.scale) == (64, 32, 16, 32.0, 2.0)
    assert spec.shapes()[down.a_name] == (16, 64)
    assert spec.shapes()[down.b_name] == (32, 16)


def test_options_choose_targets_and_scale():
    spec = AdapterSpec.from_config(TrainConfig(target="q,down", rank=4, alpha=6.0, rslora=True, dropout=0.1), MODEL)
    assert {path.rpartition(".")[2] for path in spec.modules} == {"q_proj", "down_proj"}
    assert {module.scale for module in spec.modules.values()} == {3.0}
    assert {module.use_rslora for module in spec.modules.values()} == {True}
    assert spec.dropout == 0.1


@pytest.mark.parametrize(
    ("changes", "selected"),
    [
        ({}, {f"{i}.q_proj" for i in range(12)}),
        ({"target_modules": ["mlp.up_proj"]}, {f"{i}.up_proj" for i in range(12)}),
        ({"target_modules": ["_proj", "model.layers.3.mlp.up_proj"]}, {"3.up_proj"}),  # no match within a name
        ({"target_modules": "all-linear"}, {f"{i}.{name}" for i in range(12) for name in TARGETS}),
        ({"target_modules": r".*\.1\..*\.(q|up)_proj"}, {"1.q_proj", "1.up_proj"}),
        ({"target_modules": "all-linear", "exclude_modules": r".*self_attn.*|.*\.\d\d?\.mlp\.(up|gate)_proj"},
         {f"{i}.down_proj" for i in range(12)}),
        ({"target_modules": r"model\.layers\.1\.mlp\.(up|gate)_proj|q_proj"}, {"1.up_proj", "1.gate_proj"}),
        ({"layers_to_transform": 1}, {"1.q_proj"}),
        ({"layers_to_transform": [1, 11]}, {"1.q_proj", "11.q_proj"}),
        ({"layers_to_transform": []}, {f"{i}.q_proj" for i in range(12)}),
        ({"layers_to_transform": [2], "layers_pattern": "layers"}, {"2.q_proj"}),
        ({"layers_to_transform": [2], "layers_pattern": ["h", "layers"]}, {"2.q_proj"}),
        ({"layers_to_transform": [2], "target_modules": ["q_proj", "model.layers.5.mlp.up_proj"]},
         {"2.q_proj", "5.up_proj"}),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, {f"{i}.q_proj" for i in range(12)}),
    ],
)  # fmt: skip
def test_modules_are_selected_as_peft_does(tmp_path, changes, selected):
    assert set(short(spec_of(tmp_path, **changes))) == selected


def test_what_matches_no_module_is_told(tmp_path):
    spec = spec_of(
        tmp_path,
        target_modules=["q_proj", "c_attn"],
        exclude_modules=["lm_head"],
        rank_pattern={"q_proj": 2, "k_proj": 3},
        alpha_pattern={r"layers\.99\..*": 3},
    )
    path = tmp_path / "adapter_config.json"
    named = [
        ("target_modules", "c_attn"),
        ("exclude_modules", "lm_head"),
        ("rank_pattern", "k_proj"),
        ("alpha_pattern", r"layers\.99\..*"),
    ]
    assert list(spec.notes) == [f"{path}: {key} {name!r} matches no module" for key, name in named]
    assert not spec_of(tmp_path, rank_pattern={r"layers\.1\..*": 2}, exclude_modules=r".*layers\.3.*").notes


SLOW = r"(.|..)*[xyz0-9]"


@pytest.mark.parametrize(
    "changes", [{"target_modules": SLOW}, {"rank_pattern": {SLOW: 2}}, {"alpha_pattern": {SLOW: 2}}]
)
def test_a_pattern_that_backtracks_for_ever_is_told_with_its_file(tmp_path, changes):
    with pytest.raises(UserError, match="takes too long to match") as error:
        spec_of(tmp_path, **changes)
    assert str(error.value).startswith(f"{tmp_path / 'adapter_config.json'}: pattern ")


def test_all_patterns_of_a_file_share_one_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(pattern, "SECONDS_OF_FILE", 0.0)
    quick = {f"{n}{SLOW}": 2 for n in range(400)}
    with pytest.raises(UserError, match="takes too long to match"):
        spec_of(tmp_path, rank_pattern=quick)


def test_patterns_give_rank_and_alpha(tmp_path):
    spec = spec_of(
        tmp_path,
        target_modules=["q_proj", "up_proj"],
        layers_to_transform=[0, 1, 11],
        rank_pattern={r"layers\.1\..*": 2, "proj": 64, "up_proj": 9, r".*": 7, "q_proj": 5},
        alpha_pattern={"model.layers.1.mlp.up_proj": 3, "q_proj": 1},
    )
    assert short(spec) == {
        "0.q_proj": (7, 1), "0.up_proj": (9, 8),
        "1.q_proj": (2, 1), "1.up_proj": (2, 3),
        "11.q_proj": (7, 1), "11.up_proj": (9, 8),
    }  # fmt: skip


@pytest.mark.parametrize("rslora", [False, True])
def test_scale_follows_each_modules_rank(tmp_path, rslora):
    spec = spec_of(tmp_path, use_rslora=rslora, rank_pattern={r"layers\.0\..*": 16})
    scales = [spec.modules[f"model.layers.{i}.self_attn.q_proj"].scale for i in range(2)]
    assert scales == ([8 / 4, 8 / 2] if rslora else [8 / 16, 8 / 4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora true is not supported"),
        ({"modules_to_save": ["score"]}, "modules_to_save"),
        ({"bias": "all"}, 'bias "all"'),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"trainable_token_indices": {"score": [1]}}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"use_something_new": 1}, "use_something_new 1 is not supported"),
        ({"init_ia3_weights": True, "peft_type": "IA3"}, 'peft_type "IA3" is not supported'),
        ({"peft_type": None}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, 'task_type "SEQ_CLS"'),
        ({"r": 0}, "r must be a whole number above 0, not 0"),
        ({"r": True}, "r must be"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number"),
        ({"lora_dropout": 1.0}, "lora_dropout must be"),
        ({"lora_dropout": []}, "lora_dropout must be a number"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": [3]}, "target_modules must be"),
        ({"target_modules": "("}, "target_modules '\\(' is not a regular expression"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern '\\(' is not a regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must be"),
        ({"alpha_pattern": [1]}, "alpha_pattern must be an object"),
        ({"layers_to_transform": "all"}, "layers_to_transform must be"),
        ({"layers_to_transform": 1, "target_modules": "all-linear"}, "layers_to_transform needs"),
        ({"target_modules": ["c_attn"]}, "matches no projection"),
        ({"target_modules": ["q_proj", "norm"]}, "includes 'model.norm'"),
        ({"target_modules": ".*"}, "includes 'model.layers.0.input_layernorm'"),
        ({"target_modules": ["post_attention_layernorm"]}, "includes 'model.layers.0.post_attention_layernorm'"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"adapter_config.json: .*{message}"):
        spec_of(tmp_path, **changes)


def test_the_kind_of_adapter_must_be_told(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({k: v for k, v in PEFT.items() if k != "peft_type"}))
    with pytest.raises(UserError, match=r"adapter_config.json: peft_type is missing"):
        AdapterSpec.from_peft(tmp_path, MODEL)


def test_what_does_not_change_the_result_is_accepted(tmp_path):
    """Every key that PEFT 0.21 writes, at its default, and starts that only say where A and B came from."""
    defaults = {
        "alora_invocation_tokens": None, "arrow_config": None, "auto_mapping": None, "base_model_name_or_path": "x/y",
        "bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
        "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": "gaussian",
        "kasa_config": None, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
        "loftq_config": {}, "lora_bias": False, "lora_dropout": 0.05, "lora_ga_config": None, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
        "peft_version": "0.21.2", "qalora_group_size": 16, "rank_pattern": {}, "alpha_pattern": {}, "revision": None,
        "target_parameters": None, "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
        "use_qalora": False, "use_rslora": False, "velora_config": None,
    }  # fmt: skip
    assert spec_of(tmp_path, **defaults).dropout == 0.05


def test_kaiming_start_is_uniform_within_its_bound():
    spec = AdapterSpec.from_config(TrainConfig(), MODEL)
    tensors = init_adapter(spec, seed=1)
    assert list(tensors) == list(spec.shapes())
    scaled = [tensors[m.a_name] * math.sqrt(m.in_features) for m in spec.modules.values()]
    values = np.concatenate([array.reshape(-1) for array in scaled])
    assert np.abs(values).max() <= 1 + 1e-6
    # 60,000 samples: four standard errors of the mean, and of the variance 1/3
    assert abs(values.mean()) < 4 * math.sqrt(1 / 3 / values.size)
    assert abs(values.var() - 1 / 3) < 4 * math.sqrt(4 / 45 / values.size)
    assert not any(tensors[module.b_name].any() for module in spec.modules.values())


def test_gaussian_start_has_deviation_one_over_rank():
    spec = AdapterSpec.from_config(TrainConfig(rank=8), MODEL)
    tensors = init_adapter(spec, seed=1, kind="gaussian")
    values = np.concatenate([tensors[module.a_name].reshape(-1) for module in spec.modules.values()]) * 8
    assert abs(values.mean()) < 4 / math.sqrt(values.size)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / values.size)
    assert np.abs(values).max() > 3
    assert not any(tensors[module.b_name].any() for module in spec.modules.values())


def test_start_depends_on_seed_and_module_only():
    every = init_adapter(AdapterSpec.from_config(TrainConfig(rank=4), MODEL), seed=5)
    some = init_adapter(AdapterSpec.from_config(TrainConfig(rank=4, target="up"), MODEL), seed=5)
    other = init_adapter(AdapterSpec.from_config(TrainConfig(rank=4, target="up"), MODEL), seed=6)
    for name, values in some.items():
        np.testing.assert_array_equal(values, every[name])
        assert name.endswith("lora_B.weight") or (values != other[name]).any()
    drawn = [values.tobytes() for name, values in every.items() if name.endswith("lora_A.weight")]
    assert len(set(drawn)) == len(drawn)


def random_adapter(spec: AdapterSpec) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in spec.shapes().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"layers_to_transform": [1, 2], "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
        {"rank_pattern": {r"layers\.1\..*": 2}, "alpha_pattern": {r"layers\.3\..*": 1.5}, "lora_dropout": 0.25},
    ],
)
def test_saved_adapters_load_as_they_were(tmp_path, changes):
    spec = spec_of(tmp_path, **changes)
    tensors = random_adapter(spec)
    save_adapter(tmp_path / "out", spec, tensors, "base/model")
    loaded, read = load_adapter(tmp_path / "out", MODEL)
    assert loaded == spec
    assert list(read) == list(tensors)
    for name, values in tensors.items():
        np.testing.assert_array_equal(read[name], values)


def test_files_have_pefts_names(tmp_path):
    spec = spec_of(tmp_path, layers_to_transform=[1], lora_alpha=8.0)
    save_adapter(tmp_path, spec, random_adapter(spec), "base/model")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    assert {n: (v.shape, v.dtype) for n, v in tensors.items()} == {
        f"{prefix}.lora_A.weight": ((4, 32), np.float32),
        f"{prefix}.lora_B.weight": ((64, 4), np.float32),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "base/model")
    assert isinstance(config["lora_alpha"], int)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_are_read(tmp_path, dtype):
    spec = spec_of(tmp_path)
    tensors = {name: values.astype(dtype) for name, values in random_adapter(spec).items()}
    save_file({f"base_model.model.{n}": v for n, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    for name, values in load_adapter(tmp_path, MODEL)[1].items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, tensors[name].astype(np.float32))


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({A: None}, "q_proj.lora_A.weight' is missing"),
        ({A: np.ones((4, 33), np.float32)}, r"lora_A.weight' has shape \[4, 33\], this model needs \[4, 32\]; is it"),
        ({A: np.ones((4, 32), np.int32)}, "lora_A.weight' has dtype I32"),
        ({"base_model.model.lm_head.weight": np.ones(3, np.float32)}, "'base_model.model.lm_head.weight' has no place"),
    ],
)
def test_adapters_of_other_models_are_refused(tmp_path, replaced, message):
    tensors = {f"base_model.model.{n}": v for n, v in random_adapter(spec_of(tmp_path)).items()} | replaced
    kept = {name: values for name, values in tensors.items() if values is not None}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"adapter_model.safetensors: tensor '.*{message.removeprefix(chr(39))}"):
        load_adapter(tmp_path, MODEL)


def test_folders_that_hold_no_adapter(tmp_path):
    with pytest.raises(UserError, match=r"adapter_config.json: not found"):
        load_adapter(tmp_path, MODEL)
    spec_of(tmp_path)
    with pytest.raises(UserError, match=r"adapter_model.safetensors: not found"):
        load_adapter(tmp_path, MODEL)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        load_adapter(tmp_path, MODEL)


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        ("q", ["q_proj"]),
        ("up_proj, k", ["k_proj", "up_proj"]),
        ("down,q", ["q_proj", "down_proj"]),
        ("all", list(TARGETS)),
        (" all-linear ", list(TARGETS)),
        (TrainConfig().target, list(TARGETS)),
    ],
)
def test_targets_are_the_models_own(target, chosen):
    assert chosen_targets(target, MODEL) == chosen


@pytest.mark.parametrize(("target", "told"), [("foo", "foo_proj"), ("q,x,head", "head_proj, x_proj"), (" ,", "empty")])
def test_targets_that_the_model_lacks_are_named(target, told):
    for method in ("qlora", "full"):
        with pytest.raises(
            UserError, match=rf"^--target: {told}; choose from q_proj, k_proj, .*, down_proj, embed_tokens, lm_head$"
        ):
            adapter_spec(TrainConfig(target=target, method=method), MODEL)
