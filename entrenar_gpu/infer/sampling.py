"""The next token from its logits: greedy or drawn, with penalties and log-probabilities.

In order, as transformers applies its processors and warpers:

1. `logit_bias` is added to the logits it names.
2. Repetition penalty r (Keskar et al., arXiv 1909.05858; transformers): the logit l of each token in prompt or answer
   becomes l / r where l > 0, else l * r.
3. Frequency and presence penalty (OpenAI; vLLM): l - frequency * count - presence * [count > 0], where a token's count
   is over the answer alone, not over the prompt.
4. Temperature 0 takes the largest logit, the smallest id of equal ones. Otherwise p = softmax(l / temperature).
5. Top-k (Fan et al., arXiv 1805.04833) keeps the k most likely tokens; those as likely as the k-th stay too.
6. Top-p (Holtzman et al., arXiv 1904.09751) keeps the fewest likeliest tokens whose share of what top-k left reaches
   top_p, at least one.
7. Min-p (Nguyen et al., arXiv 2407.01082) keeps tokens with p >= min_p * max p. vLLM does this before top-k.
8. One uniform number of the request's own generator picks from what is left, in order of ids.

A request's tokens so depend on nothing but its logits and seed: not on what else is in a batch, and not on drafts.
Log-probabilities are those of the model, log softmax of the logits before step 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from entrenar_gpu.config import SamplingOptions
from entrenar_gpu.errors import UserError
from entrenar_gpu.ops import NOT_FINITE

Floats = np.ndarray
Ints = np.ndarray


@dataclass(frozen=True)
class SampledToken:
    """A token of an answer. `logprob` is NaN and `top` empty where nobody asked for them."""

    id: int
    logprob: float = float("nan")
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability) of the likeliest, in falling order


class Sampler:
    """Draws one answer's tokens, one after the other. `stream` tells the answers to one prompt apart."""

    def __init__(self, options: SamplingOptions, prompt: Sequence[int], vocabulary: int, stream: int = 0) -> None:
        """Raises UserError for a logit bias on a token that the vocabulary lacks."""
        beyond = [i for i in options.logit_bias if i >= vocabulary]
        if beyond:
            raise UserError(f"--logit-bias: token {beyond[0]} is outside the model's vocabulary of {vocabulary}")
        self._options = options
        self._rng = np.random.default_rng(None if options.seed is None else [options.seed, stream])
        self._bias = np.array([*options.logit_bias], np.int64), np.array([*options.logit_bias.values()])
        self._seen = np.unique(np.asarray(prompt, np.int64)) if options.repetition_penalty != 1 else None
        self._counts: Counter[int] = Counter()
        self._plain = not (options.logit_bias or self._seen is not None or self._counts_matter)

    @property
    def _counts_matter(self) -> bool:
        return bool(self._options.presence_penalty or self._options.frequency_penalty)

    @property
    def takes_likeliest(self) -> bool:
        """Whether the next token is always where the model's logits are largest, and nothing else of them is told."""
        return self._plain and self._options.temperature == 0 and self._options.logprobs is None

    def draw(self, logits: Floats | int) -> SampledToken:
        """The next token, from its logits [V] or, where those are not needed, from where they are largest; the sampler
        then counts it as said.

        Raises UserError for logits that are not finite, which weights of a run that diverged give.
        """
        options = self._options
        if logits == NOT_FINITE if isinstance(logits, int) else not np.isfinite(logits.max()):
            raise UserError("the model's logits are not finite: its weights, or its adapter's, overflow")
        if isinstance(logits, int):
            return SampledToken(logits)
        adjusted = logits if self._plain else self._adjusted(logits)
        if options.temperature == 0:
            token = int(np.argmax(adjusted))
        else:
            token = self._pick(*candidates(adjusted, options))
        self._count(token)
        return _described(token, logits, options.logprobs)

    def _adjusted(self, logits: Floats) -> Floats:
        """Steps 1 to 3."""
        options, values = self._options, logits.copy()
        ids, biases = self._bias
        values[ids] += biases
        if self._seen is not None:
            seen = values[self._seen]
            penalty = options.repetition_penalty
            values[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._counts_matter and self._counts:
            said = np.array([*self._counts], np.int64)
            times = np.array([*self._counts.values()], np.float64)
            values[said] -= options.frequency_penalty * times + options.presence_penalty
        return values

    def _pick(self, ids: Ints, weights: Floats) -> int:
        """The id at which the cumulated probability passes a uniform number."""
        cumulated = np.cumsum(weights, dtype=np.float64)
        at = int(np.searchsorted(cumulated, self._rng.random() * cumulated[-1], side="right"))
        return int(ids[min(at, len(ids) - 1)])  # a product that rounded up to the whole

    def _count(self, token: int) -> None:
        if self._seen is not None and self._counts[token] == 0:
            self._seen = np.union1d(self._seen, [token])
        self._counts[token] += 1


def candidates(logits: Floats, options: SamplingOptions) -> tuple[Ints, Floats]:
    """Steps 4 to 7 for a temperature above 0: (ids of what is left, in order, and their weights).

    Weights are probabilities up to one factor, and above zero. Of a large vocabulary little is sorted.
    """
    ids = np.arange(logits.size)
    if 0 < options.top_k < logits.size:
        ids = np.flatnonzero(logits >= np.partition(logits, -options.top_k)[-options.top_k])
    temperature = max(options.temperature, 1e-6)  # colder ones overflow, and differ in nothing
    weights = np.exp((logits[ids] - logits.max()) / np.float32(temperature))
    kept = weights > 0
    if options.top_p < 1:
        kept &= _nucleus(weights, options.top_p)
    if options.min_p > 0:
        kept &= weights >= options.min_p * weights.max()
    return ids[kept], weights[kept]


def _nucleus(weights: Floats, share: float) -> np.ndarray:
    """Which of the weights are the fewest largest that reach a share of all, the earlier of equal ones first.

    Only the largest are sorted, as many as that takes.
    """
    wanted, count = share * weights.sum(dtype=np.float64), 256
    while True:
        largest = np.arange(weights.size)
        if count < weights.size:
            largest = np.flatnonzero(weights > np.partition(weights, -count)[-count])
        order = largest[np.argsort(-weights[largest], kind="stable")]
        reached = int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), wanted))
        if reached < len(order) or len(order) == weights.size:
            break
        count *= 16
    kept = np.zeros(weights.size, bool)
    kept[order[: reached + 1]] = True
    return kept


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _described(token: int, logits: Floats, wanted: int | None) -> SampledToken:
    if wanted is None:
        return SampledToken(token)
    values = log_softmax(logits)
    least = np.partition(values, -wanted)[-wanted] if 0 < wanted < values.size else -np.inf
    likeliest = np.flatnonzero(values >= least)
    likeliest = likeliest[np.argsort(-values[likeliest], kind="stable")][:wanted]
    return SampledToken(token, float(values[token]), tuple((int(i), float(values[i])) for i in likeliest))
