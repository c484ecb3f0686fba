"""LoRA adapters: which modules get one, how they start, and their files in PEFT's layout.

LoRA (arXiv 2106.09685): y = W x + scale * B (A x), with A [R, in] and B [out, R]; scale = alpha/R, or alpha/sqrt(R)
with rank-stabilised LoRA (arXiv 2312.03732). Tensors are called by their module's path in the checkpoint, as in
`model.layers.0.self_attn.q_proj.lora_A.weight`; PEFT puts `base_model.model.` before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from entrenar_gpu.config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import new_file, new_folder
from entrenar_gpu.model_config import PROJECTIONS, ModelConfig
from entrenar_gpu.nf4 import Floats
from entrenar_gpu.peft_config import PeftSelection, read_peft_config
from entrenar_gpu.safetensors_file import SafetensorsFile, TensorSource, write_tensors

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
FLOAT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class LoraModule:
    """The adapter of one projection. `path` is the module's, as in `model.layers.0.self_attn.q_proj`."""

    path: str
    in_features: int
    out_features: int
    rank: int
    alpha: float
    scale: float

    @property
    def a_name(self) -> str:
        return f"{self.path}.lora_A.weight"

    @property
    def b_name(self) -> str:
        return f"{self.path}.lora_B.weight"


@dataclass(frozen=True)
class AdapterSpec:
    """The adapters of a model of `num_layers`, by module path, in the order the modules run.

    `dropout` is the probability with which an element of an adapter's input is dropped in training.
    """

    modules: dict[str, LoraModule]
    num_layers: int
    use_rslora: bool
    dropout: float

    @classmethod
    def from_config(cls, config: TrainConfig, model: ModelConfig) -> AdapterSpec:
        """What --rank, --alpha, --target, --rslora and --dropout ask for."""
        selection = PeftSelection(
            rank=config.rank,
            alpha=config.lora_alpha,
            target_modules=list(config.targets),
            use_rslora=config.rslora,
            dropout=config.dropout,
        )
        return cls.select(selection, model)

    @classmethod
    def from_peft(cls, folder: str | Path, model: ModelConfig) -> AdapterSpec:
        """What the `adapter_config.json` of a folder asks for, matched against modules as PEFT does.

        Raises UserError naming the file and key when it asks for what is not supported, or matches no projection.
        """
        path = Path(folder) / CONFIG_FILE
        selection = read_peft_config(path)
        others = sorted(name for name in _other_modules(model) if selection.matches(name))
        if others:
            raise UserError(f"{path}: target_modules includes {others[0]!r}; only the seven projections are supported")
        spec = cls.select(selection, model)
        if not spec.modules:
            raise UserError(f"{path}: target_modules {selection.target_modules!r} matches no projection of the model")
        return spec

    @classmethod
    def select(cls, selection: PeftSelection, model: ModelConfig) -> AdapterSpec:
        """The projections that a selection matches, each with the rank and alpha that it gives them."""
        modules = {}
        for path, (out_features, in_features) in projection_paths(model).items():
            if selection.matches(path):
                rank, alpha = selection.rank_of(path), selection.alpha_of(path)
                scale = alpha / (math.sqrt(rank) if selection.use_rslora else rank)
                modules[path] = LoraModule(path, in_features, out_features, rank, alpha, scale)
        return cls(modules, model.num_layers, selection.use_rslora, selection.dropout)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Every adapter tensor, A before B: A is [rank, in], B [out, rank]."""
        result = {}
        for module in self.modules.values():
            result[module.a_name] = (module.rank, module.in_features)
            result[module.b_name] = (module.out_features, module.rank)
        return result


def projection_paths(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) features of every projection, by module path, in the order they run."""
    return {
        f"model.layers.{layer}.{PROJECTIONS[name]}.{name}": shape
        for layer in range(model.num_layers)
        for name, shape in model.projection_shapes.items()
    }


def _other_modules(model: ModelConfig) -> set[str]:
    """Paths of the modules with weights that are no projections: embeddings, norms, output projection."""
    owners = {name.rpartition(".")[0] for name in model.parameter_shapes()}
    return (owners | {"lm_head"}) - projection_paths(model).keys()


def init_adapter(spec: AdapterSpec, seed: int, kind: Literal["kaiming", "gaussian"] = "kaiming") -> dict[str, Floats]:
    """Fresh adapter tensors: B zero; A from U(-1/sqrt(in), 1/sqrt(in)) ("kaiming", with a = sqrt(5)) or N(0, 1/rank^2).

    Each A depends on the seed and its own name only, so that adding a module does not change the others.
    """
    tensors: dict[str, Floats] = {}
    for name, shape in spec.shapes().items():
        if name.endswith("lora_B.weight"):
            tensors[name] = np.zeros(shape, np.float32)
            continue
        words = np.frombuffer(hashlib.sha256(name.encode()).digest(), "<u4")
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *words.tolist()])))
        if kind == "kaiming":
            bound = np.float32(1 / math.sqrt(shape[1]))
            tensors[name] = (2 * rng.random(shape, np.float32) - 1) * bound
        else:
            tensors[name] = rng.standard_normal(shape, np.float32) * np.float32(1 / shape[0])
    return tensors


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
