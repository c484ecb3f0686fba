"""Models that need what this trainer lacks: each is refused by what it needs, before a weight is looked at."""

from __future__ import annotations

import json

import numpy as np
import pytest

from entrenar_gpu.adapters import AdapterSpec, save_adapter
from entrenar_gpu.adapters.selection import chosen_targets
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.model.parameters import Storage
from entrenar_gpu.model.registry import load_model_config, parse_model_config
from entrenar_gpu.session.graphs import RunShape
from tests.helpers.tiny import QWEN3

SEES = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
# Keys of published config.json files, and what is said of them.
REFUSED = {
    "Qwen3-30B-A3B": ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128}, "mixture of experts"),
    "Mixtral": ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 8}, "mixture of experts"),
    "an MoE by its defaults": ({"architectures": ["Olmoe"], "model_type": "qwen2_moe"}, "mixture of experts"),
    "Granite 4 with experts": (
        {
            **{"architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid"},
            **{"num_local_experts": 64, "layer_types": ["attention"] * 2},
        },
        "mixture of experts",
    ),
    "Granite 4 hybrid": (
        {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": ["mamba", "attention"]},
        "state-space",
    ),
    "Granite 4 hybrid by its defaults": (
        {"architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid", "num_local_experts": 0},
        "state-space",
    ),
    "Qwen3.5": ({"architectures": ["Qwen3_5ForCausalLM"], "layer_types": ["linear_attention"] * 2}, "linear attention"),
    "Qwen3.5 that sees": (
        {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": {"model_type": "qwen3_5_text"}},
        "linear attention",
    ),
    "LFM2": ({"architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2"}, "convolution"),
    "Mamba": ({"architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba"}, "state-space"),
    "Falcon-H1, which lists no layers": (
        {"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "mamba_d_ssm": 1024},
        "state-space",
    ),
    "Nemotron-H": ({"architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": "M-M*-"}, "state-space"),
    "DeepSeek V3": ({"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512, "n_routed_experts": 8}, "MLA"),
    "gpt-oss": (
        {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}},
        "MXFP4",
    ),
    "Ministral 3 Instruct": (
        {
            **{"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "ministral3"}},
            "quantization_config": {"quant_method": "fp8"},
        },
        "FP8",
    ),
    "T5": ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder"),
    "Qwen2-VL": ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "mrope"),
}


@pytest.mark.parametrize(("changes", "needed"), REFUSED.values(), ids=REFUSED)
def test_what_a_model_needs_is_named_in_one_line(tmp_path, changes, needed):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3 | changes))
    with pytest.raises(UserError) as error:
        load_model_config(tmp_path)
    assert needed in str(error.value)
    name = (QWEN3 | changes)["architectures"][0]
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {name} needs ")
    assert str(error.value).endswith("which this trainer lacks")
    assert "\n" not in str(error.value)


STORED = {
    "awq": ({"quant_method": "awq", "bits": 4}, "awq is not supported; bitsandbytes NF4 is"),
    "compressed": ({"quant_method": "compressed-tensors"}, "compressed-tensors is not"),
    "8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits is not"),
    "FP4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "bitsandbytes 'fp4' is not",
    ),
    "a word": ("int4", "must be an object, not 'int4'"),
}


@pytest.mark.parametrize(("stored", "message"), STORED.values(), ids=STORED)
def test_weights_that_are_not_read_are_refused_by_the_configuration_alone(stored, message):
    """So that `plan` says it too, and nothing is downloaded for it."""
    with pytest.raises(UserError, match=f"^config.json: quantization_config:? {message}"):
        parse_model_config(QWEN3 | {"quantization_config": stored})


