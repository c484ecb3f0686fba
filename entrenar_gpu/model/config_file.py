"""`config.json` as the families read it: values by key, checked, with errors that name file and key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from entrenar_gpu.errors import UserError

MOST_LAYERS = 10_000
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, as `layer_types` has them
# Far above any model: of a side of a weight, of a head, and of a whole model's parameters.
MOST, MOST_HEAD_DIM, MOST_PARAMETERS = 2**24, 2**14, 2**44


class ConfigFile:
    """The decoded JSON of a model's configuration; `source` names it in errors. `family` is the one that reads it.

    `prefix` begins the names of the model's weights.
    """

    def __init__(self, raw: Mapping[str, Any], source: str, family: str, prefix: str = "model.") -> None:
        self.raw, self.source, self.family, self.prefix = raw, source, family, prefix

    def completed(self, **defaults: Any) -> ConfigFile:
        """With what the family's configuration class takes for keys that are missing."""
        return ConfigFile({**defaults, **self.raw}, self.source, self.family, self.prefix)

    def error(self, message: str) -> UserError:
        return UserError(f"{self.source}: {message}")

    def count(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """A whole number above 0."""
        return int(self.checked(key, self._given(key, default), most=most, whole=True))

    @property
    def num_layers(self) -> int:
        return self.count("num_hidden_layers", most=MOST_LAYERS)

    def real(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        return float(self.checked(key, self._given(key, default)))

    def flag(self, key: str) -> bool:
        """False where the key is missing."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, not {shown(value)}")
        return bool(value)

    def cap(self, key: str) -> float | None:
        """A soft cap, 0.001 at least so that its inverse is a number of f32 too; None where there is none."""
        if self.raw.get(key) is None:
            return None
        if self.real(key) < 1e-3:
            raise self.error(f"{key} {shown(self.raw[key])} is below 0.001")
        return self.real(key)

    def layer_kinds(self, default: Sequence[str]) -> Sequence[str]:
        """`layer_types`, one for each layer: full or sliding attention; `default` where the file has none."""
        kinds = self.raw.get("layer_types")
        kinds = default if kinds is None else kinds
        if not isinstance(kinds, (list, tuple)) or len(kinds) != self.num_layers:
            raise self.error(f"layer_types must be a list of {self.num_layers}, not {shown(kinds)}")
        for kind in kinds:
            if kind not in (FULL, SLIDING):
                raise self.error(f"layer_types: {shown(kind)} is not supported ({FULL} and {SLIDING} are)")
        return kinds

    def windows(self, default: Sequence[str]) -> list[int | None]:
        """The window of each layer, None where it sees everything before; `default` as for `layer_kinds`."""
        kinds = self.layer_kinds(default)
        window = self.window(None)
        return [window if kind == SLIDING else None for kind in kinds]

    def window(self, default: int | None) -> int | None:
        """The window of all layers: `default` without the key, none where it is null."""
        return None if self.raw.get("sliding_window", default) is None else self.count("sliding_window", default, 2**40)

    def refuse(self, *keys: str) -> None:
        """What would be computed wrongly is refused by name: none of these keys may say yes."""
        for key in keys:
            if self.raw.get(key):
                raise self.error(f"{key} is not supported")

    def checked(self, key: str, value: Any, most: float = 2**40, whole: bool = False) -> float:
        """A number above 0 and at most `most`, refused under its key otherwise."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(f"{key} must be a number, not {shown(value)}")
        if not 0 < value < math.inf:
            raise self.error(f"{key} must be positive and finite, not {shown(value)}")
        if value > most:
            raise self.error(f"{key} {shown(value)} is above {most}")
        if whole and value != int(value):
            raise self.error(f"{key} must be a whole number, not {shown(value)}")
        return value

    def _given(self, key: str, default: float | None) -> Any:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(f"key {key!r} is missing")
        return value


def shown(value: Any) -> str:
    """A value of the file in an error: cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
