"""`config.json` as the families read it: values by key, checked, with errors that name file and key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from entrenar_gpu.errors import UserError

MOST_LAYERS = 10_000


class ConfigFile:
    """The decoded JSON of a model's configuration; `source` names it in errors. `family` is the one that reads it."""

    def __init__(self, raw: Mapping[str, Any], source: str, family: str) -> None:
        self.raw, self.source, self.family = raw, source, family

    def error(self, message: str) -> UserError:
        return UserError(f"{self.source}: {message}")

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        return int(self._number(key, default, whole=True))

    @property
    def num_layers(self) -> int:
        layers = self.count("num_hidden_layers")
        if layers > MOST_LAYERS:
            raise self.error(f"num_hidden_layers {layers} is above {MOST_LAYERS}")
        return layers

    def real(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        return float(self._number(key, default, whole=False))

    def flag(self, key: str) -> bool:
        """False where the key is missing."""
        return bool(self.raw.get(key, False))

    def refuse(self, *keys: str) -> None:
        """What would be computed wrongly is refused by name: none of these keys may say yes."""
        for key in keys:
            if self.raw.get(key):
                raise self.error(f"{key} is not supported")

    def _number(self, key: str, default: float | None, whole: bool) -> float:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"key {key!r} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (whole and value != int(value)):
            raise self.error(f"{key} must be a number, not {value!r}")
        if not 0 < value < 2**40 or not math.isfinite(value):
            raise self.error(f"{key} must be positive and finite, not {value!r}")
        return value
