"""Where characters lie among the tokens of a byte-level BPE, told from the tokens alone.

`encode_batch` keeps the place of each token and takes twice as long as `encode_batch_fast`, which keeps none. But the
tokens of a byte-level BPE (GPT-2's and all that came of it) spell their text's bytes out one after the other: how many
each token stands for is in the vocabulary, and their sums are the places.
"""

from __future__ import annotations

import json
import unicodedata
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from entrenar_gpu.chat import Span

_KEEP_ALL = ("Split", "Digits", "ByteLevel")  # cut a text into words and leave nothing out


class Spelling:
    """How many bytes each token id stands for [vocabulary]."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        vocabulary = backend.get_vocab(with_added_tokens=False)
        added = {i: len(token.content.encode()) for i, token in backend.get_added_tokens_decoder().items()}
        self._bytes: NDArray[np.int64] = np.zeros(max([*vocabulary.values(), *added], default=-1) + 1, np.int64)
        for token, i in vocabulary.items():
            self._bytes[i] = len(token)  # a character for each byte
        for i, length in added.items():
            self._bytes[i] = length

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> Spelling | None:
        """None where tokens do not spell their text out, or where that is not known."""
        model, cutter = backend.model, backend.pre_tokenizer
        if not isinstance(model, tokenizers.models.BPE) or cutter is None:
            return None
        plain = not (model.continuing_subword_prefix or model.end_of_word_suffix or model.byte_fallback)
        composed = all(step["type"] == "NFC" for step in _steps(backend.normalizer, "normalizers"))
        steps = list(_steps(cutter, "pretokenizers"))
        kept = all(step["type"] in _KEEP_ALL and step.get("behavior") != "Removed" for step in steps)
        spelt = [step for step in steps if step["type"] == "ByteLevel"]
        as_it_is = bool(spelt) and not any(step["add_prefix_space"] for step in spelt)
        return cls(backend) if plain and composed and kept and as_it_is else None

    def locate(
        self, ids: Sequence[array[int]], texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[list[Span] | None]:
        """For each span of characters of each text the tokens [first, last) with any of these, (0, 0) if none; None
        where a text's ids spell another: a normalizer changed it, or an added token took the blanks beside it."""
        every = np.concatenate([np.zeros(0, np.int32), *(np.frombuffer(row, np.int32) for row in ids if row)])
        ends = np.concatenate([[0], np.cumsum(self._bytes[every])])  # bytes up to each token, text after text
        bounds = np.cumsum([0, *map(len, ids)])
        begins = ends[bounds].tolist()
        edges: list[int] = []
        counts = []  # of spans; none where a text is not spelt
        spelt = [begins[i] + _size(text) == begins[i + 1] and _composed(text) for i, text in enumerate(texts)]
        for begin, text, places, there in zip(begins, texts, spans, spelt, strict=False):
            counts.append(len(places) if there else 0)
            if there:
                edges += [begin + _size(text[:edge]) for span in places for edge in span]
        starts, stops = np.array(edges[::2], np.int64), np.array(edges[1::2], np.int64)
        first = np.searchsorted(ends[1:], starts, "right")
        last = np.searchsorted(ends[1:], stops, "left") + 1
        found = np.stack([first, last], 1) - np.repeat(bounds[:-1], counts)[:, None]
        pairs = iter(map(tuple, np.where((starts < stops)[:, None], found, 0).tolist()))
        return [list(islice(pairs, n)) if there else None for n, there in zip(counts, spelt, strict=True)]


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _composed(text: str) -> bool:
    return text.isascii() or unicodedata.is_normalized("NFC", text)


def _steps(part: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """What a normalizer or a pre-tokenizer does, one after the other."""
    waiting = [] if part is None else [json.loads(part.__getstate__())]
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting[:0] = step[name]
        else:
            yield step
