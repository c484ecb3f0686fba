"""Where characters lie among the tokens of a byte-level BPE, told from the tokens alone.

`encode_batch` keeps the place of each token and takes twice as long as `encode_batch_fast`, which keeps none. But the
tokens of a byte-level BPE (GPT-2's and all that came of it) spell their text's bytes out one after the other: how many
each token stands for is in the vocabulary, and their sums are the places.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
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

    def locate(self, ids: Sequence[int], text: str, spans: Sequence[Span]) -> list[Span] | None:
        """For each span of characters of `text` the tokens [first, last) with any of these, (0, 0) if none; None where
        the tokens spell another text: a normalizer changed it, or an added token took the blanks beside it."""
        ends = np.cumsum(self._bytes[np.asarray(ids, np.int64)])
        plain = text.isascii()
        size = len(text) if plain else len(text.encode())
        if size != (ends[-1] if len(ends) else 0) or not (plain or unicodedata.is_normalized("NFC", text)):
            return None
        edges = [min(edge, len(text)) for span in spans for edge in span]
        if not plain:
            edges = [len(text[:edge].encode()) for edge in edges]
        first = np.searchsorted(ends, edges[::2], "right").tolist()
        last = np.searchsorted(ends, edges[1::2], "left").tolist()
        held = (start < end for start, end in zip(edges[::2], edges[1::2], strict=True))
        return [(a, b + 1) if some else (0, 0) for a, b, some in zip(first, last, held, strict=True)]


def _steps(part: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """What a normalizer or a pre-tokenizer does, one after the other."""
    waiting = [] if part is None else [json.loads(part.__getstate__())]
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting[:0] = step[name]
        else:
            yield step
