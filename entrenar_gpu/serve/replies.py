"""Answers in the shapes of OpenAI's interface: whole, and as the chunks of a stream."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import tokenizers

from entrenar_gpu.data import Tokenizer
from entrenar_gpu.infer import Answer, Delta, SampledToken
from entrenar_gpu.serve.bodies import Asked


@dataclass
class Reply:
    """The reply to one request. Choices are numbered prompt by prompt, `n` to each."""

    request_id: str
    model: str
    asked: Asked
    tokenizer: Tokenizer
    created: int = field(default_factory=lambda: int(time.time()))
    _lengths: dict[int, int] = field(default_factory=dict)  # characters so far, by choice

    def whole(self, deltas: Sequence[tuple[int, Delta]], answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
        """The body of a reply that does not stream."""
        texts: dict[int, list[Delta]] = {i: [] for i in range(len(self.asked.prompts) * self.asked.n)}
        for prompt, delta in deltas:
            texts[prompt * self.asked.n + delta.index].append(delta)
        choices = []
        for index, parts in texts.items():
            text = "".join(part.text for part in parts)
            tokens = [token for part in parts for token in part.tokens]
            said = {"message": {"role": "assistant", "content": text}} if self.asked.is_chat else {"text": text}
            choices.append(self._choice(index, said, tokens, parts[-1].finish))
        kind = "chat.completion" if self.asked.is_chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage(answers)}

    def opening(self) -> Iterator[dict[str, Any]]:
        """The chunks of a stream before any text: whose turn it is."""
        if self.asked.is_chat:
            for index in range(self.asked.n):
                delta = {"delta": {"role": "assistant", "content": ""}}
                yield self._chunk([self._choice(index, delta, [], None)])

    def chunk(self, prompt: int, delta: Delta) -> dict[str, Any]:
        """A chunk of a stream."""
        index = prompt * self.asked.n + delta.index
        said: dict[str, Any] = {"text": delta.text}
        if self.asked.is_chat:
            said = {"delta": {"content": delta.text} if delta.text or delta.tokens else {}}
        return self._chunk([self._choice(index, said, delta.tokens, delta.finish)])

    def closing(self, answers: Sequence[Sequence[Answer]]) -> Iterator[dict[str, Any]]:
        """The chunk behind the text: how much there was, where that was asked for."""
        if self.asked.include_usage:
            yield {**self._chunk([]), "usage": usage(answers)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._head("chat.completion.chunk" if self.asked.is_chat else "text_completion"),
            "choices": choices,
        }

    def _choice(
        self, index: int, said: dict[str, Any], tokens: Sequence[SampledToken], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.asked.options.logprobs is not None and tokens:
            logprobs = self._chat_logprobs(tokens) if self.asked.is_chat else self._text_logprobs(index, tokens)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def _chat_logprobs(self, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            held = token_bytes(self.tokenizer, token)
            return {"token": held.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(held)}

        content = [{**entry(t.id, t.logprob), "top_logprobs": [entry(*top) for top in t.top]} for t in tokens]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, index: int, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        texts = [self._text(token.id) for token in tokens]
        offsets, at = [], self._lengths.get(index, 0)
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._lengths[index] = at
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self._text(i): value for i, value in token.top} for token in tokens],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return token_bytes(self.tokenizer, token).decode("utf-8", "replace")


def usage(answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """Tokens read and drawn; a prompt counts once, however many answers it has."""
    prompt = sum(len(group[0].request.prompt) for group in answers)
    drawn = sum(answer.drawn for group in answers for answer in group)
    shared = sum(group[0].shared for group in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
        "prompt_tokens_details": {"cached_tokens": shared},
    }


def event(value: Any) -> str:
    """A server-sent event that holds a JSON value."""
    return f"data: {json.dumps(value, allow_nan=False, separators=(',', ':'))}\n\n"


END = "data: [DONE]\n\n"


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token stands for: a part of a character where its vocabulary has such."""
    piece = tokenizer.backend.id_to_token(token)
    if piece is None:
        return b""
    if isinstance(tokenizer.backend.decoder, tokenizers.decoders.ByteLevel):
        alphabet = _byte_alphabet()
        return bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else piece.encode()
    if found := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(found[1])
    return piece.replace("\u2581", " ").encode()  # SentencePiece's sign for a space


@cache
def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as: visible ones as themselves, the rest from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
