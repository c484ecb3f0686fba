"""Models that need what this trainer lacks: each is refused by what it needs, before a weight is looked at."""

from __future__ import annotations

import json

import numpy as np
import pytest

from entrenar_gpu.adapters import AdapterSpec, save_adapter
from entrenar_gpu.adapters.selection import chosen_targets
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.model.registry import load_model_config, parse_model_config
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
