"""Continuous batching: every answer is what it would be alone, whatever else runs, waits or is broken off."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import tokenizers

from entrenar_gpu.config import SamplingOptions
from entrenar_gpu.data import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.infer.sampling import Sampler
from entrenar_gpu.infer.scheduler import Delta, Request, Scheduler
from tests.helpers.fake_decoder import FakeDecoder

VOCABULARY = 32
END = 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = {word: i for i, word in enumerate(["<end>", *(f"w{i}" for i in range(1, VOCABULARY))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w1"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, "memory", {"eos_token": "<end>"})


class Told:
    """What was delivered of each request's answers."""

    def __init__(self) -> None:
        self.deltas: dict[int, list[Delta]] = defaultdict(list)

    def __call__(self, delta: Delta) -> None:
        assert not self.finish(delta.index), "told after the end"
        self.deltas[delta.index].append(delta)

    def text(self, index: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas[index])

    def ids(self, index: int = 0) -> list[int]:
        return [token.id for delta in self.deltas[index] for token in delta.tokens]

    def finish(self, index: int = 0) -> str | None:
        return next((delta.finish for delta in self.deltas[index] if delta.finish), None)


def alone(prompt: list[int], options: SamplingOptions, adapter: str | None = None, stream: int = 0, context: int = 64):
    """The tokens of one answer by the plainest loop, without scheduler, cache or drafts; and why it ended."""
    decoder, ids = FakeDecoder(vocabulary=VOCABULARY), list(prompt)
    sampler = Sampler(options, prompt, VOCABULARY, stream)
    while len(ids) - len(prompt) < options.max_tokens and len(ids) < context:
        token = sampler.draw(decoder.logits([(i, adapter) for i in ids])).id
        if token == END:
            return ids[len(prompt) :], "stop"
        ids.append(token)
    return ids[len(prompt) :], "length"


def run(scheduler: Scheduler) -> None:
    for _ in range(10_000):
        if not scheduler.step():
            return
    raise AssertionError("it does not end")


def some_requests(rng: random.Random, count: int, adapters: tuple[str | None, ...]) -> list[Request]:
    shared = [rng.randrange(1, VOCABULARY) for _ in range(20)]
    requests = []
    for _ in range(count):
        prompt = shared[: rng.randrange(20)] + [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(1, 20))]
        sampled: dict[str, Any] = {"temperature": rng.choice([0, 0, 0.7]), "seed": rng.randrange(100)}
        penalties = {"repetition_penalty": rng.choice([1.0, 1.3])}
        options = SamplingOptions(max_tokens=rng.randrange(1, 40), **sampled, **penalties)
        requests.append(Request(prompt, options, rng.choice(adapters), rng.choice([1, 1, 3])))
    return requests


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("speculate", [False, True])
def test_every_answer_is_that_of_a_single_run(tokenizer, seed, speculate):
    rng = random.Random(seed)
    decoder = FakeDecoder(slots=rng.choice([1, 3, 4]), vocabulary=VOCABULARY, adapters=["a", "b"])
    scheduler = Scheduler(decoder, tokenizer, VOCABULARY, speculate, prefill_chunk=rng.choice([3, 16, 512]))
    if speculate:  # as if drafts were always faster
        scheduler.speculation.longest = lambda: 8
    waiting = [(request, Told()) for request in some_requests(rng, 14, (None, "a", "b"))]
    began = []
    while waiting or scheduler.running or scheduler.waiting:  # they come while others run
        if waiting and rng.random() < 0.3:
            began.append(waiting.pop())
            scheduler.submit(began[-1][0], began[-1][1])
        scheduler.step()
    for request, told in began:
        for index in range(request.n):
            wanted, finish = alone(list(request.prompt), request.options, request.adapter, index)
            assert told.ids(index) == wanted
            assert told.finish(index) == finish
            assert told.text(index).split() == [f"w{i}" for i in wanted]
    assert scheduler.slots.free == decoder.slots
    if speculate:
        assert scheduler.speculation.accepted > 0


def test_answers_to_one_prompt_share_its_prefill(tokenizer):
    decoder, told = FakeDecoder(slots=4, vocabulary=VOCABULARY), Told()
    scheduler = Scheduler(decoder, tokenizer, VOCABULARY, speculate=False)
    scheduler.submit(Request(list(range(1, 31)), SamplingOptions(max_tokens=4, temperature=1, seed=0), n=4), told)
    run(scheduler)
    assert max(decoder.calls[0].values()) == 30
    assert all(n == 1 for call in decoder.calls[1:] for n in call.values())
    assert decoder.copied == [29, 29, 29]
    assert len({tuple(told.ids(i)) for i in range(4)}) > 1


def test_a_chat_goes_on_where_it_stood_and_adapters_do_not_share(tokenizer):
    decoder = FakeDecoder(slots=2, vocabulary=VOCABULARY, adapters=["a"])
    scheduler, options = Scheduler(decoder, tokenizer, VOCABULARY), SamplingOptions(max_tokens=1)
    prompt = list(range(1, 21))
    for adapter in (None, "a"):
        scheduler.submit(Request(prompt, options, adapter), Told())
        run(scheduler)
    assert [sum(call.values()) for call in decoder.calls] == [20, 20]
    scheduler.submit(Request([*prompt, 5, 6, 7], options), Told())
    run(scheduler)
    assert sum(decoder.calls[-1].values()) == 3


