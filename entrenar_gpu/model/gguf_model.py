"""A GGUF file as a base model: unpacked once into a folder in Hugging Face layout, which everything else reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from entrenar_gpu.errors import UserError
from entrenar_gpu.files import FolderLock, TensorSource, cache_folder, new_file, new_folder, write_tensors, write_text
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.gguf_families import FAMILIES, SCALED_BY_HIDDEN, from_pairs, heads_of
from entrenar_gpu.model.gguf_tokenizer import tokenizer_of
from entrenar_gpu.model.registry import parse_model_config
from entrenar_gpu.model.rope import yarn_temperature
from entrenar_gpu.model.weight_spec import WeightSpec

# What an architecture of llama.cpp is in a config.json, and what its file does not say.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_local_base_freq": 10000.0,
    },
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh"},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "hidden_act": "silu"},
    "granite": {"architectures": ["GraniteForCausalLM"], "hidden_act": "silu"},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "hidden_act": "silu"},
    "glm4": {"architectures": ["Glm4ForCausalLM"], "hidden_act": "silu"},
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "hidden_act": "silu"},
    "arcee": {"architectures": ["ArceeForCausalLM"], "hidden_act": "relu2"},
}
# Keys that some architectures have beside those sizes, and what the file may have them as.
_MORE = {
    "gemma2": {
        "sliding_window": "attention.sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "gemma3": {"sliding_window": "attention.sliding_window"},
    "granite": {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    },
}
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_STORED = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # others are dequantised to F32


def gguf_folder(path: Path) -> Path:
    """The folder that a GGUF file is unpacked into, made where it is not there yet: weights in the dtype that they are
    stored in, quantised ones in F32. Raises UserError naming the file where it holds what is not read."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path}: GGUF files need the extra: pip install 'entrenar-gpu[gguf]'") from None
    stat = path.stat()
    key = xxhash.xxh3_64_hexdigest(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    folder = cache_folder() / "gguf" / f"{path.stem}-{key}"
    new_folder(folder)
    with FolderLock(folder):
        if (folder / "config.json").is_file():
            return folder
        try:
            reader = gguf.GGUFReader(path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # of a file that is none, the package raises whatever its parsing comes upon
            raise UserError(f"{path}: not a GGUF file that can be read: {' '.join(str(error).split())[:200]}") from None
        _unpack(reader, fields, path, folder)
    return folder


def _unpack(reader: Any, fields: Mapping[str, Any], path: Path, folder: Path) -> None:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    raw = _config(fields, tensors, str(path))
    model = parse_model_config(raw, str(path))
    family = FAMILIES[model.architecture]
    tokenizer, named = tokenizer_of(fields, str(path))
    names = _names(family.architecture, model)
    sources = [_source(spec, tensors, names, model, family.pairs, path) for spec in model.weights]
    with new_file(folder / "model.safetensors") as stream:
        write_tensors(stream, sources, {"format": "pt"})
    write_text(folder / "tokenizer.json", tokenizer.to_str())
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    if isinstance(template := fields.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    ends = [fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    stops = list(dict.fromkeys(i for i in ends if isinstance(i, int)))
    write_text(folder / "generation_config.json", json.dumps({"eos_token_id": stops}) + "\n")
    write_text(folder / "config.json", json.dumps(raw, indent=2) + "\n")  # last: what has one is whole


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Any], source: str) -> dict[str, Any]:
    """config.json of a file's metadata."""
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UserError(f"{source}: {str(arch)[:40]!r} is not read as GGUF; read are {', '.join(ARCHITECTURES)}")

    def value(key: str, otherwise: Any = None) -> Any:
        found = fields.get(f"{arch}.{key}", otherwise)
        return _meant(found) if isinstance(found, float) else found

    raw = {**ARCHITECTURES[arch], **{name: value(key) for name, key in _SIZES.items()}}
    missing = next((key for name, key in _SIZES.items() if raw[name] is None), None)
    if missing is not None or "token_embd.weight" not in tensors:
        raise UserError(
            f"{source}: {arch}.{missing} is missing" if missing else f"{source}: token_embd.weight is missing"
        )
    raw["head_dim"] = value("attention.key_length", raw["hidden_size"] // max(int(raw["num_attention_heads"]), 1))
    raw["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    raw["tie_word_embeddings"] = "output.weight" not in tensors
    raw["rope_theta"] = value("rope.freq_base", 1e6 if arch == "gemma3" else 10000.0)
    raw["attention_bias"] = "blk.0.attn_q.bias" in tensors and arch != "qwen2"  # which has some without saying so
    raw["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    raw |= {name: value(key) for name, key in _MORE.get(arch, {}).items() if value(key) is not None}
    if arch in ("gemma2", "gemma3"):
        by_hidden = raw["num_hidden_layers"] == SCALED_BY_HIDDEN[arch]
        heads = raw["num_attention_heads"]
        raw["query_pre_attn_scalar"] = raw["hidden_size"] // heads if by_hidden else raw["head_dim"]
    if arch in ("phi3", "glm4"):
        raw["partial_rotary_factor"] = value("rope.dimension_count", raw["head_dim"]) / raw["head_dim"]
    if value("rope.scaling.type") == "linear":
        raw["rope_scaling"] = {"rope_type": "linear", "factor": value("rope.scaling.factor")}
    elif value("rope.scaling.type") == "longrope" or "rope_factors_long.weight" in tensors:
        said = (value(f"rope.scaling.{name}") for name in ("original_context_length", "attn_factor"))
        raw |= _longrope(tensors, raw["max_position_embeddings"], *said)
    elif value("rope.scaling.type") == "yarn":
        raw["rope_scaling"] = _yarn(value, source)
    elif value("rope.scaling.type") not in (None, "none"):
        kind = value("rope.scaling.type")
        raise UserError(f"{source}: rope scaling {kind!r} is not read; linear, longrope, yarn and Llama 3.1's are")
    if "rope_freqs.weight" in tensors:
        factors = np.array(tensors["rope_freqs.weight"].data, np.float64).reshape(-1)
        raw["rope_scaling"] = _llama3_scaling(raw, factors, source)
    return raw


def _meant(number: float) -> float:
    """The shortest number that is the same in f32, in which a file has all."""
    return float(str(np.float32(number)))


def _longrope(
    tensors: Mapping[str, Any], positions: int, original: int | None, attention_factor: float | None
) -> dict[str, Any]:
    """LongRoPE as Phi's files have it: a table of factors for short contexts and one for long."""
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    for name in ("short", "long"):
        if (table := tensors.get(f"rope_factors_{name}.weight")) is not None:
            scaling[f"{name}_factor"] = [float(str(factor)) for factor in np.array(table.data).reshape(-1)]
    if original is not None and attention_factor is not None and original > 1:
        usual = math.sqrt(1 + math.log(max(positions / original, 1)) / math.log(original))
        if not math.isclose(usual, attention_factor, rel_tol=1e-6):  # a file has it in f32
            scaling["attention_factor"] = attention_factor
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}


def _yarn(value: Callable[..., Any], source: str) -> dict[str, Any]:
    """YaRN; what llama.cpp multiplies the paper's temperature by becomes the whole of it."""
    names = {"factor": "factor", "original_max_position_embeddings": "original_context_length"}
    said = {name: value(f"rope.scaling.{key}") for name, key in names.items()}
    scaling = {"rope_type": "yarn"} | {name: number for name, number in said.items() if number is not None}
    if not isinstance(said["factor"], float):
        raise UserError(f"{source}: rope.scaling.factor is missing, which yarn divides by")
    if (times := value("rope.scaling.attn_factor", 1.0)) != 1.0:
        scaling["attention_factor"] = _meant(times * yarn_temperature(said["factor"]))
    return scaling


def _llama3_scaling(raw: dict[str, Any], factors: np.ndarray, source: str) -> dict[str, Any]:
    """Llama 3.1's scaling, of which a file has only what it makes of each frequency; refused where it makes another."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope = parse_model_config({**raw, "rope_scaling": scaling}, source).layers[0].attention.rope
    assert rope is not None
    made = np.array(rope.base()) / np.array(rope.frequencies(raw["max_position_embeddings"]))
    if made.shape != factors.shape or not np.allclose(made, factors, rtol=1e-4):
        raise UserError(f"{source}: rope_freqs.weight is not what Llama 3.1 scales its frequencies by")
    return scaling


def _names(architecture: str, model: ModelConfig) -> Callable[[str], str]:
    """What llama.cpp calls the model's tensors."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, len(model.layers))
    return lambda name: str(table.get_name(name, try_suffixes=(".weight", ".bias")))


def _source(
    spec: WeightSpec,
    tensors: Mapping[str, Any],
    names: Callable[[str], str],
    model: ModelConfig,
    pairs: bool,
    path: Path,
) -> TensorSource:
    import gguf

    tensor = tensors.get(names(spec.name))
    if tensor is None:
        raise UserError(f"{path}: tensor {names(spec.name)!r} is missing")
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if shape != spec.shape:
        raise UserError(f"{path}: tensor {tensor.name!r} has shape {list(shape)}, this model needs {list(spec.shape)}")
    heads = heads_of(spec.module, model.layers[0].attention) if pairs else None
    offset = np.float32(model.norm.offset)

    def produce() -> np.ndarray:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(spec.shape)
        values = values if heads is None else from_pairs(values, heads)
        return values - offset if spec.kind == "norm" and offset else values

    return TensorSource(spec.name, spec.shape, _STORED.get(tensor.tensor_type.name, "F32"), produce)
