"""Models that need what this trainer lacks, told by their config.json before anything else of them is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from entrenar_gpu.errors import UserError
from entrenar_gpu.model.config_file import shown

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
STATE_SPACE = ("mamba_", "ssm_", "hybrid_override_pattern")  # what begins keys of models with state-space layers
ATTENTION_LAYERS = ("attention", "full_attention", "sliding_attention", "chunked_attention")
RECURRENT = (
    "mamba",
    "rwkv",
    "xlstm",
    "lfm2",
    "qwen3_5",
    "qwen3_next",
    "recurrent_gemma",
    "kimi_linear",
    "zamba",
    "jamba",
)


def refuse(raw: Mapping[str, Any], source: str) -> None:
    """Raises UserError that says what the model needs, where that is none of what the families have."""
    for needs, what in NEEDS:
        if needs(raw):
            raise UserError(f"{source}: {name_of(raw)} needs {what}, which this trainer lacks")
    for part in _parts(raw):
        _refuse_quantised(part.get("quantization_config"), source)


def _refuse_quantised(quantization: Any, source: str) -> None:
    """Weights quantised by anything but bitsandbytes to NF4 are refused by what did it."""
    if not quantization:
        return
    if not isinstance(quantization, dict):
        raise UserError(f"{source}: quantization_config must be an object, not {shown(quantization)}")
    method = str(quantization.get("quant_method", "unknown"))[:80]
    if method == "bitsandbytes":
        if not quantization.get("load_in_4bit", quantization.get("_load_in_4bit")):
            method = "bitsandbytes in 8 bits"
        elif quantization.get("bnb_4bit_quant_type", "nf4") == "nf4":  # where it is not said, the tensors say it
            return
        else:
            method = f"bitsandbytes {shown(quantization['bnb_4bit_quant_type'])}"
    raise UserError(f"{source}: quantization_config: {method} is not supported; bitsandbytes NF4 is")


def name_of(raw: Mapping[str, Any]) -> str:
    """What the model calls itself."""
    names = raw.get("architectures")
    first = names[0] if isinstance(names, list) and names else raw.get("model_type")
    return shown(first) if not isinstance(first, str) else first[:80]


def _parts(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The file, and what it says of its language part."""
    text = raw.get("text_config")
    return [raw, text] if isinstance(text, dict) else [raw]


def _model_types(raw: Mapping[str, Any]) -> list[str]:
    return [str(part.get("model_type") or "") for part in _parts(raw)]


def _has_experts(raw: Mapping[str, Any]) -> bool:
    counts = [part.get(key) for part in _parts(raw) for key in EXPERTS]
    if any(isinstance(count, int) and count > 0 for count in counts):
        return True
    return all(count is None for count in counts) and any(
        "moe" in kind or kind == "mixtral" for kind in _model_types(raw)
    )


def _has_other_layers(raw: Mapping[str, Any]) -> bool:
    """Linear attention, state spaces or convolutions: by the layers, where none are listed by keys, or by family."""
    for part in _parts(raw):
        kinds = part.get("layer_types") or part.get("layers_block_type") or []
        if isinstance(kinds, list) and any(kind not in ATTENTION_LAYERS for kind in kinds):
            return True
        if not kinds and any(key.startswith(STATE_SPACE) for key in part):
            return True
        if part.get("model_type") == "granitemoehybrid" and not kinds:  # its class takes Mamba for every layer then
            return True
    return any(kind.startswith(RECURRENT) or "mamba" in kind for kind in _model_types(raw))


def _has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda raw: any(part.get(key) for part in _parts(raw) for key in keys)


def _is_stored_as(method: str) -> Callable[[Mapping[str, Any]], bool]:
    def told(raw: Mapping[str, Any]) -> bool:
        stored = [part.get("quantization_config") for part in _parts(raw)]
        return any(isinstance(of, dict) and method in str(of.get("quant_method")) for of in stored)

    return told


def _has_sections(raw: Mapping[str, Any]) -> bool:
    ropes = [part.get("rope_scaling") or part.get("rope_parameters") for part in _parts(raw)]
    return any(isinstance(rope, dict) and rope.get("mrope_section") for rope in ropes)


NEEDS: tuple[tuple[Callable[[Mapping[str, Any]], bool], str], ...] = (
    (_is_stored_as("mxfp4"), "weights read from MXFP4"),
    (_is_stored_as("fp8"), "weights read from FP8 (the same model in BF16 can be trained)"),
    (_has("kv_lora_rank"), "multi-head latent attention (MLA)"),
    (_has_other_layers, "linear attention, state-space or convolution layers"),
    (_has_experts, "mixture of experts"),
    (_has("is_encoder_decoder"), "an encoder and cross-attention"),
    (_has_sections, "rotation by image positions (mrope)"),
)
