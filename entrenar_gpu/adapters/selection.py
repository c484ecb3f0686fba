"""Which modules an adapter is for, by the matching rules of PEFT 0.21.

A name selects a module by its whole path or as its last parts; a pattern must match the whole path.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from entrenar_gpu.adapters.pattern import full_match
from entrenar_gpu.adapters.peft_reader import PeftReader
from entrenar_gpu.config import EVERY_TARGET, TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.model import ModelConfig


@dataclass(frozen=True)
class ModuleSelection:
    """`target_modules` is a list of names, or a pattern for whole paths; "all-linear" stands for every projection."""

    target_modules: list[str] | str
    exclude_modules: list[str] | str = field(default_factory=list)
    layers: list[int] | None = None
    layers_patterns: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: PeftReader) -> ModuleSelection:
        """The keys of `adapter_config.json` that select modules."""
        targets = file.names("target_modules")
        layers = file.raw.get("layers_to_transform")
        layers_patterns = file.names("layers_pattern")
        if not targets:
            raise file.error("target_modules is missing or empty")
        if isinstance(targets, str) and (layers is not None or layers_patterns):
            raise file.error("layers_to_transform needs target_modules to be a list")
        if isinstance(layers_patterns, str):
            layers_patterns = [layers_patterns]
        for pattern in layers_patterns:
            file.pattern("layers_pattern", pattern)
        return cls(targets, file.names("exclude_modules"), file.layers(layers), layers_patterns)

    @property
    def is_all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def matches(self, path: str) -> bool:
        """Whether the module at `path`, a projection if `is_all_linear`, is selected."""
        targets = self.target_modules
        if _selects(self.exclude_modules, path):
            return False
        if self.is_all_linear:
            return True
        if not _selects(targets, path):
            return False
        # a whole path selects its module in whatever layer it is
        return self.layers is None or path in targets or self._layer_of(path) in self.layers

    def unmatched(self, paths: Collection[str]) -> list[tuple[str, str]]:
        """(key, name) of what `target_modules` and `exclude_modules` name and none of the paths answers to."""
        targets = [] if self.is_all_linear else self.target_modules
        return [
            (key, name)
            for key, names in (("target_modules", targets), ("exclude_modules", self.exclude_modules))
            for name in ([names] if isinstance(names, str) else names)
            if not any(_selects(name if isinstance(names, str) else [name], path) for path in paths)
        ]

    def _layer_of(self, path: str) -> int | None:
        """The first number in the path, behind one of `layers_patterns` where there are any."""
        for name in self.layers_patterns or [r"[^.]*"]:
            if found := full_match(rf"(?:.*?\.)?{name}\.(\d+)\..*", path):
                return int(found[1])
        return None


def _selects(names: list[str] | str, path: str) -> bool:
    if isinstance(names, str):
        return full_match(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def target_names(model: ModelConfig) -> list[str]:
    """What --target may choose from: the last part of the path of each module that takes an adapter."""
    return list(dict.fromkeys(spec.module.rpartition(".")[2] for spec in model.weights if spec.adaptable))


def chosen_targets(target: str, model: ModelConfig) -> list[str]:
    """The names of --target in full, in the order the modules run: q stands for q_proj, all for every one.

    Raises UserError naming the flag and the names that the model has.
    """
    known = target_names(model)
    names = {part.strip() for part in target.split(",") if part.strip()}
    if target == EVERY_TARGET or names in ({"all"}, {"all-linear"}):
        return known
    full = {name if name in known or name.endswith("_proj") else f"{name}_proj" for name in names}
    unknown = sorted(full - set(known))
    if any("vision" in name or "multi_modal" in name for name in unknown):
        raise UserError(f"--target: {unknown[0]}: of a model that also sees the language part alone is trained")
    if unknown or not full:
        raise UserError(f"--target: {', '.join(unknown) or 'empty'}; choose from {', '.join(known)}")
    return _in_order(full, known)


def chosen_layers(config: TrainConfig, model: ModelConfig) -> list[int] | None:
    """The layers that --layers or --layers-to-transform asks for; None where neither does.

    Raises UserError naming the flag and how many layers the model has.
    """
    count = len(model.layers)
    if config.layers is not None:
        if config.layers_to_transform is not None:
            raise UserError("--layers: give it or --layers-to-transform, not both")
        if config.layers > count:
            raise UserError(f"--layers: {config.layers} is more than the model's {count}")
        return list(range(count - config.layers, count))
    if config.layers_to_transform is None:
        return None
    if config.method == "full":
        raise UserError("--layers-to-transform: is for adapters; --method full takes --layers, the last ones")
    parts = [part.strip() for part in config.layers_to_transform.split(",")]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and int(part) < count)]
    if wrong:
        raise UserError(f"--layers-to-transform: {wrong[0][:20]!r} is not a layer of 0 to {count - 1}")
    return sorted({int(part) for part in parts})


def trained_weights(config: TrainConfig, model: ModelConfig) -> frozenset[str] | None:
    """Names of the weights that full training changes: all (None), or those of --layers and what stands above them."""
    layers = chosen_layers(config, model)
    if config.method != "full" or layers is None:
        return None
    below = tuple(f"{model.layer_path(index)}." for index in range(layers[0]))
    frozen = {model.embedding} | {spec.name for spec in model.weights if spec.name.startswith(below)}
    return frozenset(spec.name for spec in model.weights) - frozen


def _in_order(names: Iterable[str], known: list[str]) -> list[str]:
    return sorted(names, key=known.index)
