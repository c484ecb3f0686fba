"""Places told from the lengths of tokens are those that the tokenizer itself gives."""

from __future__ import annotations

import unicodedata
from array import array
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from entrenar_gpu.data.prefix import PrefixEncoder
from entrenar_gpu.data.spelling import Spelling

TEXTS = ["the cat", " sat", "\n\n", "mät", "日本語", "👩‍👩‍👧", "e\u0301", "it's", "  12345", "<|end|>", "\u00a0", "ﬁ"]


def make(prefix_space: bool = False, normalizer=None, **end: bool) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([" ".join(TEXTS)] * 5, trainer)
    made.add_special_tokens([AddedToken("<|end|>", **end)])
    if normalizer is not None:
        made.normalizer = normalizer
    return made


def located(backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[tuple[int, int]] | None]:
    """Where the first character of each text lies, among the tokens of all of them."""
    ids = [array("i", backend.encode(text, add_special_tokens=False).ids) for text in texts]
    return Spelling.of(backend).locate(ids, texts, [[(0, 1)]] * len(texts))


@pytest.fixture(scope="module", params=["plain", "composing", "greedy end"])
def backend(request):
    options = {"composing": {"normalizer": normalizers.NFC()}, "greedy end": {"lstrip": True, "rstrip": True}}
    return make(**options.get(request.param, {}))


@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_spans_are_the_tokens_that_have_any_of_their_characters(backend, words):
    text = "".join(words)
    edges = sorted({0, len(words[0]), len(text)})
    if unicodedata.is_normalized("NFC", text):  # else half a character may have no token
        edges = sorted({*edges, len(text) // 2, len(text) // 2 + 1})
    spans = list(pairwise(edges))
    whole = backend.encode(text, add_special_tokens=False)
    ((ids, found),) = PrefixEncoder(backend).encode([text], 1000, [spans])
    assert list(ids) == whole.ids
    for (start, end), (first, last) in zip(spans, found, strict=True):
        wanted = [i for i, (a, b) in enumerate(whole.offsets) if a < end and b > start]
        assert list(range(first, last)) == wanted


def test_tokens_that_spell_another_text_tell_no_places():
    composed = make(normalizer=normalizers.NFC())
    assert located(composed, ["mät"]) == [[(0, 1)]]
    assert located(composed, ["mät", "e\u0301e", "", "mät"]) == [[(0, 1)], None, [(0, 0)], [(0, 1)]]
    assert located(make(lstrip=True), ["cat  <|end|>"]) == [None]


def test_only_tokenizers_that_spell_their_text_out_are_taken():
    assert Spelling.of(make(prefix_space=True)) is None
    assert Spelling.of(make(normalizer=normalizers.Lowercase())) is None
    assert Spelling.of(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))) is None
    removing = make()
    removing.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), removing.pre_tokenizer])
    assert Spelling.of(removing) is None
