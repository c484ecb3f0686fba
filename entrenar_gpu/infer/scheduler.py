"""Requests onto the slots of a decoder: batches that sequences join and leave at every step.

A step runs one `extend` for sequences of one adapter: either chunks of prompts, or the next token of every sequence
that is past its prompt, with drafts where those pay. The two take turns, and so do adapters, so that nobody waits for a
long prompt of another. Not thread-safe.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from entrenar_gpu.config import SamplingOptions
from entrenar_gpu.data import Tokenizer
from entrenar_gpu.errors import UserError, naming_arguments
from entrenar_gpu.infer.answer_text import AnswerText
from entrenar_gpu.infer.drafts import NgramIndex, Speculation
from entrenar_gpu.infer.sampling import SampledToken, Sampler
from entrenar_gpu.infer.slots import CachedDecoder, Slot, SlotTable

PREFILL_CHUNK = 512  # tokens of prompts in one step

Finish = Literal["stop", "length", "error"]


class ContextExceeded(UserError):
    """A prompt that leaves no room for an answer."""


@dataclass(frozen=True)
class Request:
    """A prompt to be answered `n` times; `adapter` is a name that the decoder knows, or None for the base model."""

    prompt: Sequence[int]
    options: SamplingOptions
    adapter: str | None = None
    n: int = 1


@dataclass(frozen=True)
class Delta:
    """What is new of the answer `index` to a request; `finish` with the last. `error` says why it broke off."""

    index: int
    text: str
    tokens: tuple[SampledToken, ...] = ()
    finish: Finish | None = None
    error: str = ""


Deliver = Callable[[Delta], None]


class Answer:
    """One continuation on its way: its tokens, the slot that holds them, and what may be told of it."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer, sampler: Sampler, deliver: Deliver) -> None:
        self.request = request
        self.index = index
        self.tokens = list(request.prompt)
        self.slot: Slot | None = None
        self.finish: Finish | None = None
        self.drawn = 0  # tokens, the one that ends the answer included
        self.shared = 0  # tokens of the prompt that were in the cache already
        self.submitted = time.monotonic()
        self.first_token: float | None = None  # when it came, of time.monotonic
        self._ends = tokenizer.eos_ids
        self._sampler = sampler
        self._text = AnswerText(tokenizer, (*request.options.stop, *tokenizer.stop_texts))
        self._waiting: list[tuple[int, SampledToken]] = []  # where in the text it begins, and what is not told yet
        self._deliver = deliver
        self._ngrams: NgramIndex | None = None

    @property
    def past_prompt(self) -> bool:
        """Whether its prompt is in the cache, and its first token drawn."""
        return self.drawn > 0

    def draft(self, longest: int, room: int) -> list[int]:
        """Tokens to try behind the last one; `room` is how many more the cache holds."""
        most = min(longest, room, self.request.options.max_tokens - self.drawn - 1)
        if most <= 0:
            return []
        if self._ngrams is None:
            self._ngrams = NgramIndex(self.tokens)
        return self._ngrams.draft(most)

    @property
    def takes_likeliest(self) -> bool:
        return self._sampler.takes_likeliest

    def draw(self, logits: np.ndarray | int, context: int) -> int:
        """Take the next token from its logits [V], or from where they are largest; tell what may be told, and finish
        where it ends the answer."""
        sampled = self._sampler.draw(logits)
        self.drawn += 1
        if self.first_token is None:
            self.first_token = time.monotonic()
        if sampled.id in self._ends:
            self._end("stop")
            return sampled.id
        self.tokens.append(sampled.id)
        if self._ngrams is not None:
            self._ngrams.push(sampled.id)
        self._waiting.append((self._text.length, sampled))
        told = self._text.push(sampled.id)
        if self._text.stopped:
            self._tell(told, "stop")
        elif self.drawn >= self.request.options.max_tokens or len(self.tokens) >= context:
            self._end("length", told)
        elif told:
            self._tell(told)
        return sampled.id

    def fail(self, why: str) -> None:
        """End without another token."""
        self.finish = "error"
        self._deliver(Delta(self.index, "", finish="error", error=why))

    def _end(self, finish: Finish, told: str = "") -> None:
        told += self._text.end()
        self._tell(told, "stop" if self._text.stopped else finish)

    def _tell(self, text: str, finish: Finish | None = None) -> None:
        shown = self._text.told if finish is None or self._text.stopped else self._text.told + 1
        tokens = tuple(token for start, token in self._waiting if start < shown)
        self._waiting = [entry for entry in self._waiting if entry[0] >= shown]
        self.finish = finish
        self._deliver(Delta(self.index, text, tokens, finish))


