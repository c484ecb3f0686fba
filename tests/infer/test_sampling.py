"""The next token from its logits: against the definitions, written out once more and differently."""

from __future__ import annotations

import numpy as np
import pytest

from entrenar_gpu.config import SamplingOptions
from entrenar_gpu.errors import UserError
from entrenar_gpu.infer.sampling import Sampler, candidates, log_softmax

LOGITS = np.array([1.0, 3.0, 2.0, 2.0, -1.0, 0.5], np.float32)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    weights = np.exp(np.asarray(logits, np.float64) / temperature)
    return weights / weights.sum()


def kept(**options: float) -> list[int]:
    return candidates(LOGITS, SamplingOptions(temperature=1.0, **options))[0].tolist()


def frequencies(logits: np.ndarray, draws: int = 4000, **options: float) -> np.ndarray:
    sampler = Sampler(SamplingOptions(seed=1, **options), [], len(logits))
    return np.bincount([sampler.draw(logits).id for _ in range(draws)], minlength=len(logits)) / draws


def test_greedy_takes_the_first_of_the_largest():
    sampler = Sampler(SamplingOptions(), [], 6)
    assert sampler.draw(LOGITS).id == 1
    assert sampler.draw(np.array([0, 7, 7], np.float32)).id == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_probabilities(temperature):
    """Frequencies of 4,000 draws within four standard errors."""
    found = frequencies(LOGITS, temperature=temperature)
    assert np.abs(found - softmax(LOGITS, temperature)).max() < 4 * np.sqrt(0.25 / 4000)


def test_the_coldest_temperature_is_greedy_and_overflows_nothing():
    assert frequencies(LOGITS, 20, temperature=1e-30)[1] == 1


def test_top_k_keeps_ties():
    assert kept(top_k=1) == [1]
    assert kept(top_k=2) == [1, 2, 3]
    assert kept(top_k=0) == kept(top_k=6) == kept(top_k=100) == list(range(6))


def test_top_p_keeps_the_fewest_that_reach_it():
    p = softmax(LOGITS)
    order = [1, 2, 3, 0, 5, 4]
    for top_p in (0.0, 0.3, float(p[1]) - 1e-6, float(p[1]) + 1e-6, 0.8, 0.99, 1.0):
        wanted = next(n for n in range(1, 7) if p[order[:n]].sum() >= top_p - 1e-12)
        assert kept(top_p=top_p) == sorted(order[:wanted])


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.97])
def test_top_p_of_a_large_vocabulary_is_that_of_a_full_sort(spread, top_p, rng):
    logits = np.round(spread * rng.standard_normal(9000), 2).astype(np.float32)  # with many equal ones
    ids, weights = candidates(logits, SamplingOptions(temperature=1.0, top_p=top_p))
    p = softmax(logits)
    order = np.argsort(-p, kind="stable")
    wanted = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    assert abs(len(ids) - wanted) <= 1  # sums round
    assert set(ids.tolist()) == set(order[: len(ids)].tolist())
    np.testing.assert_allclose(weights / weights.sum(), p[ids] / p[ids].sum(), rtol=3e-6)


def test_top_p_counts_shares_of_what_top_k_left():
    p = softmax(LOGITS)[[1, 2, 3]]
    share = float(p[0] / p.sum())
    assert share > softmax(LOGITS)[1] + 0.05
    assert kept(top_k=2, top_p=share - 0.01) == [1]
    assert kept(top_p=share - 0.01) == [1, 2]


def test_min_p_is_a_share_of_the_likeliest():
    p = softmax(LOGITS)
    for share in (0.05, 0.2, 0.5, 1.0):
        assert kept(min_p=share) == np.flatnonzero(p >= share * p.max() - 1e-12).tolist()


def said_logits(options: SamplingOptions, prompt: list[int], said: list[int], logits: np.ndarray) -> np.ndarray:
    """Logits after the penalties, told token by token as the definitions have them."""
    result = logits.astype(np.float64)
    for token in range(len(logits)):
        result[token] += options.logit_bias.get(token, 0)
        if token in prompt or token in said:
            r = options.repetition_penalty
            result[token] = result[token] / r if result[token] > 0 else result[token] * r
        count = said.count(token)
        result[token] -= options.frequency_penalty * count + (options.presence_penalty if count else 0)
    return result


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.6},
        {"logit_bias": {4: 5.5, 1: -2}},
        {"repetition_penalty": 0.8, "presence_penalty": -0.5, "frequency_penalty": 0.9, "logit_bias": {"0": 2.5}},
    ],
)
def test_penalties_are_the_definitions(given):
    options, prompt, said = SamplingOptions(**given), [2, 2, 4], []
    sampler = Sampler(options, prompt, 6)
    for _ in range(12):
        token = sampler.draw(LOGITS).id
        assert token == int(np.argmax(said_logits(options, prompt, said, LOGITS)))
        said.append(token)
    if "logit_bias" not in given:
        assert len(set(said)) > 1


def test_the_same_seed_draws_the_same_and_answers_differ():
    def drawn(seed: int | None, stream: int = 0) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1, seed=seed), [], 6, stream)
        return [sampler.draw(LOGITS).id for _ in range(40)]

    assert drawn(3) == drawn(3)
    assert len({tuple(drawn(3, stream)) for stream in range(4)} | {tuple(drawn(4))}) == 5
    assert drawn(None) != drawn(None)


def test_logprobs_are_the_models_before_penalties_and_temperature():
    options = SamplingOptions(logprobs=2, temperature=0.1, logit_bias={4: 100}, seed=0)
    sampled = Sampler(options, [], 6).draw(LOGITS)
    want = np.log(softmax(LOGITS))
    assert sampled.id == 4
    assert sampled.logprob == pytest.approx(want[4])
    assert [i for i, _ in sampled.top] == [1, 2]
    assert [value for _, value in sampled.top] == pytest.approx(want[[1, 2]])
    assert log_softmax(np.array([[1e4, 0], [0, 0]], np.float32)).tolist() == [[0, -1e4], [-np.log(2), -np.log(2)]]


def test_logits_that_are_not_finite_are_told():
    for bad in (np.nan, np.inf):
        with pytest.raises(UserError, match="not finite"):
            Sampler(SamplingOptions(temperature=1), [], 3).draw(np.array([0, bad, 1], np.float32))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -0.1}, "temperature: -0.1 is below 0"),
        ({"temperature": float("nan")}, "temperature: nan is not a number"),
        ({"top_p": 1.5}, "top_p: 1.5 is above 1"),
        ({"top_k": 2.5}, "top_k: 2.5 is not a whole number"),
        ({"max_tokens": 0}, "max_tokens: 0 is below 1"),
        ({"seed": "x"}, "seed: 'x' is not a whole number"),
        ({"stop": [""]}, "stop: expected texts"),
        ({"stop": 3}, "stop: expected texts"),
        ({"stop": ["a"] * 17}, "stop: at most 16"),
        ({"logit_bias": {"x": 1}}, "logit_bias: 'x' is not a token id"),
        ({"logit_bias": {"1": float("nan")}}, "logit_bias: of token 1"),
        ({"logit_bias": [1]}, "logit_bias: expected"),
    ],
)
def test_what_is_out_of_bounds_is_named(given, message):
    with pytest.raises(UserError) as told:
        SamplingOptions(**given)
    assert str(told.value).startswith(message)


def test_a_bias_beyond_the_vocabulary_is_told():
    with pytest.raises(UserError, match="token 6 is outside the model's vocabulary of 6"):
        Sampler(SamplingOptions(logit_bias={6: 1}), [], 6)
