"""LoRA's `adapter_config.json` in PEFT's words, read and written.

Whatever would change the computation and is not done here is refused by its key.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from entrenar_gpu.adapters.lora.module import LoraModule
from entrenar_gpu.adapters.pattern import full_match
from entrenar_gpu.adapters.peft_reader import PeftReader
from entrenar_gpu.adapters.selection import ModuleSelection
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.model import WeightSpec

_Module = TypeVar("_Module", bound=LoraModule)

HONOURED = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "trainable_token_indices",
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
class LoraConfig:
    """What the modules of an adapter get: rank and alpha, by module where patterns say so."""

    rank: int
    alpha: float
    use_rslora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_options(cls, config: TrainConfig) -> LoraConfig:
        """What --rank, --alpha, --rslora and --dropout ask for."""
        return cls(config.rank, config.lora_alpha, config.rslora, config.dropout)

    def module(self, spec: WeightSpec, kind: type[_Module]) -> _Module:
        """The adapter of a weight's module, of the `kind` that such a module has."""
        rank = int(_first_match(self.rank_pattern, spec.module, self.rank))
        alpha = float(_first_match(self.alpha_pattern, spec.module, self.alpha))
        out_features, in_features = reversed(spec.shape) if spec.kind == "embedding" else spec.shape
        return kind(spec.module, in_features, out_features, rank, alpha, self.use_rslora)

    def unmatched(self, paths: Collection[str]) -> list[tuple[str, str]]:
        """(key, pattern) of the patterns for ranks and alphas that match none of the adapter's modules."""
        return [
            (key, pattern)
            for key, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            for pattern in patterns
            if not any(_matches(pattern, path) for path in paths)
        ]


def _first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in patterns.items() if _matches(pattern, path)), default)


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches the end of the path, from a dot on."""
    return full_match(rf"(.*\.)?({pattern})", path) is not None


def read_peft_config(file: PeftReader) -> tuple[ModuleSelection, LoraConfig]:
    """Raises UserError naming the file and the key that is malformed or not supported."""
    _refuse_unsupported(file)
    selection = ModuleSelection.read(file)
    rslora = file.raw.get("use_rslora") or False
    file.need(isinstance(rslora, bool), "use_rslora", "true or false")
    config = LoraConfig(
        rank=file.rank("r", file.raw.get("r", 8)),
        alpha=file.number("lora_alpha", file.raw.get("lora_alpha", 8)),
        use_rslora=rslora,
        dropout=file.dropout(),
        rank_pattern={key: file.rank("rank_pattern", value) for key, value in file.patterns("rank_pattern")},
        alpha_pattern={key: file.number("alpha_pattern", value) for key, value in file.patterns("alpha_pattern")},
    )
    return selection, config


def _refuse_unsupported(file: PeftReader) -> None:
    method = file.raw.get("peft_type")  # before what another method is told by
    if method not in EXPECTED["peft_type"]:
        said = "is missing" if method is None else f"{json.dumps(method)[:80]} is not supported"
        raise file.error(f"peft_type {said}; only LORA is supported")
    for key, value in file.raw.items():
        if key in EXPECTED:
            supported = any(value is known or (isinstance(known, str) and value == known) for known in EXPECTED[key])
        else:
            supported = key in HONOURED or key in HARMLESS or not value
        if not supported:
            raise file.error(f"{key} {json.dumps(value)[:80]} is not supported")


def peft_config(modules: Sequence[LoraModule]) -> dict[str, Any]:
    """LoRA's keys. Modules that differ from the most frequent rank or alpha go in patterns."""
    rank = Counter(module.rank for module in modules).most_common(1)[0][0]
    alpha = Counter(module.alpha for module in modules).most_common(1)[0][0]
    # PEFT matches pattern keys as regular expressions; a dot in a path matches itself, and nothing else fits there
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "use_rslora": modules[0].use_rslora,
        "bias": "none",
        "rank_pattern": {module.path: module.rank for module in modules if module.rank != rank},
        "alpha_pattern": {module.path: _plain(module.alpha) for module in modules if module.alpha != alpha},
    }


def _plain(number: float) -> float:
    """A whole number without its fraction: PEFT declares lora_alpha as int."""
    return int(number) if number == int(number) else number
