"""GGUF files, read back by gguf's own reader: the weights that were meant, the adapter beside them, the tokenizer."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from entrenar_gpu.adapters import load_adapter, save_adapter
from entrenar_gpu.errors import UserError
from entrenar_gpu.export import export_model
from entrenar_gpu.export.merge import merged_weight
from entrenar_gpu.model.gguf_families import FAMILIES, as_pairs, from_pairs
from entrenar_gpu.model.hf_checkpoint import HFCheckpoint
from tests.data.test_chat import model_folder
from tests.helpers import chat_templates
from tests.helpers.tiny import make_model

gguf = pytest.importorskip("gguf")

TINY = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 320, "num_hidden_layers": 2}
# What each family's config.json needs beside the sizes.
CONFIGS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False},
    "llama3": {
        "architectures": ["LlamaForCausalLM"],
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    },
    "llama-yarn": {
        "architectures": ["LlamaForCausalLM"],
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                         "attention_factor": 1.5},
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "gemma3": {"architectures": ["Gemma3ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh",
               "query_pre_attn_scalar": 16, "sliding_window": 8, "rope_local_base_freq": 10000.0},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh",
               "query_pre_attn_scalar": 16, "sliding_window": 8, "attn_logit_softcapping": 5.0},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    "phi3-long": {
        "architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 32,
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(8)],
                         "long_factor": [2.0 + i for i in range(8)]},
    },
    "granite": {"architectures": ["GraniteForCausalLM"], "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
                "attention_multiplier": 0.015625, "logits_scaling": 8.0},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
    "glm4": {"architectures": ["Glm4ForCausalLM"], "partial_rotary_factor": 0.5, "attention_bias": True},
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "arcee": {"architectures": ["ArceeForCausalLM"], "hidden_act": "relu2"},
    "llama-biases": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
}  # fmt: skip


MODEL_TYPES = {
    "llama3": "llama",
    "gemma3": "gemma3_text",
    "phi3-long": "phi3",
    "llama-biases": "llama",
    "llama-yarn": "llama",
}


def make(tmp_path: Path, name: str, **changes) -> HFCheckpoint:
    """A tiny model of a family, with a tokenizer."""
    folder = make_model(
        tmp_path / "model", **(TINY | {"model_type": MODEL_TYPES.get(name, name)} | CONFIGS[name] | changes)
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": chat_templates.QWEN25}
    model_folder(folder, config, bos=True)
    return HFCheckpoint.open(folder)


def make_adapter(tmp_path: Path, checkpoint: HFCheckpoint, **options) -> Path:
    from entrenar_gpu.adapters import AdapterSpec
    from entrenar_gpu.config import TrainConfig

    spec = AdapterSpec.from_config(TrainConfig(rank=4, **options), checkpoint.config)
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype(np.float32) * 0.1 for name, shape in spec.shapes().items()}
    save_adapter(tmp_path / "adapter", spec, values, "m")
    return tmp_path / "adapter"


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file in float32, as [out, in]."""
    reader = gguf.GGUFReader(path)
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_adapter_on_the_base_is_the_merged_model(tmp_path, name):
    """W + scale B A on the file's own tensors; and what is not rotated by pairs is the checkpoint's own."""
    checkpoint = make(tmp_path, name)
    adapter = make_adapter(tmp_path, checkpoint)
    model = str(tmp_path / "model")
    export_model(model, tmp_path / "base.gguf", dtype="F32")
    export_model(model, tmp_path / "merged.gguf", dtype="F32", adapter=adapter)
    export_model(model, tmp_path / "lora.gguf", adapter=adapter, adapter_only=True)
    base, merged, lora = (tensors(tmp_path / f"{file}.gguf") for file in ("base", "merged", "lora"))
    assert base.keys() == merged.keys()
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    adapted = {name.rpartition(".")[0] for name in lora}
    assert len(adapted) == len(load_adapter(adapter, checkpoint.config)[0].modules)
    for tensor, values in base.items():
        if tensor in adapted:
            a, b = lora[f"{tensor}.lora_a"], lora[f"{tensor}.lora_b"]
            values = values + alpha / len(a) * (b @ a)
        np.testing.assert_allclose(merged[tensor], values, rtol=1e-5, atol=1e-6)
    value = merged_weight(checkpoint, adapter, None)
    for spec in checkpoint.config.weights:
        if spec.name.endswith("layers.1.self_attn.v_proj.weight"):
            np.testing.assert_array_equal(merged["blk.1.attn_v.weight"], value(spec))


