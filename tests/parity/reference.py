"""The same models in transformers and PEFT: saved for us to read, and run sample by sample on our batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from entrenar_gpu.data.samples import IGNORE
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
# By name: transformers' model, and its configuration's.
ARCHITECTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3-tied": (transformers.Qwen3Config, {"tie_word_embeddings": True, "head_dim": 20}),
    "qwen3-untied": (transformers.Qwen3Config, {"tie_word_embeddings": False, "head_dim": 20}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama2": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "llama31": (transformers.LlamaConfig, {"rope_parameters": LLAMA31}),
}


def save_model(folder: Path, architecture: str, seed: int = 0, dtype: Any = torch.float32, **changes: Any) -> Path:
    """A random checkpoint written by transformers; norms and biases are random too, so that no term is idle."""
    kind, values = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = kind(**(SMALL | values | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


def load_model(folder: Path, quantised: bool | None = None) -> Any:
    """A checkpoint in f32, its projections passed through NF4 unless `quantised` is None (True: double-quantised)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", use_cache=False
    )
    if quantised is not None:
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
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


def segments(batch: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, targets) of every sample that a batch packs, padding left out."""
    found = []
    for ids, targets, starts in zip(batch["input_ids"], batch["targets"], batch["segment_start"], strict=True):
        for start in np.unique(starts):
            here = starts == start
            if (targets[here] != IGNORE).any():
                found.append((ids[here].astype(np.int64), targets[here].astype(np.int64)))
    return found


def loss_of(model: Any, micro_batches: list[dict[str, np.ndarray]], smoothing: float = 0.0) -> Any:
    """Mean loss over the unmasked tokens of a step, each sample run alone: no padding or packing to get wrong."""
    total, tokens = torch.zeros(()), 0
    for batch in micro_batches:
        for ids, targets in segments(batch):
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0]
            total = total + torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(targets), ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
            )
            tokens += int((targets != IGNORE).sum())
    return total / tokens


def gradients(model: Any) -> dict[str, np.ndarray]:
    """Gradient of everything trainable, by our names."""
    return {our_name(n): p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}


def our_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "").replace(".base_layer", "")
