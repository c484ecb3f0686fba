"""Rotary position embedding: the frequencies of a model, and what its config.json says of them.

A scaling changes the frequencies that theta gives, to reach beyond the positions that a model was first trained for;
each is a class of its own, with its paper. Frequencies are radians per position, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from entrenar_gpu import ops
from entrenar_gpu.model.config_file import ConfigFile, shown


class Scaling(Protocol):
    """A change to the frequencies of a rope in rows of so many positions."""

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by, and so queries and keys."""

    def scaled(self, rope: Rope, positions: int) -> list[float]:
        """The frequencies in place of `rope.base()`."""

    def reach(self, positions: int) -> int:
        """The longest row that it is for, in a model whose file says so many `positions`."""


class _WithinPositions:
    """A scaling of files whose `max_position_embeddings` is what it reaches."""

    def reach(self, positions: int) -> int:
        return positions


@dataclass(frozen=True)
class Rope:
    """The rotation of the first `rotary_dim` columns of each head by their positions.

    Pairs are (i, i + rotary_dim / 2), or (2i, 2i + 1) if `interleaved`. With `growth` (beta, original) what is rotated
    is also multiplied by 1 + beta log(1 + floor(position / original)): Llama 4's, which Ministral 3 has for queries.
    """

    rotary_dim: int
    theta: float
    scaling: Scaling | None = None
    interleaved: bool = False
    growth: tuple[float, int] | None = None

    def base(self, theta: float | None = None) -> list[float]:
        """theta^(-2i / rotary_dim): RoFormer (arXiv 2104.09864), equation 15."""
        return [(theta or self.theta) ** (-2.0 * i / self.rotary_dim) for i in range(self.rotary_dim // 2)]

    def frequencies(self, positions: int) -> list[float]:
        """Angular frequency of each of the rotary_dim / 2 pairs, in rows of so many positions."""
        return self.base() if self.scaling is None else self.scaling.scaled(self, positions)

    def table(self, positions: int) -> np.ndarray:
        """f32 [positions, rotary_dim], as `ops.rope` reads it."""
        factor = 1.0 if self.scaling is None else self.scaling.attention_factor
        table = ops.rope_table(self.frequencies(positions), positions, factor)
        if self.growth is None:
            return table
        beta, original = self.growth
        grown = 1 + beta * np.log1p(np.arange(positions) // original)
        return (table * grown[:, None]).astype(np.float32)

    @classmethod
    def of_queries(cls, file: ConfigFile, rope: Rope | None) -> Rope | None:
        """`rope` as it is for queries, where the file lets them grow."""
        parameters = _parameters(file, None)
        if rope is None or parameters.get("llama_4_scaling_beta") is None:
            return None
        given = _Reader(file, parameters, rope.rotary_dim, 1.0, rope.theta)
        return replace(rope, growth=(given.number("llama_4_scaling_beta"), given.original()))

    @classmethod
    def read(
        cls,
        file: ConfigFile,
        head_dim: int,
        kind: str | None = None,
        interleaved: bool = False,
        theta: float = 10000.0,
        share: float | None = None,
    ) -> Rope:
        """Rotary base and scaling, in the old layout (`rope_theta`, `rope_scaling`) or the new (`rope_parameters`).

        Of a file whose parameters differ by the `kind` of layer ("full_attention", "sliding_attention"), that kind's.
        `theta` and `share`, the part of a head that is rotated, are the family's where the file gives none. A family
        without a `share` rotates whole heads, as transformers does whatever its file says; another part is refused.
        """
        parameters = _parameters(file, kind)
        raw = file.raw
        theta = float(file.checked("rope_theta", _first(parameters.get("rope_theta"), raw.get("rope_theta"), theta)))
        given = _first(parameters.get("partial_rotary_factor"), raw.get("partial_rotary_factor"), share)
        part = file.checked("partial_rotary_factor", given or 1.0, most=1)
        name = _first(parameters.get("rope_type"), parameters.get("type"), "default")
        if not isinstance(name, str) or name not in SCALINGS:
            raise file.error(f"rope scaling {shown(name)} is not supported; supported: {', '.join(SCALINGS)}")
        rotary_dim = head_dim if name == "proportional" else int(head_dim * part)
        if rotary_dim % 2 or rotary_dim < 2:
            raise file.error(f"partial_rotary_factor {shown(part)} of heads of {head_dim} leaves no pairs")
        if rotary_dim < head_dim and share is None:
            raise file.error(f"partial_rotary_factor {shown(part)}: models of this family rotate whole heads")
        return cls(rotary_dim, theta, SCALINGS[name](_Reader(file, parameters, rotary_dim, part, theta)), interleaved)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _parameters(file: ConfigFile, kind: str | None) -> dict[str, Any]:
    """The object that describes the rotation of a kind of layer."""
    parameters = _first(file.raw.get("rope_parameters"), file.raw.get("rope_scaling"), {})
    if isinstance(parameters, dict) and kind is not None and isinstance(parameters.get(kind), dict):
        parameters = parameters[kind]
    if not isinstance(parameters, dict):
        raise file.error(f"rope_scaling must be an object, not {shown(parameters)}")
    return parameters


@dataclass(frozen=True)
class _Reader:
    """What scalings read of: the object that describes them and the file around it."""

    file: ConfigFile
    parameters: dict[str, Any]
    rotary_dim: int
    share: float
    theta: float

    def number(self, key: str, default: float | None = None) -> float:
        value = _first(self.parameters.get(key), default)
        if value is None:
            raise self.file.error(f"rope_scaling lacks {key!r}")
        return float(self.file.checked(f"rope_scaling.{key}", value))

    def perhaps(self, key: str) -> float | None:
        return None if self.parameters.get(key) is None else self.number(key)

    def original(self, of_file: bool = False) -> int:
        """Positions that the model was first trained for; `of_file`: said beside the object, as Phi's files have it."""
        key = "original_max_position_embeddings"
        value = _first(self.file.raw.get(key) if of_file else None, self.parameters.get(key))
        value = value if value is not None else self.file.count("max_position_embeddings", most=2**40)
        return int(self.file.checked(f"rope_scaling.{key}", value, most=2**40, whole=True))

    def factors(self, key: str) -> tuple[float, ...]:
        """A number for each pair."""
        values, pairs = self.parameters.get(key), self.rotary_dim // 2
        if not isinstance(values, list) or len(values) != pairs:
            raise self.file.error(f"rope_scaling.{key} must be a list of {pairs} numbers, not {shown(values)}")
        return tuple(float(self.file.checked(f"rope_scaling.{key}", value)) for value in values)


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al., arXiv 2306.15595)."""

    factor: float
    attention_factor = 1.0

    def scaled(self, rope: Rope, positions: int) -> list[float]:
        return [frequency / self.factor for frequency in rope.base()]

    def reach(self, positions: int) -> int:
        return max(positions, int(self.factor * positions))

    @classmethod
    def read(cls, given: _Reader) -> LinearScaling:
        return cls(given.number("factor"))


@dataclass(frozen=True)
class DynamicScaling:
    """A theta that grows with the row beyond `original` positions (the NTK-aware scaling of arXiv 2309.00071, 3.3)."""

    factor: float
    original: int
    attention_factor = 1.0

    def scaled(self, rope: Rope, positions: int) -> list[float]:
        stretch = self.factor * max(positions, self.original) / self.original - (self.factor - 1)
        return rope.base(rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2)))

    def reach(self, positions: int) -> int:
        return max(positions, int(self.factor * self.original))

    @classmethod
    def read(cls, given: _Reader) -> DynamicScaling:
        if given.rotary_dim < 4:
            raise given.file.error("rope scaling 'dynamic' needs two pairs to rotate")
        return cls(given.number("factor"), given.file.count("max_position_embeddings", most=2**40))


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv 2309.00071): pairs that turn more than `beta_fast` times within the `original` positions
    are kept, those that turn less than `beta_slow` times are divided by `factor`, and those between are blended; with
    `whole` the bounds are whole pairs."""

    factor: float
    original: int
    beta_fast: float
    beta_slow: float
    whole: bool
    attention_factor: float

    def scaled(self, rope: Rope, positions: int) -> list[float]:
        kept_to, divided_from = self._bounds(rope)
        span = max(divided_from - kept_to, 1e-3)
        blended = []
        for pair, frequency in enumerate(rope.base()):
            divided = min(1.0, max(0.0, (pair - kept_to) / span))
            blended.append(frequency * (1.0 - divided + divided / self.factor))
        return blended

    def reach(self, positions: int) -> int:
        return max(positions, int(self.factor * self.original))

    def _bounds(self, rope: Rope) -> tuple[float, float]:
        def pair_of(turns: float) -> float:
            """The pair that turns so often within the original positions (equation 17)."""
            return rope.rotary_dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.whole:
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, rope.rotary_dim - 1)

    @classmethod
    def read(cls, given: _Reader) -> YarnScaling:
        if given.theta <= 1:
            raise given.file.error(f"rope_theta {given.theta} is not above 1, as yarn needs it")
        factor = given.number("factor")
        return cls(
            factor,
            given.original(),
            given.number("beta_fast", 32),
            given.number("beta_slow", 1),
            given.parameters.get("truncate", True) is not False,
            _yarn_attention(given, factor),
        )


def yarn_temperature(factor: float, weight: float = 1.0) -> float:
    """The temperature of equation 22, as queries and keys share it."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_attention(given: _Reader, factor: float) -> float:
    """That temperature, unless the file says another; DeepSeek's give two weights of it."""
    said, above, below = (given.perhaps(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if said is not None:
        return said
    if above and below:
        return yarn_temperature(factor, above) / yarn_temperature(factor, below)
    return yarn_temperature(factor)


@dataclass(frozen=True)
class LongRopeScaling(_WithinPositions):
    """LongRoPE (Ding et al., arXiv 2402.13753): each frequency divided by a factor of its own, one of `short` in rows
    of up to `original` positions and of `long` in longer ones."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    attention_factor: float

    def scaled(self, rope: Rope, positions: int) -> list[float]:
        factors = self.long if positions > self.original else self.short
        return [frequency / factor for frequency, factor in zip(rope.base(), factors, strict=True)]

    @classmethod
    def read(cls, given: _Reader) -> LongRopeScaling:
        original = given.original(of_file=True)
        if original < 2:
            raise given.file.error("rope_scaling.original_max_position_embeddings of longrope must be 2 at least")
        factor = given.perhaps("factor")
        if factor is None:
            factor = given.file.count("max_position_embeddings", most=2**40) / original
        attention = given.perhaps("attention_factor")
        if attention is None:
            attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return cls(given.factors("short_factor"), given.factors("long_factor"), original, attention)


@dataclass(frozen=True)
class RopeScaling(_WithinPositions):
    """Llama 3.1's: wavelengths shorter than original / high_freq_factor are kept, longer than original /
    low_freq_factor are divided by `factor`, and those between are blended linearly in original / wavelength."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @property
    def attention_factor(self) -> float:
        return 1.0

    def scaled(self, rope: Rope, positions: int) -> list[float]:
        span = self.high_freq_factor - self.low_freq_factor
        scaled = []
        for frequency in rope.base():
            wavelength = 2 * math.pi / frequency
            turns = self.original_max_position_embeddings / wavelength
            kept = min(1.0, max(0.0, (turns - self.low_freq_factor) / span))
            scaled.append(frequency * (kept + (1.0 - kept) / self.factor))
        return scaled

    @classmethod
    def read(cls, given: _Reader) -> RopeScaling:
        scaling = cls(
            factor=given.number("factor"),
            low_freq_factor=given.number("low_freq_factor"),
            high_freq_factor=given.number("high_freq_factor"),
            original_max_position_embeddings=given.original(),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise given.file.error("rope_scaling.high_freq_factor must exceed low_freq_factor")
        return scaling


@dataclass(frozen=True)
class ProportionalScaling(_WithinPositions):
    """Heads rotated in their first `pairs` alone, at the frequencies that a whole head would have there, divided by
    `factor` (Gemma 4)."""

    pairs: int
    factor: float
    attention_factor = 1.0

    def scaled(self, rope: Rope, positions: int) -> list[float]:
        return [f / self.factor if pair < self.pairs else 0.0 for pair, f in enumerate(rope.base())]

    @classmethod
    def read(cls, given: _Reader) -> ProportionalScaling:
        return cls(int(given.share * given.rotary_dim // 2), given.number("factor", 1.0))


# By `rope_type` of config.json.
SCALINGS: dict[str, Callable[[_Reader], Scaling | None]] = {
    "default": lambda given: None,
    "linear": LinearScaling.read,
    "dynamic": DynamicScaling.read,
    "yarn": YarnScaling.read,
    "longrope": LongRopeScaling.read,
    "su": LongRopeScaling.read,  # as files of Phi-3 called it at first
    "llama3": RopeScaling.read,
    "proportional": ProportionalScaling.read,
}
