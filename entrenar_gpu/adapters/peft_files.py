"""Adapters as files in PEFT's layout."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu.adapters.lora import peft_config
from entrenar_gpu.adapters.mlx_files import is_mlx_adapter, load_mlx_adapter
from entrenar_gpu.adapters.spec import CONFIG_FILE, HEAD_PATH, PEFT_PREFIX, AdapterSpec
from entrenar_gpu.dtypes import STORED_FLOATS
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import SafetensorsFile, TensorSource, new_file, new_folder, write_tensors
from entrenar_gpu.model import ModelConfig
from entrenar_gpu.quant import Floats

WEIGHTS_FILE = "adapter_model.safetensors"


def load_adapter(folder: str | Path, model: ModelConfig) -> tuple[AdapterSpec, dict[str, Floats]]:
    """An adapter that PEFT, mlx-lm or this trainer saved: its description and its tensors in float32.

    Raises UserError naming the file and the tensor that is missing, left over or shaped for another model.
    """
    if is_mlx_adapter(folder):
        return load_mlx_adapter(folder, model)
    spec = AdapterSpec.from_peft(folder, model)
    path = Path(folder) / WEIGHTS_FILE
    if not path.exists():
        raise UserError(f"{path}: not found; an adapter saved as a pickle (adapter_model.bin) is not read")
    file = SafetensorsFile(path)
    wanted = {name_in_file(name): (name, shape) for name, shape in spec.shapes().items()}
    copies = {
        f"{PEFT_PREFIX}{made}.base_layer.weight" for made in spec.tables
    }  # which PEFT saves beside LoRA of a table
    copies |= {f"{PEFT_PREFIX}{HEAD_PATH}.base_layer.weight"} if spec.tables else set()
    for name in file.tensors:
        if name not in wanted and name not in copies:
            raise UserError(f"{path}: tensor {name!r} has no place in this model, or is not LoRA's")
    tensors = {}
    for name, (ours, shape) in wanted.items():
        if name not in file.tensors:
            raise UserError(f"{path}: tensor {name!r} is missing; {CONFIG_FILE} and the model call for it")
        info = file.tensors[name]
        if info.shape != shape:
            raise UserError(
                f"{path}: tensor {name!r} has shape {list(info.shape)}, this model needs {list(shape)};"
                " is it the adapter of another model?"
            )
        if info.dtype not in STORED_FLOATS:
            raise UserError(f"{path}: tensor {name!r} has dtype {info.dtype}; supported: {', '.join(STORED_FLOATS)}")
        values = file[name].astype(np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"{path}: tensor {name!r} holds numbers that are not finite")
        tensors[ours] = values
    return spec, tensors


def save_adapter(folder: str | Path, spec: AdapterSpec, tensors: Mapping[str, Floats], base_model: str) -> None:
    """Write an adapter in float32, so that `PeftModel.from_pretrained` loads it; both files appear, or neither.

    `base_model` is the folder or Hub id that PEFT will look for. Raises UserError when the disk is full.
    """
    folder = Path(folder)
    new_folder(folder)
    sources = [
        TensorSource(name_in_file(name), shape, "F32", lambda name=name: tensors[name])  # type: ignore[misc]
        for name, shape in spec.shapes().items()
    ]
    content = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": _targets(spec),
        "lora_dropout": spec.dropout,
        **peft_config(spec.lora_modules),
        **_tables_config(spec),
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    with contextlib.ExitStack() as files:
        files.enter_context(new_file(folder / CONFIG_FILE)).write(text.encode())
        write_tensors(files.enter_context(new_file(folder / WEIGHTS_FILE)), sources, {"format": "pt"})


def name_in_file(name: str) -> str:
    """What PEFT calls a tensor of an adapter in its file."""
    return PEFT_PREFIX + name.replace(".modules_to_save.", ".")


def _tables_config(spec: AdapterSpec) -> dict[str, Any]:
    """PEFT's keys of the tables that are trained themselves, where there are any."""
    saved, tokens = spec.saved, spec.tokens
    content: dict[str, Any] = {"modules_to_save": [path.rpartition(".")[2] for path in saved]} if saved else {}
    if tokens:
        chosen = {path.rpartition(".")[2]: list(made.tokens) for path, made in tokens.items()}
        content["trainable_token_indices"] = chosen
    return content


def _targets(spec: AdapterSpec) -> list[str]:
    """Names of the modules that have an adapter in every layer, and the whole paths of the others.

    A model that also sees has modules of the same names there: of its language part all are whole paths.
    """
    layers = Counter(path.rpartition(".")[2] for path in spec.modules if ".language_model." not in path)
    everywhere = {name for name, count in layers.items() if count == spec.num_layers}
    rest = {path for path in spec.modules if path.rpartition(".")[2] not in everywhere} | {*spec.lora_tables.values()}
    return sorted(everywhere | rest)
