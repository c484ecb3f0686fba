"""Tokens to text as they come: what is told is never taken back, and never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or not one yet
LONGEST_WAIT = 8  # tokens that a character may take to complete; a byte each they are 4


class Decodes(Protocol):
    """A tokenizer, as far as text is concerned."""

    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Decodes ids one at a time, a few again with each: decoders treat the beginning of a text in their own way.

    The text up to `_read` tokens is settled; it is decoded again from `_start` on, and what the next tokens add to it
    is new. Time per token does not grow with the answer.
    """

    def __init__(self, tokenizer: Decodes) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._read = 0
        self._context = ""  # of the tokens from _start to _read

    def push(self, token: int) -> str:
        """What the token adds to the text; nothing while bytes are missing of a character."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith(REPLACEMENT) and len(self._ids) - self._read < LONGEST_WAIT:
            return ""
        return self._settle(text)

    def end(self) -> str:
        """What is left, complete or not."""
        return self._settle(self._tokenizer.decode(self._ids[self._start :]))

    def _settle(self, text: str) -> str:
        new = text[len(self._context) :]
        if new:  # else a special token, or one that shows with the next
            self._start, self._read = self._read, len(self._ids)
            self._context = self._tokenizer.decode(self._ids[self._start : self._read])
        return new


class AnswerText:
    """The text of an answer as it may be told, up to the first of `stops`, which is not part of it."""

    def __init__(self, tokenizer: Decodes, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = stops
        self._held = ""  # what may yet be the beginning of a stop string
        self.told = 0  # characters
        self.stopped = False

    @property
    def length(self) -> int:
        """Characters so far, those held back included."""
        return self.told + len(self._held)

    def push(self, token: int) -> str:
        """What may be told after another token."""
        return self._tell(self._detokenizer.push(token), final=False)

    def end(self) -> str:
        """What was held back, at the end of the answer; a stop string may be complete in it only now."""
        return self._tell(self._detokenizer.end(), final=True)

    def _tell(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, kept = text[: min(found)], 0
        else:
            kept = 0 if final else _beginning(text, self._stops)
        told = text[: len(text) - kept]
        self._held = text[len(told) :]
        self.told += len(told)
        return told


def _beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string may begin with."""
    lengths = [n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])]
    return max(lengths, default=0)