def test_a_long_prompt_does_not_hold_up_an_answer(tokenizer):
    decoder, first, second = FakeDecoder(slots=2, context=400, vocabulary=VOCABULARY), Told(), Told()
    scheduler = Scheduler(decoder, tokenizer, VOCABULARY, speculate=False, prefill_chunk=10)
    scheduler.submit(Request([3], SamplingOptions(max_tokens=30, logit_bias={END: -100}), None), first)
    scheduler.step()
    scheduler.submit(Request([1 + i % 30 for i in range(200)], SamplingOptions(max_tokens=1)), second)
    for _ in range(20):
        scheduler.step()
    assert len(first.ids()) >= 10
    run(scheduler)
    assert second.finish() == "length"


def test_what_is_cancelled_frees_its_slot_and_is_not_told_of(tokenizer):
    decoder = FakeDecoder(slots=1, vocabulary=VOCABULARY)
    scheduler, options = Scheduler(decoder, tokenizer, VOCABULARY), SamplingOptions(max_tokens=20)
    tolds = [Told() for _ in range(3)]
    answers = [scheduler.submit(Request([i, i], options), told) for i, told in enumerate(tolds, 3)]
    scheduler.step()
    assert scheduler.running == 1
    before = len(tolds[0].ids())
    scheduler.cancel(answers[0])
    scheduler.cancel(answers[1])
    assert scheduler.waiting == 1
    run(scheduler)
    assert len(tolds[0].ids()) == before
    assert not tolds[1].deltas
    assert tolds[2].ids() == alone([5, 5], options)[0]
    scheduler.cancel(answers[2])
    assert scheduler.slots.free == 1


def test_the_context_ends_an_answer_and_refuses_a_prompt(tokenizer):
    decoder, told = FakeDecoder(context=16, vocabulary=VOCABULARY), Told()
    scheduler = Scheduler(decoder, tokenizer, VOCABULARY)
    scheduler.speculation.longest = lambda: 8
    options = SamplingOptions(max_tokens=99, logit_bias={END: -100})
    scheduler.submit(Request([1, 2, 1, 2, 1, 2], options), told)
    run(scheduler)
    assert told.ids() == alone([1, 2, 1, 2, 1, 2], options, context=16)[0]
    assert told.finish() == "length"
    for prompt, message in [
        ([1] * 16, "16 tokens leave no room for an answer within context 16"),
        ([], "prompt: empty"),
        ([VOCABULARY], "outside the model's vocabulary of 32"),
    ]:
        with pytest.raises(UserError, match=message):
            scheduler.submit(Request(prompt, options), Told())
    assert not scheduler.step()


def test_a_stop_string_ends_an_answer_and_its_tokens_are_not_told(tokenizer):
    options = SamplingOptions(max_tokens=30, logit_bias={END: -100})
    words = [f"w{i}" for i in alone([4, 5], options)[0]]
    stop = f" {words[5]} {words[6]}"
    decoder, told = FakeDecoder(vocabulary=VOCABULARY), Told()
    scheduler = Scheduler(decoder, tokenizer, VOCABULARY)
    scheduler.submit(Request([4, 5], SamplingOptions(max_tokens=30, logit_bias={END: -100}, stop=[stop])), told)
    run(scheduler)
    whole = " ".join(words)
    assert told.text() == whole[: whole.index(stop)]
    assert told.finish() == "stop"
    assert [f"w{i}" for i in told.ids()] == told.text().split()


def test_logits_that_are_not_finite_fail_one_answer_and_no_other(tokenizer):
    class Overflowing(FakeDecoder):
        def logits(self, held):
            found = super().logits(held)
            return np.full_like(found, np.nan) if held[0][0] == 9 else found

    decoder, bad, good = Overflowing(vocabulary=VOCABULARY), Told(), Told()
    scheduler, options = Scheduler(decoder, tokenizer, VOCABULARY), SamplingOptions(max_tokens=10)
    scheduler.submit(Request([9, 3], options), bad)
    scheduler.submit(Request([8, 3], options), good)
    run(scheduler)
    assert bad.finish() == "error"
    assert "not finite" in bad.deltas[0][-1].error
    assert good.ids() == alone([8, 3], options)[0]


def test_a_device_that_fails_ends_every_answer(tokenizer):
    class Broken(FakeDecoder):
        def extend(self, batch, all_logits=False, prompt=None):
            raise UserError("the GPU went away")

    told = [Told(), Told()]
    scheduler = Scheduler(Broken(slots=1), tokenizer, VOCABULARY)
    for each in told:
        scheduler.submit(Request([1, 2], SamplingOptions()), each)
    with pytest.raises(UserError, match="went away"):
        scheduler.step()
    assert [each.finish() for each in told] == ["error", "error"]
    assert not scheduler.step()
    assert scheduler.slots.free == 1
