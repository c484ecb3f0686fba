"""Rotary position embedding: the frequencies of a model, and what its config.json says of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from entrenar_gpu.model.config_file import ConfigFile, shown


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Rope:
    """The rotation of heads of `head_dim` by their positions."""

    head_dim: int
    theta: float
    scaling: RopeScaling | None = None

    def frequencies(self) -> list[float]:
        """Angular frequency of each of the E/2 rotary pairs, radians per position, in float64.

        RoFormer (arXiv 2104.09864) equation 15; with `scaling`, Llama 3.1's three bands: wavelengths shorter
        than original/high_freq_factor are kept, longer than original/low_freq_factor are divided by `factor`, and
        those between are blended linearly in original/wavelength.
        """
        base = [self.theta ** (-2.0 * i / self.head_dim) for i in range(self.head_dim // 2)]
        scaling = self.scaling
        if scaling is None:
            return base
        span = scaling.high_freq_factor - scaling.low_freq_factor
        scaled = []
        for frequency in base:
            wavelength = 2 * math.pi / frequency
            turns = scaling.original_max_position_embeddings / wavelength
            kept = min(1.0, max(0.0, (turns - scaling.low_freq_factor) / span))
            scaled.append(frequency * (kept + (1.0 - kept) / scaling.factor))
        return scaled

    @classmethod
    def read(cls, file: ConfigFile, head_dim: int) -> Rope:
        """Rotary base and scaling, in the old layout (`rope_theta`, `rope_scaling`) or the new (`rope_parameters`)."""
        raw = file.raw
        parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(parameters, dict):
            raise file.error(f"rope_scaling must be an object, not {shown(parameters)}")
        theta = file.checked("rope_theta", parameters.get("rope_theta", raw.get("rope_theta", 10000.0)))
        if parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 0, 1):
            raise file.error("partial_rotary_factor is not supported")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise file.error(f"rope scaling {shown(kind)} is not supported (default and llama3 are)")
        return cls(head_dim, float(theta), _llama3(file, parameters) if kind == "llama3" else None)


def _llama3(file: ConfigFile, parameters: dict[str, Any]) -> RopeScaling:
    def number(key: str) -> float:
        if parameters.get(key) is None:
            raise file.error(f"rope_scaling lacks {key!r}")
        return float(file.checked(f"rope_scaling.{key}", parameters[key]))

    original = parameters.get("original_max_position_embeddings") or file.count("max_position_embeddings", most=2**40)
    scaling = RopeScaling(
        factor=number("factor"),
        low_freq_factor=number("low_freq_factor"),
        high_freq_factor=number("high_freq_factor"),
        original_max_position_embeddings=int(
            file.checked("rope_scaling.original_max_position_embeddings", original, whole=True)
        ),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise file.error("rope_scaling.high_freq_factor must exceed low_freq_factor")
    return scaling
