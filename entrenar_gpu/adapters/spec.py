"""The adapters of a model: which modules get one, how they start, and what their tensors are called.

Tensors are called by their module's path in the checkpoint, as in `model.layers.0.self_attn.q_proj.lora_A.weight`;
PEFT puts `base_model.model.` before it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from entrenar_gpu.adapters.lora import LoraConfig, LoraModule, fresh_values, read_peft_config
from entrenar_gpu.adapters.pattern import TooSlow, one_file
from entrenar_gpu.adapters.peft_reader import PeftReader
from entrenar_gpu.adapters.selection import ModuleSelection, chosen_layers, chosen_targets
from entrenar_gpu.config import TrainConfig, flag
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import read_json_object
from entrenar_gpu.model import ModelConfig
from entrenar_gpu.quant import Floats

CONFIG_FILE = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterSpec:
    """The adapters of a model of `num_layers`, by module path, in the order the modules run.

    `dropout` is the probability with which an element of an adapter's input is dropped in training. `notes` say in
    words what an adapter's file asks for and the model does not have.
    """

    modules: dict[str, LoraModule]
    num_layers: int
    dropout: float
    notes: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: TrainConfig, model: ModelConfig) -> AdapterSpec:
        """What --rank, --alpha, --target, --layers, --layers-to-transform, --rslora and --dropout ask for."""
        selection = ModuleSelection(chosen_targets(config.target, model), layers=chosen_layers(config, model))
        return cls.select(selection, LoraConfig.from_options(config), model)

    @classmethod
    def from_peft(cls, folder: str | Path, model: ModelConfig) -> AdapterSpec:
        """What the `adapter_config.json` of a folder asks for, matched against modules as PEFT does.

        Raises UserError naming the file and key when it asks for what is not supported, or matches no projection.
        """
        path = Path(folder) / CONFIG_FILE
        file = PeftReader(read_json_object(path, missing="an adapter folder holds it"), path)
        selection, config = read_peft_config(file)
        try:
            with one_file():
                return cls._matched(file, selection, config, model)
        except TooSlow as error:
            raise file.error(str(error)) from None

    @classmethod
    def _matched(
        cls, file: PeftReader, selection: ModuleSelection, config: LoraConfig, model: ModelConfig
    ) -> AdapterSpec:
        others = [] if selection.is_all_linear else sorted(filter(selection.matches, _other_modules(model)))
        if others:
            raise file.error(f"target_modules includes {others[0]!r}; only projections are supported")
        spec = cls.select(selection, config, model)
        if not spec.modules:
            raise file.error(f"target_modules {selection.target_modules!r} matches no projection of the model")
        takes = [weight.module for weight in model.weights if weight.adaptable]
        unmatched = [*selection.unmatched(takes), *config.unmatched(spec.modules)]
        notes = (f"{file.path}: {key} {name[:80]!r} matches no module" for key, name in unmatched)
        return replace(spec, notes=tuple(notes))

    @classmethod
    def select(cls, selection: ModuleSelection, config: LoraConfig, model: ModelConfig) -> AdapterSpec:
        """The modules that a selection matches, each with what `config` gives it."""
        chosen = [spec for spec in model.weights if spec.adaptable and selection.matches(spec.module)]
        return cls({spec.module: config.module(spec) for spec in chosen}, len(model.layers), config.dropout)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every adapter tensor, in the order the modules run."""
        return {name: shape for module in self.modules.values() for name, shape in module.shapes().items()}


def adapter_spec(config: TrainConfig, model: ModelConfig) -> AdapterSpec | None:
    """The fresh adapters of a run; None in full training, where a wrong --target is refused all the same."""
    spec = AdapterSpec.from_config(config, model)
    return None if config.method == "full" else spec


def refuse_other_adapter(config: TrainConfig, model: ModelConfig, said: Collection[str] | None = None) -> None:
    """Raise UserError where a run's options ask for another adapter than that of --adapter-init.

    What nobody asked for is the adapter's: a default is no contradiction. `said` are the options that somebody gave, by
    default those that are not at their defaults.
    """
    if said is None:
        said = {f.name for f in fields(config) if getattr(config, f.name) != f.default}
    asked = [name for name in ("rank", "alpha", "rslora", "target") if name in said]
    if config.adapter_init is None or config.method == "full" or not asked:
        return
    held, wanted = AdapterSpec.from_peft(config.adapter_init, model), AdapterSpec.from_config(config, model)
    modules = held.modules.values()
    differs = {
        "rank": any(m.rank != config.rank for m in modules),
        "alpha": any(m.alpha != config.lora_alpha for m in modules),
        "rslora": any(m.use_rslora != config.rslora for m in modules),
        "target": held.modules.keys() != wanted.modules.keys(),
    }
    for name in asked:
        if differs[name]:
            raise UserError(f"{flag(name)}: {config.adapter_init} has another; leave it out, or --adapter-init")


def init_adapter(spec: AdapterSpec, seed: int, kind: Literal["kaiming", "gaussian"] = "kaiming") -> dict[str, Floats]:
    """Fresh values of every adapter tensor."""
    return {n: v for module in spec.modules.values() for n, v in fresh_values(module, seed, kind).items()}


def _other_modules(model: ModelConfig) -> set[str]:
    """Paths of the modules with weights that take no adapter: embeddings, norms, output head."""
    takes = {spec.module for spec in model.weights if spec.adaptable}
    return ({spec.module for spec in model.weights} | {"lm_head"}) - takes
