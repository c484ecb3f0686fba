"""LoRA adapters: which modules get one, how they start, and their files in PEFT's layout.

LoRA (arXiv 2106.09685): y = W x + scale * B (A x), with A [R, in] and B [out, R]; scale = alpha/R, or alpha/sqrt(R)
with rank-stabilised LoRA (arXiv 2312.03732). Tensors are called by their module's path in the checkpoint, as in
`model.layers.0.self_attn.q_proj.lora_A.weight`; PEFT puts `base_model.model.` before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from entrenar_gpu.adapters.peft_config import PeftSelection, read_peft_config
from entrenar_gpu.config import PROJECTIONS, TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.model import LoraModule, ModelConfig

CONFIG_FILE = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


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
