"""Which modules an adapter is for, by the matching rules of PEFT 0.21.

A name selects a module by its whole path or as its last parts; a pattern must match the whole path.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from entrenar_gpu.adapters.pattern import full_match
from entrenar_gpu.adapters.peft_reader import PeftReader
from entrenar_gpu.config import EVERY_TARGET, TrainConfig, flag
from entrenar_gpu.errors import UserError
from entrenar_gpu.model import ModelConfig

TABLES = ("embed_tokens", "lm_head")  # what modules over the vocabulary are called


@dataclass(frozen=True)
class ModuleSelection:
    """`target_modules` is a list of names, or a pattern for whole paths; "all-linear" stands for every projection.

    `saved` and `tokens` are the tables of `modules_to_save` and `trainable_token_indices`, by the ends of their paths.
    """

    target_modules: list[str] | str
    exclude_modules: list[str] | str = field(default_factory=list)
    layers: list[int] | None = None
    layers_patterns: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    tokens: Mapping[str, list[int]] = field(default_factory=dict)

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
        layers = file.layers(layers)
        return cls(targets, file.names("exclude_modules"), layers, layers_patterns, _saved(file), file.tokens())

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


def _saved(file: PeftReader) -> list[str]:
    """The names in `modules_to_save`: of tables alone."""
    names = file.names("modules_to_save")
    file.need(isinstance(names, list), "modules_to_save", "a list of names")
    others = [name for name in names if name.rpartition(".")[2] not in TABLES]
    if others:
        raise file.error(f"modules_to_save {others[0][:80]!r} is not supported; {' and '.join(TABLES)} are")
    return list(names)


def target_names(model: ModelConfig) -> list[str]:
    """What --target may choose from: the last part of the path of each module that takes an adapter."""
    return list(dict.fromkeys(spec.module.rpartition(".")[2] for spec in model.weights if spec.adaptable))


def chosen_targets(target: str, model: ModelConfig) -> list[str]:
    """The names of --target in full, in the order the modules run: q stands for q_proj, all for every one.

    Raises UserError naming the flag and the names that the model has.
    """
    projections = target_names(model)
    known = [*projections, *TABLES]
    names = {part.strip() for part in target.split(",") if part.strip()}
    every = names & {"all", "all-linear"}
    if target == EVERY_TARGET or (every and names == every):
        return projections
    named = (name if name in known or name.endswith("_proj") else f"{name}_proj" for name in names - every)
    full = {*named, *(projections if every else ())}
    unknown = sorted(full - set(known))
    if any("vision" in name or "multi_modal" in name for name in unknown):
        raise UserError(f"--target: {unknown[0]}: of a model that also sees the language part alone is trained")
    if unknown or not full:
        raise UserError(f"--target: {', '.join(unknown) or 'empty'}; choose from {', '.join(known)}")
    return _in_order(full, known)


def chosen_tables(config: TrainConfig, model: ModelConfig) -> list[str]:
    """What --modules-to-save names. Raises UserError for a module that is not trained as a whole."""
    names = [part.strip() for part in (config.modules_to_save or "").split(",") if part.strip()]
    if wrong := [name for name in names if name not in TABLES]:
        raise UserError(f"--modules-to-save: {wrong[0][:80]!r} is not one of {', '.join(TABLES)}")
    _only_beside_adapters(config, "modules_to_save", bool(names))
    return names


def chosen_tokens(config: TrainConfig, model: ModelConfig) -> dict[str, list[int]]:
    """What --trainable-token-indices names, as PEFT's mapping. Raises UserError for what is not a token."""
    parts = [part.strip() for part in (config.trainable_token_indices or "").split(",") if part.strip()]
    wrong = [part for part in parts if not _is_index(part, model.vocab_size)]
    if wrong:
        count = model.vocab_size
        raise UserError(f"--trainable-token-indices: {wrong[0][:20]!r} is not a token of 0 to {count - 1}")
    if len({int(part) for part in parts}) != len(parts):
        raise UserError("--trainable-token-indices: a token is there twice")
    _only_beside_adapters(config, "trainable_token_indices", bool(parts))
    return {TABLES[0]: [int(part) for part in parts]} if parts else {}


def _only_beside_adapters(config: TrainConfig, name: str, asked: bool) -> None:
    if asked and config.method == "full":
        raise UserError(f"{flag(name)}: is for adapters; --method full trains every weight")


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
    wrong = [part for part in parts if not _is_index(part, count)]
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


def _is_index(text: str, count: int) -> bool:
    """Whether a text is a whole number of 0 to count - 1; Python reads no number of thousands of digits."""
    return text.isascii() and text.isdigit() and len(text) < 20 and int(text) < count


def _in_order(names: Iterable[str], known: list[str]) -> list[str]:
    return sorted(names, key=known.index)