def test_queries_and_keys_of_llama_turn_by_pairs(tmp_path):
    checkpoint = make(tmp_path, "llama")
    export_model(str(tmp_path / "model"), tmp_path / "base.gguf", dtype="F32")
    found = tensors(tmp_path / "base.gguf")["blk.0.attn_k.weight"]
    stored = checkpoint.f32("model.layers.0.self_attn.k_proj.weight")
    np.testing.assert_array_equal(from_pairs(found, 2), stored)
    np.testing.assert_array_equal(found, as_pairs(stored, 2))
    np.testing.assert_array_equal(found[16 + 1], stored[16 + 8])  # head 1: row 1 of the pair (0, 8)


def test_scaled_frequencies_are_a_tensor(tmp_path):
    checkpoint = make(tmp_path, "llama3")
    export_model(str(tmp_path / "model"), tmp_path / "base.gguf")
    rope = checkpoint.config.layers[0].attention.rope
    factors = tensors(tmp_path / "base.gguf")["rope_freqs.weight"]
    np.testing.assert_allclose(np.array(rope.base()) / factors, rope.frequencies(512), rtol=1e-6)


def test_gemmas_norms_multiply_by_what_is_written(tmp_path):
    checkpoint = make(tmp_path, "gemma3")
    export_model(str(tmp_path / "model"), tmp_path / "base.gguf")
    stored = checkpoint.f32("model.layers.0.input_layernorm.weight")
    np.testing.assert_allclose(tensors(tmp_path / "base.gguf")["blk.0.attn_norm.weight"], stored + 1, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "steps"), [("F16", 2**11), ("BF16", 2**8), ("Q8_0", 127), ("Q5_1", 31), ("Q4_0", 8)])
