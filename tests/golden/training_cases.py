"""The small models, adapters and data of training.json, made of raw random words, which NumPy promises to keep."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu.adapters.peft_files import save_adapter
from entrenar_gpu.adapters.spec import AdapterSpec
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.files.tensor_source import save_safetensors
from entrenar_gpu.model.registry import parse_model_config
from tests.helpers.tiny import drawn_order

FILE = Path(__file__).with_name("training.json")
OPTIONS: dict[str, Any] = {
    "steps": 10,
    "batch": 2,
    "seq": 24,
    "accumulate": 2,
    "shuffle": False,
    "schedule": "constant",
}
OPTIONS |= {"lr": 2e-3, "weight_decay": 0.1, "clip": 0.5}

BASE = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 16}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 12}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
# By name: what config.json adds to BASE, and the run's options.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3-tied-qlora": (QWEN3 | {"tie_word_embeddings": True}, {"method": "qlora"}),
    "qwen3-untied-lora": (QWEN3 | {"tie_word_embeddings": False}, {"method": "lora", "target": "q,k,gate,down"}),
    "qwen2-lora": (QWEN2, {"method": "lora"}),
    "llama2-qlora-single": (LLAMA, {"method": "qlora", "double_quant": False, "rslora": True}),
    "llama31-lora": (LLAMA | {"rope_scaling": LLAMA31}, {"method": "lora"}),
}


def uniform(shape: tuple[int, ...], *seed: int) -> np.ndarray:
    """Values in [-1, 1), float32: the same on every machine and version."""
    words = np.random.Philox(np.random.SeedSequence(seed)).random_raw(math.prod(shape))
    return ((words >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)).reshape(shape)


def write(folder: Path, name: str) -> Path:
    """Model, adapter (B not zero) and data of a case, in `folder`."""
    raw, options = BASE | CASES[name][0], CASES[name][1]
    (folder / "model").mkdir(parents=True)
    (folder / "model/config.json").write_text(json.dumps(raw))
    model, tensors = parse_model_config(raw), {}
    for number, spec in enumerate(sorted(model.weights, key=drawn_order)):
        values = uniform(spec.shape, 1, number)
        if len(spec.shape) > 1:
            tensors[spec.name] = values * np.float32(1.7 / math.sqrt(spec.shape[1]))
        else:
            tensors[spec.name] = np.float32(0.3) * values + np.float32(spec.kind == "norm")
    save_safetensors(folder / "model/model.safetensors", tensors, {"format": "pt"})
    spec = AdapterSpec.from_config(TrainConfig(rank=3, alpha=5.0, **options), model)
    adapter = {key: np.float32(0.2) * uniform(shape, 2, n) for n, (key, shape) in enumerate(spec.shapes().items())}
    save_adapter(folder / "adapter", spec, adapter, str(folder / "model"))
    with open(folder / "train.jsonl", "w") as stream:
        for number in range(30):
            length = 5 + number * 7 % 13
            ids = ((uniform((length,), 3, number) + 1) * 40).astype(int) % 80
            stream.write(json.dumps({"input_ids": ids.tolist()}) + "\n")
    return folder
