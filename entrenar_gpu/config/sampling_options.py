"""How text is drawn from a model, declared once: flags, fields of HTTP requests and arguments in Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from entrenar_gpu.config.options import MOST, Options, option
from entrenar_gpu.errors import UserError, naming_arguments

MOST_STOPS, LONGEST_STOP = 16, 1000
MOST_BIASES, LARGEST_BIAS = 1024, 100.0


@dataclass(frozen=True)
class SamplingOptions(Options):
    """How the tokens of one request are drawn; `infer/sampling.py` has the definitions.

    `stop` are texts that end the answer and are not part of it. `logit_bias` is added to the logits of token ids, as
    in OpenAI's interface. With a `seed` of None every call draws another text. Raises UserError naming the option that
    is out of bounds.
    """

    max_tokens: int = option(128, "longest continuation", "tokens", low=1, high=MOST)
    temperature: float = option(0.0, "divides the logits; 0: always the most likely token", low=0, high=100)
    top_k: int = option(0, "draw from the K most likely tokens only; 0: from all", "tokens", low=0, high=MOST)
    top_p: float = option(
        1.0, "draw from the most likely tokens that together reach this probability", "probability", 0, 1
    )
    min_p: float = option(
        0.0, "leave out tokens less probable than this share of the most likely one's", "probability", 0, 1
    )
    repetition_penalty: float = option(
        1.0, "divides positive and multiplies negative logits of tokens in prompt and answer", low=1e-3, high=1e3
    )
    presence_penalty: float = option(
        0.0, "subtracted from the logits of tokens that are in the answer", low=-100, high=100
    )
    frequency_penalty: float = option(
        0.0, "subtracted from a token's logit for each time it is in the answer", low=-100, high=100
    )
    seed: int | None = option(0, "the same seed draws the same text", low=0, high=2**63 - 1)
    logprobs: int | None = option(
        None, "tell each token's log-probability, and those of this many likeliest ones", low=0, high=20
    )
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        with naming_arguments():
            object.__setattr__(self, "stop", _stops(self.stop))
            object.__setattr__(self, "logit_bias", _biases(self.logit_bias))


def _stops(given: Any) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else given
    if not isinstance(stops, list | tuple) or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stops):
        raise UserError(f"--stop: expected texts of 1 to {LONGEST_STOP} characters")
    if len(stops) > MOST_STOPS:
        raise UserError(f"--stop: at most {MOST_STOPS} texts, not {len(stops)}")
    return tuple(stops)


def _biases(given: Any) -> dict[int, float]:
    """Token ids to what is added to their logits; JSON has the ids as texts."""
    if not isinstance(given, Mapping) or len(given) > MOST_BIASES:
        raise UserError(f"--logit-bias: expected at most {MOST_BIASES} token ids and numbers")
    biases = {}
    for key, value in given.items():
        token = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key
        if type(token) is not int or token < 0:
            raise UserError(f"--logit-bias: {str(key)[:40]!r} is not a token id")
        if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > LARGEST_BIAS:
            raise UserError(f"--logit-bias: of token {token} is not a number from -100 to 100")
        biases[token] = float(value)
    return biases
