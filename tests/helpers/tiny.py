"""Small random models and data, made on the spot: what most whole-trainer tests run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from entrenar_gpu.files.tensor_source import save_safetensors
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.registry import parse_model_config
from entrenar_gpu.model.weight_spec import WeightSpec

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 320,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "eos_token_id": 0,
}


def make_model(folder: Path, seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    """A checkpoint with random weights of a size that keeps activations near one; no tokenizer."""
    raw = {**QWEN3, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    rng = np.random.default_rng(seed)
    kind = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    tensors = {}
    for spec in sorted(parse_model_config(raw).weights, key=drawn_order):
        values = rng.standard_normal(spec.shape)
        if spec.kind == "norm":
            values = 1 + 0.2 * values
        else:
            values = 0.2 * values if spec.kind == "bias" else values / np.sqrt(spec.shape[1])
        tensors[spec.name] = values.astype(kind)
    save_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def drawn_order(spec: WeightSpec) -> tuple[int, int]:
    """Sorts weights as random ones have always been drawn, and training.json was recorded: a layer's other norms last.

    The same numbers under the same names keep what tests know of these models true.
    """
    parts = spec.name.split(".")
    if parts[1] != "layers":
        return (-1 if spec.kind == "embedding" else 1 << 30, 0)
    return int(parts[2]), 0 if parts[3] == "input_layernorm" else 1 + (spec.kind == "norm")


def projections(config: ModelConfig) -> list[str]:
    """The names of the weights that QLoRA quantises."""
    return [spec.name for spec in config.weights if spec.kind == "projection"]


def make_data(path: Path, samples: int = 24, vocab: int = 320, longest: int = 30, seed: int = 0) -> Path:
    """Pre-tokenised samples whose tokens follow a simple rule, so that a loss can fall."""
    rng = np.random.default_rng(seed)
    with open(path, "w") as stream:
        for _ in range(samples):
            start, stride = rng.integers(1, vocab), rng.integers(1, 4)
            ids = ((start + stride * np.arange(rng.integers(6, longest))) % vocab).tolist()
            stream.write(json.dumps({"input_ids": ids}) + "\n")
    return path
