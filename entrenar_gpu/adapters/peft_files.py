"""Adapters as files in PEFT's layout."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu.adapters.lora import CONFIG_FILE, PEFT_PREFIX, AdapterSpec
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import SafetensorsFile, TensorSource, new_file, new_folder, write_tensors
from entrenar_gpu.model import ModelConfig
from entrenar_gpu.quant import Floats

WEIGHTS_FILE = "adapter_model.safetensors"
FLOAT_DTYPES = ("F32", "F16", "BF16")


def load_adapter(folder: str | Path, model: ModelConfig) -> tuple[AdapterSpec, dict[str, Floats]]:
    """An adapter that PEFT or this trainer saved: its description and its tensors in float32.

    Raises UserError naming the file and the tensor that is missing, left over or shaped for another model.
    """
    spec = AdapterSpec.from_peft(folder, model)
    path = Path(folder) / WEIGHTS_FILE
    if not path.exists():
        raise UserError(f"{path}: not found; an adapter saved as a pickle (adapter_model.bin) is not read")
    file = SafetensorsFile(path)
    wanted = {PEFT_PREFIX + name: shape for name, shape in spec.shapes().items()}
    for name in file.tensors:
        if name not in wanted:
            raise UserError(f"{path}: tensor {name!r} has no place in this model, or is not LoRA's")
    tensors = {}
    for name, shape in wanted.items():
        if name not in file.tensors:
            raise UserError(f"{path}: tensor {name!r} is missing; {CONFIG_FILE} and the model call for it")
        info = file.tensors[name]
        if info.shape != shape:
            raise UserError(
                f"{path}: tensor {name!r} has shape {list(info.shape)}, this model needs {list(shape)};"
                " is it the adapter of another model?"
            )
        if info.dtype not in FLOAT_DTYPES:
            raise UserError(f"{path}: tensor {name!r} has dtype {info.dtype}; supported: {', '.join(FLOAT_DTYPES)}")
        tensors[name.removeprefix(PEFT_PREFIX)] = file[name].astype(np.float32)
    return spec, tensors


def save_adapter(folder: str | Path, spec: AdapterSpec, tensors: Mapping[str, Floats], base_model: str) -> None:
    """Write an adapter in float32, so that `PeftModel.from_pretrained` loads it; both files appear, or neither.

    `base_model` is the folder or Hub id that PEFT will look for. Raises UserError when the disk is full.
    """
    folder = Path(folder)
    new_folder(folder)
    sources = [
        TensorSource(PEFT_PREFIX + name, shape, "F32", lambda name=name: tensors[name])  # type: ignore[misc]
        for name, shape in spec.shapes().items()
    ]
    text = json.dumps(peft_config(spec, base_model), indent=2, sort_keys=True) + "\n"
    with contextlib.ExitStack() as files:
        files.enter_context(new_file(folder / CONFIG_FILE)).write(text.encode())
        write_tensors(files.enter_context(new_file(folder / WEIGHTS_FILE)), sources, {"format": "pt"})


def peft_config(spec: AdapterSpec, base_model: str) -> dict[str, Any]:
    """The content of `adapter_config.json`. Modules that differ from the most frequent rank or alpha go in patterns."""
    modules = spec.modules.values()
    rank = Counter(module.rank for module in modules).most_common(1)[0][0]
    alpha = Counter(module.alpha for module in modules).most_common(1)[0][0]
    # PEFT matches pattern keys as regular expressions; a dot in a path matches itself, and nothing else fits there
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": spec.dropout,
        "use_rslora": spec.use_rslora,
        "bias": "none",
        "target_modules": _targets(spec),
        "rank_pattern": {module.path: module.rank for module in modules if module.rank != rank},
        "alpha_pattern": {module.path: _plain(module.alpha) for module in modules if module.alpha != alpha},
    }


def _plain(number: float) -> float:
    """A whole number without its fraction: PEFT declares lora_alpha as int."""
    return int(number) if number == int(number) else number


def _targets(spec: AdapterSpec) -> list[str]:
    """Names of the projections that have an adapter in every layer, and the whole paths of the others."""
    layers = Counter(path.rpartition(".")[2] for path in spec.modules)
    everywhere = {name for name, count in layers.items() if count == spec.num_layers}
    rest = {path for path in spec.modules if path.rpartition(".")[2] not in everywhere}
    return sorted(everywhere | rest)
