"""Token ids of texts of which only the beginning counts: no more of a long one is tokenised than that.

A row takes --seq tokens, and a document may be a thousand times as long. Cut anywhere, a text's tokens change near
the cut; so its beginning is tokenised twice, cut at two places, and what counts must be the same in both and end well
before the nearer cut. Where it does not, more is tokenised, in the end the whole text.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
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
Encoded = tuple["array[int]", list[Span]]


@dataclass(frozen=True)
class Beginning:
    """A text as far as it was tokenised, and its encoding, which tells where characters lie if it is `placed`."""

    text: str
    encoding: Any
    placed: bool


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
        return self.locate(self.begin(texts, limit, [bool(places) for places in spans]), spans)

    def begin(self, texts: Sequence[str], limit: int, placed: Sequence[bool]) -> list[Beginning]:
        """The first half of `encode`, which is the tokenizer's work: it lets other threads run, `locate` hardly does.

        `placed` says of each text whether places of characters will be asked of it.
        """
        results: dict[int, Beginning] = {}
        waiting = dict.fromkeys(range(len(texts)), self._guess(limit))
        while waiting:
            cuts = {i: cut for i, cut in waiting.items() if len(texts[i]) > 2.5 * cut}
            short = [i for i in waiting if i not in cuts]
            results |= zip(short, self._begun([texts[i] for i in short], [placed[i] for i in short]), strict=True)
            if not cuts:
                self._learn([results[i] for i in short])
                break
            nearer = self._begun([texts[i][:cut] for i, cut in cuts.items()], [placed[i] for i in cuts])
            # an odd number of characters farther: whatever comes in pairs is cut differently
            farther = self._begun([texts[i][: int(cut * _FARTHER) | 1] for i, cut in cuts.items()], [False] * len(cuts))
            self._learn([*(results[i] for i in short), *nearer])
            waiting = {}
            for (i, cut), near, far in zip(cuts.items(), nearer, farther, strict=True):
                counts = limit + _MARGIN
                long = len(near.encoding) >= counts and len(far.encoding) >= counts
                if long and near.encoding.ids[: limit + 1] == far.encoding.ids[: limit + 1]:
                    results[i] = near
                else:
                    waiting[i] = cut * 2 | 1
        return [results[i] for i in range(len(texts))]

    def locate(self, begun: Sequence[Beginning], spans: Sequence[Sequence[Span]]) -> list[Encoded]:
        """The second half of `encode`: ids, and where spans lie among them."""
        ids = [array("i", beginning.encoding.ids) for beginning in begun]
        asked = [i for i, places in enumerate(spans) if places and not begun[i].placed]
        spelt: list[list[Span] | None] = [None] * len(asked)
        if asked and self._spelling:
            texts = [begun[i].text for i in asked]
            spelt = self._spelling.locate([ids[i] for i in asked], texts, [spans[i] for i in asked])
        found = {i: _places(b, spans[i]) for i, b in enumerate(begun) if b.placed and spans[i]}
        found |= {i: places for i, places in zip(asked, spelt, strict=True) if places is not None}
        lost = [i for i in asked if i not in found]
        again = zip(lost, self._placed([begun[i].text for i in lost]), strict=True)
        found |= {i: _places(beginning, spans[i]) for i, beginning in again}
        return [(row, found.get(i, [])) for i, row in enumerate(ids)]

    def _guess(self, limit: int) -> int:
        return int((limit + 2 * _MARGIN) * max(self._characters_per_token, 1.0) * 1.25) | 1

    def _learn(self, begun: Sequence[Beginning]) -> None:
        tokens = sum(len(beginning.encoding) for beginning in begun)
        if tokens > 1000:
            self._characters_per_token = sum(len(beginning.text) for beginning in begun) / tokens

    @cached_property
    def _spelling(self) -> Spelling | None:
        return Spelling.of(self._backend)

    def _begun(self, texts: Sequence[str], placed: Sequence[bool]) -> list[Beginning]:
        with_places = [i for i, asked in enumerate(placed) if asked and not self._spelling]
        others = [i for i, asked in enumerate(placed) if not asked or self._spelling]
        results = dict(zip(with_places, self._placed([texts[i] for i in with_places]), strict=True))
        encodings = self._backend.encode_batch_fast([texts[i] for i in others], add_special_tokens=False)
        results |= {i: Beginning(texts[i], e, False) for i, e in zip(others, encodings, strict=True)}
        return [results[i] for i in range(len(texts))]

    def _placed(self, texts: Sequence[str]) -> list[Beginning]:
        encodings = self._backend.encode_batch(texts, add_special_tokens=False) if texts else []
        return [Beginning(text, encoding, True) for text, encoding in zip(texts, encodings, strict=True)]


def _places(beginning: Beginning, spans: Sequence[Span]) -> list[Span]:
    length = len(beginning.text)
    return [_tokens_of(beginning.encoding, start, min(end, length)) for start, end in spans]


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
