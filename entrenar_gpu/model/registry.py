"""Which family a `config.json` belongs to: the files of families/, each named as its `model_type`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from entrenar_gpu.config import SHAPES, shape_file
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import read_json_object
from entrenar_gpu.model import families
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile, shown
from entrenar_gpu.model.refusals import refuse

# Models that also see, by what begins the names of their language part's weights: that part is trained, the rest stays
# as it is.
SEEING = {
    "Gemma3ForConditionalGeneration": "model.language_model.",
    "Mistral3ForConditionalGeneration": "model.language_model.",
}


class Family(Protocol):
    """What a file of families/ holds."""

    ARCHITECTURES: tuple[str, ...]  # as `architectures` of config.json calls them

    @staticmethod
    def read(file: ConfigFile) -> ModelConfig:
        """The model that a config.json describes; refuses by key what would be computed wrongly."""


@cache
def known_families() -> dict[str, Family]:
    """Every family by its name."""
    names = [module.name for module in pkgutil.iter_modules(families.__path__)]
    return {name: importlib.import_module(f"{families.__name__}.{name}") for name in names}  # type: ignore[misc]


def load_model_config(path: str | Path) -> ModelConfig:
    """Read `config.json` (or the folder that holds it).

    Raises UserError naming the file and key when the file is missing or malformed, the architecture unknown, or the
    model uses something this trainer does not compute (experts, other rope scalings, other activations, ...).
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    return parse_model_config(read_json_object(path), source=str(path))


def parse_model_config(raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """The same, from the decoded JSON; `source` names it in errors."""
    refuse(raw, source)
    if (prefix := _language_prefix(raw)) is not None:
        text = raw["text_config"]
        kind = str(text.get("model_type") or raw.get("model_type")).removesuffix("_text")
        name = _family({"model_type": kind}, source)
        tied = {"tie_word_embeddings": raw.get("tie_word_embeddings", True)}
        return known_families()[name].read(ConfigFile({**tied, **text}, source, name, prefix))
    name = _family(raw, source)
    if isinstance(raw.get("text_config"), dict) and not raw.get("architectures"):
        raise UserError(f"{source}: text_config is not supported without architectures, which name its model")
    return known_families()[name].read(ConfigFile(raw, source, name))


def _language_prefix(raw: dict[str, Any]) -> str | None:
    """What begins the names of the language part's weights, of a model that also sees; None for other models."""
    names = raw.get("architectures")
    if not isinstance(raw.get("text_config"), dict) or not isinstance(names, list):
        return None
    return next((SEEING[name] for name in names if isinstance(name, str) and name in SEEING), None)


def model_shape(name: str) -> ModelConfig:
    """The configuration of a named shape. Raises UserError naming the flag and the shapes there are."""
    shape_file(name)
    return parse_model_config(SHAPES[name], source=name)


def _family(raw: dict[str, Any], source: str) -> str:
    """The name of the family, by `architectures`, or where there are none by `model_type`."""
    names, known = raw.get("architectures") or [], known_families()
    if not isinstance(names, list):
        raise UserError(f"{source}: architectures must be a list, not {shown(names)}")
    by_architecture = {key: name for name, family in known.items() for key in family.ARCHITECTURES}
    for name in names:
        if isinstance(name, str) and name in by_architecture:
            return by_architecture[name]
    model_type = raw.get("model_type")
    if not names and isinstance(model_type, str) and model_type in known:
        return model_type
    raise UserError(
        f"{source}: architecture {shown(', '.join(map(str, names)) or model_type)} is not supported;"
        f" supported: {', '.join(sorted([*by_architecture, *SEEING]))}"
    )
