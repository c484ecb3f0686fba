"""Training from scratch: a base of random weights, written beside the run before it begins.

It is a checkpoint like any other from then on, so that planning, loading and resuming know of no other kind of start.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu.config import SHAPES, TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.export import copy_model_files, save_checkpoint
from entrenar_gpu.files import TensorSource, new_folder, read_json_object, write_text
from entrenar_gpu.model import INDEX_FILE, SINGLE_FILE, ModelConfig, WeightSpec, parse_model_config, resolve_model

FOLDER = "base"  # within the run folder
RANGE = 0.02  # of normal deviates, where a config.json gives no initializer_range


def with_random_base(config: TrainConfig) -> TrainConfig:
    """`config` with a model of random weights in place of --model, for --init random; it is made where it is not yet.

    --model is then a folder or Hub id, of which the weights are not read, or a name of `SHAPES`. Raises UserError.
    """
    if config.init != "random":
        return config
    if config.method != "full":
        raise UserError("--init: random weights are trained with --method full")
    folder = Path(config.output) / FOLDER
    if not any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        _make(config, folder)
    return replace(config, model=str(folder))


def _make(config: TrainConfig, folder: Path) -> None:
    new_folder(folder)
    if config.model in SHAPES:
        raw, source = SHAPES[config.model], config.model
        write_text(folder / "config.json", json.dumps(raw, indent=2) + "\n")
    else:
        held = resolve_model(config.model, weights=False)
        raw, source = read_json_object(held / "config.json"), str(held / "config.json")
        copy_model_files(held, folder, "float32")
    model = parse_model_config(raw, source)
    sources = [
        TensorSource(spec.name, spec.shape, "F32", partial(_values, model, spec, raw, (config.seed, number)))
        for number, spec in enumerate(model.weights)
    ]
    save_checkpoint(folder, sources)


def _values(model: ModelConfig, spec: WeightSpec, raw: dict[str, Any], key: tuple[int, int]) -> np.ndarray:
    """As transformers starts a model: normal deviates, norms of factor one, biases and the row of padding zero."""
    if spec.kind == "norm":
        return np.full(spec.shape, 1 - model.norm.offset, np.float32)
    if spec.kind == "bias":
        return np.zeros(spec.shape, np.float32)
    inner = raw.get("text_config")
    text = inner if isinstance(inner, dict) else raw
    values = np.random.default_rng(key).standard_normal(spec.shape, np.float32)
    values *= np.float32(text.get("initializer_range") or RANGE)
    padding = text.get("pad_token_id")
    if spec.kind == "embedding" and isinstance(padding, int) and 0 <= padding < model.vocab_size:
        values[padding] = 0
    return values
