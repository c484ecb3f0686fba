"""LoRA adapters as mlx-lm has them: adapters.safetensors beside an adapter_config.json of its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu.adapters.lora import LoraModule
from entrenar_gpu.adapters.spec import CONFIG_FILE, AdapterSpec
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import SafetensorsFile, TensorSource, new_file, new_folder, read_json_object, write_tensors
from entrenar_gpu.model import ModelConfig
from entrenar_gpu.quant import Floats

MLX_WEIGHTS_FILE = "adapters.safetensors"


def is_mlx_adapter(folder: str | Path) -> bool:
    return (Path(folder) / MLX_WEIGHTS_FILE).is_file()


def load_mlx_adapter(folder: str | Path, model: ModelConfig) -> tuple[AdapterSpec, dict[str, Floats]]:
    """The adapter that mlx-lm trained: W x + scale B^T A^T x, with A [in, R] and B [R, out].

    Raises UserError naming the file, and what in it is no LoRA adapter of this model.
    """
    path, config_path = Path(folder) / MLX_WEIGHTS_FILE, Path(folder) / CONFIG_FILE
    config = read_json_object(config_path, missing="an mlx-lm adapter folder holds it")
    parameters = config.get("lora_parameters")
    if config.get("fine_tune_type", "lora") != "lora" or not isinstance(parameters, dict):
        raise UserError(f"{config_path}: fine_tune_type {config.get('fine_tune_type')!r} is not read; lora is")
    scale = parameters.get("scale")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not np.isfinite(scale):
        raise UserError(f"{config_path}: lora_parameters.scale must be a number, not {scale!r}")
    file = SafetensorsFile(path)
    shapes = {weight.module: weight.shape for weight in model.weights if weight.adaptable}
    modules: dict[str, LoraModule] = {}
    values: dict[str, Floats] = {}
    for name, info in file.tensors.items():
        module, _, part = name.rpartition(".")
        if part not in ("lora_a", "lora_b") or module not in shapes:
            raise UserError(f"{path}: tensor {name!r} has no place in this model, or is not LoRA's")
        out_features, in_features = shapes[module]
        rank = info.shape[1 if part == "lora_a" else 0] if len(info.shape) == 2 else 0
        if rank < 1 or info.shape != ((in_features, rank) if part == "lora_a" else (rank, out_features)):
            raise UserError(f"{path}: tensor {name!r} has shape {list(info.shape)}; is it of another model?")
        made = LoraModule(module, in_features, out_features, rank, float(scale) * rank)
        if modules.setdefault(module, made) != made:
            raise UserError(f"{path}: {module}: lora_a and lora_b have different ranks")
        array = np.ascontiguousarray(file[name].astype(np.float32).T)
        if not np.isfinite(array).all():
            raise UserError(f"{path}: tensor {name!r} holds numbers that are not finite")
        values[made.a_name if part == "lora_a" else made.b_name] = array
    missing = [n for m in modules.values() for n in (m.a_name, m.b_name) if n not in values]
    if missing or not modules:
        raise UserError(f"{path}: {missing[0] if missing else 'a LoRA tensor'} is missing")
    return AdapterSpec(modules, len(model.layers), 0.0), values


def save_mlx_adapter(folder: str | Path, spec: AdapterSpec, values: Mapping[str, Floats]) -> None:
    """Write an adapter as mlx-lm reads it. One scale is for all modules there: another one's goes into its B."""
    if spec.tables:
        raise UserError(f"{next(iter(spec.tables))}: mlx-lm's layout has adapters of projections alone")
    folder = Path(folder)
    new_folder(folder)
    modules = list(spec.modules.values())
    scale = modules[0].scale
    sources = []
    for module in modules:
        a = np.ascontiguousarray(values[module.a_name].T)
        b = np.ascontiguousarray(values[module.b_name].T)
        if module.scale != scale:
            b = b * np.float32(module.scale / scale)
        for part, array in (("lora_a", a), ("lora_b", b)):
            sources.append(TensorSource(f"{module.path}.{part}", array.shape, "F32", lambda array=array: array))  # type: ignore[misc]
    keys = sorted({module.path.split(".layers.", 1)[-1].partition(".")[2] for module in modules})
    content: dict[str, Any] = {
        "fine_tune_type": "lora",
        "num_layers": spec.num_layers,
        "lora_parameters": {"rank": modules[0].rank, "scale": scale, "dropout": spec.dropout, "keys": keys},
    }
    with contextlib.ExitStack() as files:
        text = json.dumps(content, indent=2) + "\n"
        files.enter_context(new_file(folder / CONFIG_FILE)).write(text.encode())
        write_tensors(files.enter_context(new_file(folder / MLX_WEIGHTS_FILE)), sources, {"format": "mlx"})
