"""Token ids of texts of which only the beginning counts: no more of a long one is tokenised than that.

A row takes --seq tokens, and a document may be a thousand times as long. Cut anywhere, a text's tokens change near
the cut; so its beginning is tokenised twice, cut at two places, and what counts must be the same in both and end well
before the nearer cut. Where it does not, more is tokenised, in the end the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

from entrenar_gpu.chat import Span

_FIRST_GUESS = 4.0  # characters per token, until texts have shown better
_MARGIN = 64  # tokens before the cut that do not count
_FARTHER = 1.5  # the second cut, by the first


class PrefixEncoder:
    """Encodes without what a post-processor adds. Remembers how many characters a token has in these texts."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._characters_per_token = _FIRST_GUESS

    def encode(
        self, texts: Sequence[str], limit: int | None = None, offsets: bool = True
    ) -> list[tuple[list[int], list[Span]]]:
        """(ids, offsets in characters) of each text: all of them, or at least the first `limit` where there are more.

        Offsets are empty unless asked for.
        """
        if limit is None:
            return self._whole(texts, offsets)
        results: dict[int, tuple[list[int], list[Span]]] = {}
        waiting = dict.fromkeys(range(len(texts)), self._guess(limit))
        while waiting:
            cuts = {i: cut for i, cut in waiting.items() if len(texts[i]) > 2.5 * cut}
            short = [i for i in waiting if i not in cuts]
            results.update(zip(short, self._whole([texts[i] for i in short], offsets), strict=True))
            nearer = self._whole([texts[i][:cut] for i, cut in cuts.items()], offsets)
            # an odd number of characters farther: whatever comes in pairs is cut differently
            farther = self._whole([texts[i][: int(cut * _FARTHER) | 1] for i, cut in cuts.items()], offsets)
            waiting = {}
            for (i, cut), (ids, places), (others, _) in zip(cuts.items(), nearer, farther, strict=True):
                counts = limit + _MARGIN
                if len(ids) >= counts and len(others) >= counts and ids[: limit + 1] == others[: limit + 1]:
                    results[i] = ids[:counts], places[:counts]
                else:
                    waiting[i] = cut * 2 | 1
            read = [*(len(texts[i]) for i in short), *cuts.values()]
            self._learn(read, [*(len(results[i][0]) for i in short), *(len(ids) for ids, _ in nearer)])
        return [results[i] for i in range(len(texts))]

    def _guess(self, limit: int) -> int:
        return int((limit + 2 * _MARGIN) * max(self._characters_per_token, 1.0) * 1.25) | 1

    def _learn(self, characters: Sequence[int], tokens: Sequence[int]) -> None:
        if sum(tokens) > 1000:
            self._characters_per_token = sum(characters) / sum(tokens)

    def _whole(self, texts: Sequence[str], offsets: bool) -> list[tuple[list[int], list[Span]]]:
        if not texts:
            return []
        if offsets:
            return [(e.ids, e.offsets) for e in self._backend.encode_batch(list(texts), add_special_tokens=False)]
        return [(e.ids, []) for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
