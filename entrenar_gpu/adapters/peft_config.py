"""PEFT's `adapter_config.json`: which modules it selects, and with what rank and alpha.

The matching rules are those of PEFT 0.21: a name selects a module by its whole path or as its last parts; a pattern
must match the whole path. Whatever would change the computation and is not done here is refused by its key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrenar_gpu.errors import UserError
from entrenar_gpu.files import read_json_object

HONOURED = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
}

# Where the adapter comes from and how it was once started: nothing that changes what its stored tensors mean.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "lora_ga_config",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}

# Keys of which one value, the usual one, is understood. Other starts than these change the base weights as well.
EXPECTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class PeftSelection:
    """The modules that an adapter is for. `target_modules` is a list of names, or a pattern for whole paths."""

    rank: int
    alpha: float
    target_modules: list[str] | str
    use_rslora: bool = False
    dropout: float = 0.0
    exclude_modules: list[str] | str = field(default_factory=list)
    layers: list[int] | None = None
    layers_patterns: list[str] = field(default_factory=list)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def matches(self, path: str) -> bool:
        """Whether the module at `path` is selected."""
        targets = self.target_modules
        if _selects(self.exclude_modules, path):
            return False
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return path.endswith("_proj")
        if not _selects(targets, path):
            return False
        # a whole path selects its module in whatever layer it is
        return self.layers is None or path in targets or self._layer_of(path) in self.layers

    def rank_of(self, path: str) -> int:
        return int(_first_match(self.rank_pattern, path, self.rank))

    def alpha_of(self, path: str) -> float:
        return float(_first_match(self.alpha_pattern, path, self.alpha))

    def _layer_of(self, path: str) -> int | None:
        """The first number in the path, behind one of `layers_patterns` where there are any."""
        for name in self.layers_patterns or [r"[^.]*"]:
            if found := re.match(rf"(?:.*?\.)?{name}\.(\d+)\.", path):
                return int(found[1])
        return None


def _selects(names: list[str] | str, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the path, from a dot on."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path))
    return next(found, default)


def read_peft_config(path: Path) -> PeftSelection:
    """Raises UserError naming the file and the key that is malformed or not supported."""
    raw = read_json_object(path, missing="an adapter folder holds it")
    _refuse_unsupported(raw, path)
    return _Reader(raw, path).selection()


def _refuse_unsupported(raw: dict[str, Any], path: Path) -> None:
    for key, value in raw.items():
        if key in EXPECTED:
            supported = any(value is known or (isinstance(known, str) and value == known) for known in EXPECTED[key])
        else:
            supported = key in HONOURED or key in HARMLESS or not value
        if not supported:
            raise UserError(f"{path}: {key} {json.dumps(value)[:80]} is not supported")
    if raw.get("peft_type") is None:
        raise UserError(f"{path}: peft_type is missing; only LORA is supported")


class _Reader:
    """Typed access to the honoured keys."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path

    def selection(self) -> PeftSelection:
        targets = self.names("target_modules")
        layers = self.raw.get("layers_to_transform")
        layers_patterns = self.names("layers_pattern")
        if not targets:
            raise UserError(f"{self.path}: target_modules is missing or empty")
        if isinstance(targets, str) and (layers is not None or layers_patterns):
            raise UserError(f"{self.path}: layers_to_transform needs target_modules to be a list")
        if isinstance(layers_patterns, str):
            layers_patterns = [layers_patterns]
        for pattern in layers_patterns:
            self.pattern("layers_pattern", pattern)
        rslora = self.raw.get("use_rslora") or False
        self.need(isinstance(rslora, bool), "use_rslora", "true or false")
        return PeftSelection(
            rank=self.rank("r", self.raw.get("r", 8)),
            alpha=self.number("lora_alpha", self.raw.get("lora_alpha", 8)),
            target_modules=targets,
            use_rslora=rslora,
            dropout=self.dropout(),
            exclude_modules=self.names("exclude_modules"),
            layers=self.layers(layers),
            layers_patterns=layers_patterns,
            rank_pattern={key: self.rank("rank_pattern", value) for key, value in self.patterns("rank_pattern")},
            alpha_pattern={key: self.number("alpha_pattern", value) for key, value in self.patterns("alpha_pattern")},
        )

    def need(self, holds: bool, key: str, what: str) -> None:
        if not holds:
            raise UserError(f"{self.path}: {key} must be {what}, not {json.dumps(self.raw.get(key))[:80]}")

    def rank(self, key: str, value: Any) -> int:
        self.need(type(value) is int and 0 < value < 2**20, key, "a whole number above 0")
        return int(value)

    def number(self, key: str, value: Any) -> float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
        self.need(ok and math.isfinite(value), key, "a number")
        return float(value)

    def dropout(self) -> float:
        value = self.number("lora_dropout", self.raw.get("lora_dropout") or 0.0)
        self.need(0 <= value < 1, "lora_dropout", "at least 0 and below 1")
        return value

    def layers(self, value: Any) -> list[int] | None:
        """Layer indices; None and an empty list select every layer."""
        values = [value] if type(value) is int else value
        self.need(
            values is None or (isinstance(values, list) and all(type(v) is int for v in values)),
            "layers_to_transform",
            "a layer index or a list of them",
        )
        return values or None

    def names(self, key: str) -> list[str] | str:
        """A list of names, or one pattern, checked to be a regular expression."""
        value = self.raw.get(key) or []
        if isinstance(value, str):
            return self.pattern(key, value)
        self.need(isinstance(value, list) and all(isinstance(v, str) for v in value), key, "text or a list of names")
        return list(value)

    def pattern(self, key: str, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{self.path}: {key} {value[:80]!r} is not a regular expression: {error}") from None
        return value

    def patterns(self, key: str) -> list[tuple[str, Any]]:
        value = self.raw.get(key) or {}
        self.need(isinstance(value, dict), key, "an object")
        return [(self.pattern(key, pattern), number) for pattern, number in value.items()]
