"""The same models in transformers and PEFT: saved for us to read, and run sample by sample on our batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from entrenar_gpu.data.samples import IGNORE
from entrenar_gpu.model import load_model_config
from entrenar_gpu.quant.nf4 import Nf4Weight

torch.set_num_threads(1)  # products this small only wait for each other's threads

SMALL = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SPREAD = [1.0, 1.1, 1.3, 1.6, 2.0]  # LongRoPE's factors of the ten columns that are rotated


def longrope(original: int, share: float) -> dict[str, Any]:
    """Phi-4-mini's layout: how far the model was trained first is said beside the object."""
    factors = {"short_factor": SPREAD, "long_factor": [3 * factor for factor in SPREAD]}
    described = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": share, **factors}
    return {"rope_parameters": described, "original_max_position_embeddings": original}


# Heads are not hidden_size / num_attention_heads, four layers show the order of windows, and windows are shorter than
# samples.
GEMMA = {"head_dim": 20, "num_hidden_layers": 4, "sliding_window": 5, "query_pre_attn_scalar": 17}
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.4, "attention_multiplier": 0.2}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}
MINISTRAL3 = YARN | {
    "llama_4_scaling_beta": 0.3,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "original_max_position_embeddings": 7,
}

# By name: transformers' configuration, and what it is made with beside SMALL.
ARCHITECTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3-tied": (transformers.Qwen3Config, {"tie_word_embeddings": True, "head_dim": 20}),
    "qwen3-untied": (transformers.Qwen3Config, {"tie_word_embeddings": False, "head_dim": 20}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama2": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "llama31": (transformers.LlamaConfig, {"rope_parameters": LLAMA31}),
}
# The families, each with the oddities of its published config.json.
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3-yarn": (transformers.Qwen3Config, {"head_dim": 20, "rope_parameters": YARN, "attention_bias": True}),
    "qwen2-window": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 2},
    ),
    "llama-biases-linear": (
        transformers.LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 2.5}},
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        GEMMA
        | {
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "sliding_attention": LOCAL,
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            },
        },
    ),
    "gemma2": (
        transformers.Gemma2Config,
        GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    ),
    "mistral-nemo": (transformers.MistralConfig, {"head_dim": 16, "sliding_window": None}),
    "mistral-window": (transformers.MistralConfig, {"sliding_window": 6}),
    "ministral3": (transformers.Ministral3Config, {"head_dim": 16, "rope_parameters": MINISTRAL3}),
    "smollm3": (
        transformers.SmolLM3Config,
        {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "pad_token_id": 0},
    ),
    "phi4": (transformers.Phi3Config, {"pad_token_id": 0}),
    "phi4-mini": (transformers.Phi3Config, {"hidden_size": 80, "pad_token_id": 0, **longrope(64, 0.5)}),
    "phi4-mini-long": (
        transformers.Phi3Config,
        {"hidden_size": 80, "pad_token_id": 0, "sliding_window": 9, **longrope(4, 0.5)},
    ),
    "granite3": (transformers.GraniteConfig, {"tie_word_embeddings": True, **GRANITE}),
    "granite4": (
        transformers.GraniteMoeHybridConfig,
        {
            **{"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96},
            **{"layer_types": ["full_attention"] * 2, "position_embedding_type": "rope"},
            **{"mamba_n_heads": 8, **GRANITE},
        },
    ),
    "olmo2": (transformers.Olmo2Config, {"pad_token_id": 0}),
    "olmo3": (
        transformers.Olmo3Config,
        {
            **{"num_hidden_layers": 4, "sliding_window": 5, "pad_token_id": 0},
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "glm4": (transformers.Glm4Config, {"head_dim": 20, "pad_token_id": 0}),
    "glm": (transformers.GlmConfig, {"head_dim": 20, "pad_token_id": 0}),
    "arcee": (transformers.ArceeConfig, {"mlp_bias": True}),
}


VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
LANGUAGE = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 20}
# Models that also see: transformers' configuration, of the language part, of the vision tower, and what is around them.
SEEING: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        transformers.Gemma3Config,
        {"model_type": "gemma3_text", **GEMMA, **LANGUAGE},
        {"model_type": "siglip_vision_model", **VISION},
        {"mm_tokens_per_image": 4, "boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5},
    ),
    "mistral3": (
        transformers.Mistral3Config,
        {"model_type": "ministral3", "rope_parameters": MINISTRAL3, **LANGUAGE, "head_dim": 16},
        {"model_type": "pixtral", **VISION, "head_dim": 8},
        {"tie_word_embeddings": False, "image_token_index": 5},
    ),
}


def save_seeing_model(folder: Path, family: str) -> Path:
    """A random checkpoint of a model that also sees."""
    kind, text, vision, around = SEEING[family]
    torch.manual_seed(0)
    config = kind(text_config=SMALL | text, vision_config=vision, **around)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


def save_model(folder: Path, architecture: str, seed: int = 0, dtype: Any = torch.float32, **changes: Any) -> Path:
    """A random checkpoint written by transformers; norms and biases are random too, so that no term is idle."""
    kind, values = (ARCHITECTURES | FAMILIES)[architecture]
    torch.manual_seed(seed)
    config = kind(**(SMALL | values | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


def load_model(folder: Path, quantised: bool | None = None, sees: bool = False) -> Any:
    """A checkpoint in f32, its projections passed through NF4 unless `quantised` is None (True: double-quantised)."""
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    cache = {} if sees else {"use_cache": False}
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **cache)
    if quantised is not None:
        projections = {spec.name for spec in load_model_config(folder).weights if spec.kind == "projection"}
        for name, parameter in model.named_parameters():
            if name in projections:
                weight = Nf4Weight.from_dense(parameter.detach().numpy(), quantised)
                parameter.data = torch.from_numpy(weight.dequantize())
    return model.eval()


def random_adapter(folder: Path, model: Any, seed: int = 1, **options: Any) -> Any:
    """`model` with a PEFT adapter whose B is not zero, and saved to `folder`."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 6} | options))
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    wrapped.save_pretrained(folder)
    return wrapped


def segments(batch: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, targets, weights of the targets) of every sample that a batch packs, padding left out."""
    found = []
    weights = batch.get("weights", (batch["targets"] != IGNORE).astype(np.float32))
    rows = (batch["input_ids"], batch["targets"], weights, batch["segment_start"])
    for ids, targets, counts, starts in zip(*rows, strict=True):
        for start in np.unique(starts):
            here = starts == start
            if (targets[here] != IGNORE).any():
                found.append((ids[here].astype(np.int64), targets[here].astype(np.int64), counts[here]))
    return found


def loss_of(model: Any, micro_batches: list[dict[str, np.ndarray]], smoothing: float = 0.0) -> Any:
    """Mean loss over the unmasked tokens of a step, by their weights, each sample run alone: no padding or packing to
    get wrong."""
    total, weight = torch.zeros(()), 0.0
    for batch in micro_batches:
        for ids, targets, counts in segments(batch):
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0]
            losses = torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(targets), ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
            )
            total = total + (losses * torch.from_numpy(counts)).sum()
            weight += float(counts.sum())
    return total / weight


def gradients(model: Any) -> dict[str, np.ndarray]:
    """Gradient of everything trainable, by our names."""
    return {our_name(n): p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}


def our_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "").replace(".base_layer", "")
