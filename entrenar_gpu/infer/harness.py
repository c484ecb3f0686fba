"""A model for lm-evaluation-harness (extra `eval`): `simple_evaluate(model=HarnessLM(load(...)), tasks=[...])`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from entrenar_gpu.config import SamplingOptions
from entrenar_gpu.infer.language_model import LanguageModel

DEFAULT_TOKENS = 256  # where a task does not say how long an answer may be, as the harness has it


class HarnessLM(LM):  # type: ignore[misc]
    """Answers the harness's three kinds of request with a loaded model, and the adapter that is set on it."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self._model = model

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps its caches under."""
        return self._model.tokenizer.folder.replace("/", "__")

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy decoding gives it) of each continuation.

        Requests of one context that follow each other are read together, up to the model's context from its end.
        """
        found: list[tuple[float, bool]] = []
        for instance in requests:
            context, completion = self._model.encode_pair(*instance.args)
            kept = context[-max(self._model.context - len(completion), 1) :]
            score = self._model.score_ids(kept, [completion])[0]
            found.append((score.logprob, score.greedy))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows that do not overlap, each with one token before it."""
        return [self._rolling(*self._model.encode_pair("", instance.args[0])) for instance in requests]

    def _rolling(self, first: list[int], ids: list[int]) -> float:
        size, total, before = self._model.context - 1, 0.0, first[-1:]
        for begin in range(0, len(ids), size):
            part = ids[begin : begin + size]
            total += self._model.score_ids(before, [part])[0].logprob
            before = part[-1:]
        return total

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to one of the task's stop strings."""
        asked = [self._model.request(self._prompt(r.args[0], r.args[1]), _options(r.args[1])) for r in requests]
        return [completion.text for (completion,) in self._model.answer(asked)]

    def _prompt(self, text: str, given: dict[str, Any]) -> list[int]:
        room = self._model.context - _options(given).max_tokens
        return self._model.encode(text)[-max(room, 1) :]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model reads it."""
        return self._model.tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt)


def _options(given: dict[str, Any]) -> SamplingOptions:
    """What a task's `generation_kwargs` say; they are transformers' names."""
    until = given.get("until") or ()
    drawn = {name: given[name] for name in ("temperature", "top_p", "top_k", "min_p") if given.get(name) is not None}
    if not given.get("do_sample", bool(drawn.get("temperature"))):
        drawn["temperature"] = 0.0
    tokens = given.get("max_gen_toks", DEFAULT_TOKENS)
    return SamplingOptions(max_tokens=tokens, stop=(until,) if isinstance(until, str) else tuple(until), **drawn)