def test_types_round_as_they_say(tmp_path, dtype, steps):
    checkpoint = make(tmp_path, "qwen3")
    export_model(str(tmp_path / "model"), tmp_path / "model.gguf", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == dtype
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == ("Q8_0" if dtype.startswith("Q") else dtype)
    stored = checkpoint.f32("model.layers.0.mlp.up_proj.weight")
    blocks = stored.reshape(-1, 32)
    within = (np.abs(blocks).max(axis=1, keepdims=True) / steps * 1.01).repeat(32, axis=1).reshape(stored.shape)
    assert (np.abs(tensors(tmp_path / "model.gguf")["blk.0.ffn_up.weight"] - stored) <= within).all()


def test_tokenizer_template_and_sizes_are_in_the_file(tmp_path):
    make(tmp_path, "llama")
    export_model(str(tmp_path / "model"), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields

    def value(key):
        return fields[key].contents()

    tokens, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    saved = json.loads((tmp_path / "model/tokenizer.json").read_text())
    assert len(tokens) == len(kinds) == 320
    assert all(tokens[i] == piece for piece, i in saved["model"]["vocab"].items())
    assert (tokens[-1], kinds[-1]) == ("[PAD319]", 5)
    assert kinds[tokens.index("<s>")] == 3
    assert value("tokenizer.ggml.model") == "gpt2"
    assert value("tokenizer.ggml.pre") == "gpt-2"
    assert value("tokenizer.ggml.merges") == ["a b"]
    assert tokens[value("tokenizer.ggml.bos_token_id")] == "<s>"
    assert tokens[value("tokenizer.ggml.eos_token_id")] == "</s>"
    assert tokens[value("tokenizer.ggml.eot_token_id")] == "<|im_end|>"
    assert value("tokenizer.chat_template") == chat_templates.QWEN25
    assert value("llama.attention.head_count_kv") == 2
    assert value("llama.rope.dimension_count") == 16


def test_yarn_is_said_as_llama_cpp_reads_it(tmp_path):
    checkpoint = make(tmp_path, "llama-yarn")
    export_model(str(tmp_path / "model"), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    said = {key.removeprefix("llama.rope.scaling."): field.contents() for key, field in fields.items()}
    assert said["type"] == "yarn"
    assert (said["factor"], said["original_context_length"]) == (4.0, 64)
    assert said["attn_factor"] * (1 + 0.1 * math.log(4)) == pytest.approx(1.5, rel=1e-6)
    assert checkpoint.config.layers[0].attention.rope.scaling.attention_factor == 1.5


@pytest.mark.parametrize("changes", [{"truncate": False}, {"beta_fast": 8.0}, {"beta_slow": 2.0}])
def test_yarn_with_other_bounds_is_refused(tmp_path, changes):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    make(tmp_path, "llama", rope_scaling=scaling | changes)
    with pytest.raises(UserError, match=r"llama\.cpp has beta_fast 32, beta_slow 1 and truncate for yarn"):
        export_model(str(tmp_path / "model"), tmp_path / "model.gguf")


def test_modules_of_different_scale_share_one_alpha(tmp_path):
    checkpoint = make(tmp_path, "qwen3")
    adapter = make_adapter(tmp_path, checkpoint)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"q_proj": 40}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    export_model(str(tmp_path / "model"), tmp_path / "lora.gguf", adapter=adapter, adapter_only=True)
    found = tensors(tmp_path / "lora.gguf")
    _, values = load_adapter(adapter, checkpoint.config)
    alpha = float(gguf.GGUFReader(tmp_path / "lora.gguf").fields["adapter.lora.alpha"].parts[-1][0])
    for name, short, scale in (("q_proj", "q", 40 / 4), ("v_proj", "v", 8 / 4)):
        b = values[f"model.layers.0.self_attn.{name}.lora_B.weight"]
        np.testing.assert_allclose(alpha / 4 * found[f"blk.0.attn_{short}.weight.lora_b"], scale * b, rtol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_comes_back_from_mlx_as_it_went(tmp_path, rslora):
    checkpoint = make(tmp_path, "qwen3")
    adapter = make_adapter(tmp_path, checkpoint, rslora=rslora, target=["q", "down"])
    export_model(str(tmp_path / "model"), tmp_path / "mlx", to="mlx", adapter=adapter)
    written = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    assert written["lora_parameters"]["keys"] == ["mlp.down_proj", "self_attn.q_proj"]
    export_model(str(tmp_path / "model"), tmp_path / "peft", to="peft", adapter=tmp_path / "mlx")
    for spec in checkpoint.config.weights:
        ours, theirs = (merged_weight(checkpoint, tmp_path / f, None)(spec) for f in ("adapter", "peft"))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


REFUSED = {
    "a K-quant": ({"dtype": "Q4_K_M"}, r"--type: 'Q4_K_M' is not one of .*llama-quantize"),
    "an unknown type": ({"dtype": "int8"}, r"--type: 'int8' is not one of F32, F16"),
    "an unknown layout": ({"to": "onnx"}, "--to: 'onnx' is not one of gguf, peft, mlx"),
    "no adapter": ({"adapter_only": True}, "--adapter: missing"),
    "no file": ({"output": ""}, "--output: missing"),
    "a file that is there": ({"output": "model/config.json"}, "--output: .*config.json is there already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused_and_nothing_is(tmp_path, case):
    make(tmp_path, "qwen3")
    options, message = REFUSED[case]
    output = options.pop("output", "model.gguf")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        export_model(str(tmp_path / "model"), str(tmp_path / output) if output else "", **options)
    assert sorted(tmp_path.rglob("*")) == before


OTHERWISE = {
    "gemma2": (
        {"num_hidden_layers": 3, "layer_types": None, "query_pre_attn_scalar": 9},
        "attention is scaled otherwise",
    ),
    "gemma3": (
        {"rope_local_base_freq": 1e6},
        "layer 0 of gemma3: llama.cpp rotates layers with a window by rope_theta",
    ),
    "smollm3": ({"no_rope_layers": [1, 0, 1, 0]}, "layer 1 of smollm3: llama.cpp leaves each 4th layer and no other"),
    "phi3": ({"sliding_window": 8}, "layer 0 of phi3: its window of attention is nothing that GGUF can say"),
    "gemma3-order": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer 0 of gemma3: llama.cpp has windows in all layers but each 6th",
    ),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_llama_cpp_takes_otherwise_for_granted_is_refused(tmp_path, case):
    changes, message = OTHERWISE[case]
    make(tmp_path, case.partition("-")[0], **changes)
    with pytest.raises(UserError, match=message):
        export_model(str(tmp_path / "model"), tmp_path / "model.gguf")


def test_a_window_beyond_all_positions_is_none(tmp_path):
    make(tmp_path, "phi3", sliding_window=262144)
    export_model(str(tmp_path / "model"), tmp_path / "model.gguf", dtype="q8_0")
    assert "phi3.attention.sliding_window" not in gguf.GGUFReader(tmp_path / "model.gguf").fields


def test_every_family_in_the_table_is_one_that_gguf_names():
    names = set(gguf.MODEL_ARCH_NAMES.values())
    assert {family.architecture for family in FAMILIES.values()} <= names