def test_a_language_part_without_the_name_of_its_model_is_not_read_by_its_type():
    """The class of Gemma 3's language part has a default for every size."""
    with pytest.raises(UserError, match="text_config is not supported without architectures"):
        parse_model_config({"model_type": "gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 34}})


def test_a_model_that_sees_is_its_language_part():
    """What a text_config leaves out is as the family's class has it; names begin as transformers' do."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    config = parse_model_config(SEES | {"text_config": text, "vision_config": {"model_type": "siglip_vision_model"}})
    assert config.tie_word_embeddings
    assert config.parameters == 3_880_263_168  # Gemma 3 4B without its vision tower
    assert config.weights[1].name == "model.language_model.layers.0.input_layernorm.weight"
    windows = [layer.attention.window for layer in config.layers[:6]]
    assert windows == [4096] * 5 + [None]
    assert [rope.theta for rope in config.rope_tables.values()] == [1e4, 1e6]


@pytest.mark.parametrize("kind", ["ntk-by-parts", 7, None])
def test_unknown_ropes_are_refused_by_name(kind):
    raw = QWEN3 | {"rope_scaling": {"rope_type": kind, "factor": 2.0}}
    if kind is None:
        assert parse_model_config(raw).rope_tables["rope_table"].scaling is None
        return
    with pytest.raises(UserError, match=rf"rope scaling {kind!r} is not supported; supported: default, linear"):
        parse_model_config(raw)


BOUNDS = {
    "LongRoPE from one position": (
        {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 1, "factor": 2.0}},
        "original_max_position_embeddings of longrope",
    ),
    "a factor for another number of pairs": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "factor": 2.0}},
        "rope_scaling.short_factor must be a list of 12 numbers",
    ),
    "YaRN of a theta of one": ({"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_theta"),
    "a part of heads that no Llama rotates": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "partial_rotary_factor": 0.5},
        "partial_rotary_factor 0.5: models of this family rotate whole heads",
    ),
    "a head cut to no pairs": ({"partial_rotary_factor": 0.05}, "partial_rotary_factor 0.05 of heads of 24"),
    "heads that attention does not compute": ({"head_dim": 258}, "head_dim 258 is above 256"),
    "a cap that ends all": (
        {"architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": 1e-30},
        "final_logit_softcapping 1e-30 is below 0.001",
    ),
    "layers of another kind": ({"architectures": ["Olmo3ForCausalLM"], "layer_types": ["full_attention"]}, "list of 2"),
}


@pytest.mark.parametrize(("changes", "message"), BOUNDS.values(), ids=BOUNDS)
def test_what_cannot_be_computed_is_refused_by_its_key(changes, message):
    with pytest.raises(UserError, match=message):
        parse_model_config(QWEN3 | changes)


REACHED = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, 2048),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 1024),
    "YaRN, as Qwen's pages say to add it": (
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        2048,
    ),
    "YaRN that the file counts already": (
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        512,
    ),
    "Llama 3.1": (
        {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        512,
    ),
}


@pytest.mark.parametrize(("scaling", "positions"), REACHED.values(), ids=REACHED)
def test_rows_may_be_as_long_as_the_scaling_reaches(scaling, positions):
    model = parse_model_config(QWEN3 | {"rope_scaling": scaling})
    storage = Storage("lora")
    RunShape(model, storage, TrainConfig(seq=positions))
    with pytest.raises(UserError, match=f"--seq: {positions + 1} exceeds the model's {positions} positions"):
        RunShape(model, storage, TrainConfig(seq=positions + 1))


def test_vision_towers_are_not_trained():
    config = parse_model_config(SEES | {"text_config": {"model_type": "gemma3_text", "num_hidden_layers": 1}})
    with pytest.raises(UserError, match="--target: vision_tower_proj: of a model that also sees"):
        chosen_targets("vision_tower", config)


def test_an_adapter_of_a_language_part_names_no_module_of_the_tower(tmp_path):
    """Its tower has projections of the same names, which PEFT would adapt too."""
    config = parse_model_config(SEES | {"text_config": {"model_type": "gemma3_text", "num_hidden_layers": 1}})
    spec = AdapterSpec.from_config(TrainConfig(target="q,v", rank=1), config)
    save_adapter(tmp_path, spec, {name: np.zeros(shape, np.float32) for name, shape in spec.shapes().items()}, "base")
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == [f"model.language_model.layers.0.self_attn.{name}_proj" for name in "qv"]