class Scheduler:
    """Answers requests over the slots of a decoder; `step` until it returns False."""

    def __init__(
        self,
        decoder: CachedDecoder,
        tokenizer: Tokenizer,
        vocabulary: int,
        speculate: bool = True,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        self.decoder = decoder
        self.slots = SlotTable(decoder)
        self.speculation = Speculation(speculate)
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._chunk = prefill_chunk
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._turns: dict[tuple[str | None, bool], int] = {}  # when each (adapter, past its prompt) last ran
        self._steps = 0

    @property
    def waiting(self) -> int:
        """Answers without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @naming_arguments()
    def submit(self, request: Request, deliver: Deliver) -> list[Answer]:
        """Queue a request; `deliver` is called in `step` with what is new of its answers.

        Raises UserError, with nothing queued, for a prompt that is empty, has a token that the model lacks or leaves
        no room for an answer.
        """
        context, length = self.decoder.context, len(request.prompt)
        if not length:
            raise UserError("--prompt: empty; the model needs a token to continue")
        if length >= context:
            raise ContextExceeded(f"--prompt: {length} tokens leave no room for an answer within --context {context}")
        self.check_tokens(request.prompt)
        answers = []
        for index in range(request.n):
            sampler = Sampler(request.options, request.prompt, self._vocabulary, index)
            answers.append(Answer(request, index, self._tokenizer, sampler, deliver))
        self._waiting.extend(answers)
        return answers

    @naming_arguments()
    def check_tokens(self, ids: Sequence[int]) -> None:
        """Raise UserError for a token that the model lacks: a tokenizer may have more."""
        for token in (min(ids), max(ids)):
            if not 0 <= token < self._vocabulary:
                word = self._tokenizer.decode([token], skip_special_tokens=False)[:40] if token >= 0 else ""
                raise UserError(
                    f"--prompt: token id {token} ({word!r}) is outside the model's vocabulary of {self._vocabulary}"
                )

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Drop answers, those that have ended included; nothing more is delivered of them."""
        for answer in answers:
            if answer in self._waiting:
                self._waiting.remove(answer)
            self._release(answer)

    def step(self) -> bool:
        """Do one batch's work. False where there is none.

        A UserError of the device fails all requests, and is raised.
        """
        self._admit()
        if not self._running:
            return False
        self._steps += 1
        group = self._next_group()
        try:
            self.decoder.set_adapter(group[0].request.adapter)
            if group[0].past_prompt:
                self._decode(group)
            else:
                self._prefill(group)
        except Exception as error:
            self.fail_all(str(error))
            raise
        for answer in group:
            if answer.finish is not None:
                self._release(answer)
        return True

    def _admit(self) -> None:
        """Give free slots to those that wait, in order; the later answers to a prompt wait until it is in the cache."""
        held: list[Answer] = []
        while self._waiting and self.slots.free:
            answer = self._waiting.popleft()
            if any(other.request is answer.request and not other.past_prompt for other in self._running):
                held.append(answer)
                continue
            answer.slot = self.slots.take(answer.tokens, answer.request.adapter)
            answer.shared = len(answer.slot.tokens)
            self._running.append(answer)
        self._waiting.extendleft(reversed(held))

    def _next_group(self) -> list[Answer]:
        """Those that run together in this step: of one adapter, all at their prompt or all past it."""
        groups: dict[tuple[str | None, bool], list[Answer]] = {}
        for answer in self._running:
            groups.setdefault((answer.request.adapter, answer.past_prompt), []).append(answer)
        chosen = min(groups, key=lambda key: self._turns.get(key, 0))
        self._turns[chosen] = self._steps
        return groups[chosen]

    def _prefill(self, group: Sequence[Answer]) -> None:
        """One chunk of prompts, and the first token of each answer whose prompt ends in it."""
        batch: dict[int, list[int]] = {}
        room = self._chunk
        for answer in group:
            assert answer.slot is not None
            at = len(answer.slot.tokens)
            if part := answer.tokens[at : at + room]:
                batch[answer.slot.number] = part
                room -= len(part)
        found = self._extend(group, batch, every=False, prompt=True)
        for answer in group:
            slot = answer.slot
            assert slot is not None
            if slot.number in batch:
                slot.tokens += batch[slot.number]
                if len(slot.tokens) == len(answer.tokens):
                    self._draw(answer, found[slot.number], [])

    def _decode(self, group: Sequence[Answer]) -> None:
        """The next tokens of every sequence: one each, and as many as a draft had right."""
        longest, context = self.speculation.longest(), self.decoder.context
        drafts = [answer.draft(longest, context - len(answer.tokens)) for answer in group]
        batch = {a.slot.number: [a.tokens[-1], *draft] for a, draft in zip(group, drafts, strict=True) if a.slot}
        drafted, before = sum(map(len, drafts)), sum(answer.drawn for answer in group)
        began = time.perf_counter()
        found = self._extend(group, batch, every=drafted > 0, prompt=False)
        seconds = time.perf_counter() - began
        for answer, draft in zip(group, drafts, strict=True):
            assert answer.slot is not None
            answer.slot.tokens.append(answer.tokens[-1])
            self._draw(answer, found[answer.slot.number], draft)
            if draft:
                self.decoder.truncate(answer.slot.number, len(answer.slot.tokens))
        told = sum(answer.drawn for answer in group) - before
        self.speculation.stepped(seconds, len(group), drafted, told)

    def _extend(
        self, group: Sequence[Answer], batch: Mapping[int, Sequence[int]], every: bool, prompt: bool
    ) -> Mapping[int, Sequence[np.ndarray | int]]:
        """What tokens are drawn from: logits, or less where that is enough for all."""
        if all(answer.takes_likeliest for answer in group):
            return self.decoder.likeliest(batch, every, prompt)
        return {slot: [*rows] for slot, rows in self.decoder.extend(batch, every, prompt).items()}

    def _draw(self, answer: Answer, rows: Sequence[np.ndarray | int], draft: Sequence[int]) -> None:
        """Draw tokens as long as they are the draft's; `slot.tokens` gets what of it is right."""
        assert answer.slot is not None
        try:
            for row, tried in zip(rows, [*draft, None], strict=True):
                if answer.draw(row, self.decoder.context) != tried or answer.finish is not None:
                    break
                answer.slot.tokens.append(tried)
        except UserError as error:
            answer.fail(str(error))

    def _release(self, answer: Answer) -> None:
        if answer in self._running:
            self._running.remove(answer)
        if answer.slot is not None:
            self.slots.give_back(answer.slot)
            answer.slot = None

    def fail_all(self, why: str) -> None:
        """End every request, and forget what is cached."""
        for answer in [*self._running, *self._waiting]:
            if answer.finish is None:
                answer.fail(why)
        for answer in [*self._running]:
            self._release(answer)
        self._waiting.clear()
        self.slots.forget_all()
