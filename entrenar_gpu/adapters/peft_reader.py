"""Typed access to the keys of an `adapter_config.json`, with errors that name file and key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrenar_gpu.adapters.pattern import check_pattern
from entrenar_gpu.errors import UserError


class PeftReader:
    """The decoded JSON of the file at `path`."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path

    def error(self, message: str) -> UserError:
        return UserError(f"{self.path}: {message}")

    def need(self, holds: bool, key: str, what: str) -> None:
        if not holds:
            raise self.error(f"{key} must be {what}, not {json.dumps(self.raw.get(key))[:80]}")

    def rank(self, key: str, value: Any) -> int:
        self.need(type(value) is int and 0 < value < 2**20, key, "a whole number above 0")
        return int(value)

    def number(self, key: str, value: Any) -> float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
        self.need(ok and math.isfinite(value), key, "a number")
        return float(value)

    def dropout(self) -> float:
        given = self.raw.get("lora_dropout")
        value = self.number("lora_dropout", 0.0 if given is None else given)
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

    def tokens(self) -> dict[str, list[int]]:
        """`trainable_token_indices`: token ids by module; a list alone is the embedding's."""
        key, value = "trainable_token_indices", self.raw.get("trainable_token_indices") or {}
        value = {"embed_tokens": value} if isinstance(value, list) else value
        self.need(isinstance(value, dict), key, "a list of token ids, or such lists by module")
        for name, ids in value.items():
            whole = isinstance(ids, list) and bool(ids) and all(type(i) is int and 0 <= i < 2**32 for i in ids)
            self.need(
                whole and len(set(ids)) == len(ids), key, "a list of token ids, each once, or such lists by module"
            )
            if name.rpartition(".")[2] not in ("embed_tokens", "lm_head"):
                raise self.error(f"{key} {name[:80]!r} is not supported; embed_tokens and lm_head are")
        return dict(value)

    def pattern(self, key: str, value: str) -> str:
        try:
            check_pattern(value)
        except ValueError as error:
            raise self.error(f"{key} {value[:80]!r} is not a regular expression: {error}") from None
        return value

    def patterns(self, key: str) -> list[tuple[str, Any]]:
        value = self.raw.get(key) or {}
        self.need(isinstance(value, dict), key, "an object")
        return [(self.pattern(key, pattern), number) for pattern, number in value.items()]
