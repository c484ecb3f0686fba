"""Token ids of texts of which only the beginning counts: no more of a long one is tokenised than that.

A row takes --seq tokens, and a document may be a thousand times as long. Cut anywhere, a text's tokens change near
the cut; so its beginning is tokenised twice, cut at two places, and what counts must be the same in both and end well
before the nearer cut. Where it does not, more is tokenised, in the end the whole text.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import tokenizers

from entrenar_gpu.chat import Span
from entrenar_gpu.data.spelling import Spelling

_FIRST_GUESS = 4.0  # characters per token, until texts have shown better
_MARGIN = 64  # tokens before the cut that do not count
_FARTHER = 1.5  # the second cut, by the first
_NEAR = 8  # characters at the ends of a span that are looked up one by one: the first nearly always has a token

# A text's ids, and for each of its spans of characters the tokens [first, last) that have any of these: (0, 0) if none.
Encoded = tuple[list[int], list[Span]]


class PrefixEncoder:
    """Encodes without what a post-processor adds. Remembers how many characters a token has in these texts."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._characters_per_token = _FIRST_GUESS

    def encode(self, texts: Sequence[str], limit: int, spans: Sequence[Sequence[Span]] = ()) -> list[Encoded]:
        """Each text's ids, all or at least the first `limit` of more, and where its `spans` of characters lie in them.

        A span may reach into what is left out; nothing is said of the tokens behind the first `limit`.
        """
        spans = spans or [()] * len(texts)
        results: dict[int, Encoded] = {}
        waiting = dict.fromkeys(range(len(texts)), self._guess(limit))
        while waiting:
            cuts = {i: cut for i, cut in waiting.items() if len(texts[i]) > 2.5 * cut}
            short = [i for i in waiting if i not in cuts]
            results |= zip(short, self._encoded([texts[i] for i in short], [spans[i] for i in short]), strict=True)
            nearer = self._encoded([texts[i][:cut] for i, cut in cuts.items()], [spans[i] for i in cuts])
            # an odd number of characters farther: whatever comes in pairs is cut differently
            farther = self._encoded([texts[i][: int(cut * _FARTHER) | 1] for i, cut in cuts.items()], [()] * len(cuts))
            read = [*(len(texts[i]) for i in short), *cuts.values()]
            self._learn(read, [*(len(results[i][0]) for i in short), *(len(ids) for ids, _ in nearer)])
            waiting = {}
            for (i, cut), (ids, found), (others, _) in zip(cuts.items(), nearer, farther, strict=True):
                counts = limit + _MARGIN
                if len(ids) >= counts and len(others) >= counts and ids[: limit + 1] == others[: limit + 1]:
                    results[i] = ids, found
                else:
                    waiting[i] = cut * 2 | 1
        return [results[i] for i in range(len(texts))]

    def _guess(self, limit: int) -> int:
        return int((limit + 2 * _MARGIN) * max(self._characters_per_token, 1.0) * 1.25) | 1

    def _learn(self, characters: Sequence[int], tokens: Sequence[int]) -> None:
        if sum(tokens) > 1000:
            self._characters_per_token = sum(characters) / sum(tokens)

    @cached_property
    def _spelling(self) -> Spelling | None:
        return Spelling.of(self._backend)

    def _encoded(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Encoded]:
        """Each text's ids, and where its spans lie in them."""
        results: dict[int, Encoded] = {}
        quick = [i for i in range(len(texts)) if self._spelling is not None or not spans[i]]
        encodings = self._backend.encode_batch_fast([texts[i] for i in quick], add_special_tokens=False)
        for i, encoding in zip(quick, encodings, strict=True):
            ids = encoding.ids
            found = self._spelling.locate(ids, texts[i], spans[i]) if self._spelling and spans[i] else []
            if found is not None:
                results[i] = ids, found
        if rest := [i for i in range(len(texts)) if i not in results]:
            encodings = self._backend.encode_batch([texts[i] for i in rest], add_special_tokens=False)
            for i, encoding in zip(rest, encodings, strict=True):
                results[i] = _located(encoding, spans[i], len(texts[i]))
        return [results[i] for i in range(len(texts))]


def _located(encoding: Any, spans: Sequence[Span], length: int) -> Encoded:
    return encoding.ids, [_tokens_of(encoding, start, min(end, length)) for start, end in spans]


def _tokens_of(encoding: Any, start: int, end: int) -> Span:
    """The tokens [first, last) with any of the characters [start, end); several may have one and the same."""
    first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1) if start < end else None
    if first is None or last is None:
        near = range(start, min(start + _NEAR, end)), range(end - 1, max(end - 1 - _NEAR, start - 1), -1)
        first, last = (
            next((t for c in places if (t := encoding.char_to_token(c)) is not None), None) for places in near
        )
    if first is not None and last is not None:
        last += 1
        while last < len(encoding) and (span := encoding.token_to_chars(last)) is not None and span[0] < end:
            last += 1
        return first, last
    offsets = encoding.offsets
    first, last = bisect_right(offsets, start, key=_end), bisect_left(offsets, end, key=_begin)
    return (first, last) if first < last else (0, 0)


def _begin(span: Span) -> int:
    return span[0]


def _end(span: Span) -> int:
    return span[1]
