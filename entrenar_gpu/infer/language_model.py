"""A model to talk to: prompts and conversations in, texts and probabilities out."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from entrenar_gpu.config import SamplingOptions, whole_number
from entrenar_gpu.data import Tokenizer
from entrenar_gpu.errors import UserError, naming_arguments
from entrenar_gpu.infer.prompts import Messages, conversations, encode_chat, encode_text, token_ids
from entrenar_gpu.infer.sampling import SampledToken, log_softmax
from entrenar_gpu.infer.scheduler import Delta, Request, Scheduler
from entrenar_gpu.infer.slots import CachedDecoder


@dataclass(frozen=True)
class Completion:
    """An answer. `finish` is "stop" (the model, or a stop string, ended it) or "length" (max_tokens, or the context).

    `completion_tokens` counts what was drawn, the token that ended the answer included; `tokens` are those of the text.
    """

    text: str
    finish: str
    tokens: tuple[SampledToken, ...]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Score:
    """How likely a model finds a completion: the sum of its tokens' log-probabilities (natural logarithm), their
    number, and whether each of them is the most likely one."""

    logprob: float
    tokens: int
    greedy: bool


class LanguageModel:
    """A model on a device, and the adapters that it can speak with; `load` opens one.

    >>> with load("Qwen/Qwen3-0.6B", adapter="run") as model:
    ...     model.chat("What is 2 + 2?", max_tokens=64)

    Methods take the options of `SamplingOptions` by name: `max_tokens`, `temperature`, `stop`, `seed`, ... Prompts of a
    list are answered in one batch, and each as it would be alone. Threads may share a model; they take turns.
    """

    def __init__(
        self,
        decoder: CachedDecoder,
        tokenizer: Tokenizer,
        vocabulary: int,
        adapters: Sequence[str] = (),
        speculate: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.decoder = decoder
        self.scheduler = Scheduler(decoder, tokenizer, vocabulary, speculate)
        self.adapters = tuple(adapters)
        self._adapter: str | None = None
        self._closed = False
        self._lock = threading.RLock()

    @property
    def adapter(self) -> str | None:
        """The adapter that answers, or None for the base model alone. Setting it loads nothing."""
        return self._adapter

    @adapter.setter
    def adapter(self, name: str | os.PathLike[str] | None) -> None:
        name = os.fspath(name) if isinstance(name, os.PathLike) else name
        if name is not None and name not in self.adapters:
            raise UserError(f"adapter {name!r}: not loaded; there is {', '.join(self.adapters) or 'none'}")
        self._adapter = name

    @property
    def context(self) -> int:
        """Longest prompt and answer together, in tokens."""
        return self.decoder.context

    def generate(self, prompts: str | Sequence[str], *, n: int = 1, **options: Any) -> Any:
        """What the model continues a text with, as it is (for models that chat see `chat`); a list of texts gives a
        list. With `n` above 1 each is a list of so many."""
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            return self._texts([self.encode(prompts)], n, options)[0]
        return self._texts([self.encode(prompt) for prompt in prompts], n, options)

    def chat(self, messages: Messages | Sequence[Messages], *, n: int = 1, **options: Any) -> Any:
        """The assistant's next turn in a conversation: a text is one message of the user. A list of conversations gives
        a list, and `n` above 1 lists as in `generate`."""
        several = conversations(messages)
        texts = self._texts([self.encode_chat(each) for each in several], n, options)
        return texts if several is messages else texts[0]

    def _texts(self, prompts: Sequence[Sequence[int]], n: int, options: Mapping[str, Any]) -> list[Any]:
        sampling = _sampling(options)
        found = self.answer(self.request(prompt, sampling, n) for prompt in prompts)
        texts = [[completion.text for completion in completions] for completions in found]
        return [several[0] for several in texts] if n == 1 else texts

    def stream(self, prompt: Messages, *, chat: bool | None = None, **options: Any) -> Iterator[str]:
        """The same, piece by piece as it is made; a text is continued as it is, unless `chat` is True.

        Whoever stops listening ends the answer.
        """
        as_chat = not isinstance(prompt, str) if chat is None else chat
        ids = self.encode_chat(prompt) if as_chat else self.encode(prompt)  # type: ignore[arg-type]
        return (delta.text for delta in self.deltas(self.request(ids, _sampling(options))) if delta.text)

    def complete(self, prompts: Sequence[Sequence[int]], *, n: int = 1, **options: Any) -> list[Completion]:
        """Answers to prompts of token ids: `n` to the first, then `n` to the second, and so on."""
        sampling = _sampling(options)
        requests = [self.request(prompt, sampling, n) for prompt in prompts]
        return [completion for completions in self.answer(requests) for completion in completions]

    def request(self, prompt: Sequence[int], options: SamplingOptions, n: int = 1) -> Request:
        """A request to the adapter that answers now. Raises UserError for what are no token ids, or none answers."""
        self._check_open()
        with naming_arguments():
            return Request(tuple(token_ids(prompt, "prompt")), options, self._adapter, whole_number(n, "n", 1))

    def answer(self, requests: Iterable[Request]) -> Iterator[list[Completion]]:
        """The answers to each request, in order, batched: a few requests run ahead of the one that is waited for.

        Raises UserError at a request that cannot be answered; whoever stops early drops those under way.
        """
        source, pending = iter(requests), deque[_Pending]()
        try:
            while True:
                ahead = sum(len(each.answers) for each in pending)
                while ahead < 2 * self.decoder.slots and (request := next(source, None)) is not None:
                    with self._lock:
                        pending.append(_Pending(request, self.scheduler))
                    ahead += request.n
                if not pending:
                    return
                while not pending[0].ended:
                    with self._lock:
                        self.scheduler.step()
                yield pending[0].completions()
                pending.popleft()
        finally:
            with self._lock:
                for each in pending:
                    self.scheduler.cancel(each.answers)

    def deltas(self, request: Request, stop: threading.Event | None = None) -> Iterator[Delta]:
        """What is new of a request's answers as it comes, until `stop` is set. Raises UserError where one fails."""
        with self._lock:
            pending = _Pending(request, self.scheduler)
        told = pending.deltas
        try:
            while (told or not pending.ended) and not (stop is not None and stop.is_set()):
                while told:
                    yield _checked(told.pop(0))
                with self._lock:
                    self.scheduler.step()
        finally:
            with self._lock:
                self.scheduler.cancel(pending.answers)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [n, V] in float32: row i are those of the token after `ids[: i + 1]`."""
        ids = token_ids(ids, "ids")
        if not ids:
            raise UserError("ids: empty; the model needs a token to go on from")
        return self._run([ids[0]], [ids[1:]])[0]

    def score(self, prompt: str, completion: str) -> Score:
        """How likely the model finds `completion` after `prompt`.

        The two are cut into tokens together, as lm-evaluation-harness does: spaces at the end of the prompt count as
        the beginning of the completion, and what the prompt alone encodes to is where that begins.
        """
        return self.score_choices(prompt, [completion])[0]

    def score_choices(self, prompt: str, completions: Sequence[str]) -> list[Score]:
        """The scores of several completions of one prompt, which is read once."""
        pairs = [self.encode_pair(prompt, completion) for completion in completions]
        return self.score_ids(pairs[0][0], [completion for _, completion in pairs]) if pairs else []

    def score_ids(self, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> list[Score]:
        """The same for token ids; `prompt` holds at least one."""
        prompt = token_ids(prompt, "prompt")
        if not prompt:
            raise UserError("score: the prompt is empty, and this model has no token to begin with")
        found, wanted = [], [token_ids(completion, "completion") for completion in completions]
        for rows, ids in zip(self._run(list(prompt), [ids[:-1] for ids in wanted]), wanted, strict=True):
            values = log_softmax(rows)[np.arange(len(ids)), ids] if ids else np.zeros(0)
            greedy = bool((rows[: len(ids)].argmax(-1) == np.array(ids)).all())
            found.append(Score(float(values.sum()), len(ids), greedy))
        return found

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a text to be continued."""
        with naming_arguments():
            return encode_text(self.tokenizer, prompt)

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of what is scored after it, see `score`."""
        for name, text in (("prompt", prompt), ("completion", completion)):
            if not isinstance(text, str):
                raise UserError(f"{name}: expected text, not a {type(text).__name__}")
        kept = prompt.rstrip()
        completion = prompt[len(kept) :] + completion
        context, whole = self.encode(kept), self.encode(kept + completion)
        if not context:  # nothing before it: the model's first token stands in
            begin = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
            context = [] if begin is None else [begin]
            whole = [*context, *whole]
        return context, whole[len(context) :]

    def encode_chat(self, messages: Messages) -> list[int]:
        """Token ids of a conversation with the opening of an answer. Raises UserError where there is no template."""
        with naming_arguments():
            return encode_chat(self.tokenizer, messages)

    @naming_arguments()
    def _run(self, prefix: list[int], endings: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logits [1 + n, V] after a prefix and each of the n tokens of each of its endings, in batches; what the cache
        has of the prefix is not read again."""
        self._check_open()
        for ending in endings:
            self.scheduler.check_tokens([*prefix, *ending])
            if len(prefix) + len(ending) > self.context:
                raise UserError(f"--context: {len(prefix) + len(ending)} tokens exceed {self.context}")
        found: list[np.ndarray] = []
        while len(found) < len(endings):
            with self._lock:
                found += self._run_together(prefix, endings[len(found) :])
        return found

    def _run_together(self, prefix: list[int], endings: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The same for the first few of the endings, as many as there are free slots."""
        slots = self.scheduler.slots
        while not slots.free:  # streams that others have open
            self.scheduler.step()
        self.decoder.set_adapter(self._adapter)
        taken = []
        try:
            for _ in endings[: slots.free]:
                slot = slots.take(prefix, self._adapter)
                taken.append(slot)
                if rest := prefix[len(slot.tokens) : -1]:
                    self.decoder.extend({slot.number: rest}, prompt=True)
                    slot.tokens += rest
            batch = {s.number: [prefix[-1], *ending] for s, ending in zip(taken, endings, strict=False)}
            logits = self.decoder.extend(batch, all_logits=True, prompt=True)
            for slot in taken:
                slot.tokens += batch[slot.number]
        finally:
            for slot in taken:
                slots.give_back(slot)
        return [logits[slot.number] for slot in taken]

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("this model is closed; load it again")

    def close(self) -> None:
        """Give back the device and its memory."""
        self._closed = True
        self.decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _sampling(options: Mapping[str, Any]) -> SamplingOptions:
    with naming_arguments():
        return SamplingOptions.from_mapping(options, "sampling")


def _checked(delta: Delta) -> Delta:
    if delta.finish == "error":
        raise UserError(delta.error)
    return delta


class _Pending:
    """A request under way, and what was told of it."""

    def __init__(self, request: Request, scheduler: Scheduler) -> None:
        self.request = request
        self.deltas: list[Delta] = []
        self.answers = scheduler.submit(request, self.deltas.append)

    @property
    def ended(self) -> bool:
        return all(answer.finish is not None for answer in self.answers)

    def completions(self) -> list[Completion]:
        """Its answers, all of which have ended. Raises UserError where one broke off."""
        found = []
        for answer in self.answers:
            deltas = [_checked(delta) for delta in self.deltas if delta.index == answer.index]
            tokens = tuple(token for delta in deltas for token in delta.tokens)
            text = "".join(delta.text for delta in deltas)
            found.append(Completion(text, deltas[-1].finish or "", tokens, len(self.request.prompt), answer.drawn))
        return found
