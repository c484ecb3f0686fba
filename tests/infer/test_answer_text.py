"""Text as it is told while tokens come: whole characters, and nothing that a stop string takes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar_gpu.cli.demo import MODEL
from entrenar_gpu.data import Tokenizer
from entrenar_gpu.infer.answer_text import AnswerText

TOKENIZER = Tokenizer.load(MODEL)


class Letters:
    """Token i is the i-th text; a decoder that strips a leading space, as SentencePiece's does."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def decode(self, ids):
        return "".join(self.texts[i] for i in ids).removeprefix(" ")


def told(tokenizer, ids, stops=()) -> list[str]:
    text = AnswerText(tokenizer, stops)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            return pieces
    return [*pieces, text.end()]


@pytest.mark.parametrize("text", ["naïve 中文 😀 end", "\ufffd real", "😀", " leading", "  two\n\n lines "])
def test_pieces_join_to_the_whole_wherever_it_is_cut(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    for most in range(1, len(ids) + 1):
        pieces = told(TOKENIZER, ids[:most])
        assert "".join(pieces) == TOKENIZER.decode(ids[:most])
        assert all(not piece.endswith("\ufffd") for piece in pieces[:-1]) or "\ufffd" in text


@given(st.text(min_size=1, max_size=40))
def test_any_text_is_told_as_decoded_whole(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert "".join(told(TOKENIZER, ids)) == TOKENIZER.decode(ids)


def test_a_space_at_the_beginning_of_a_window_stays():
    words = Letters(" a", " b", " c")
    assert told(words, [0, 1, 2, 1, 0]) == ["a", " b", " c", " b", " a", ""]


@given(st.lists(st.integers(0, 3), max_size=30), st.sampled_from([("ab",), ("aab", "b c"), ("abab", "c"), ("cc ",)]))
def test_nothing_of_a_stop_string_is_told_and_nothing_before_it_is_lost(ids, stops):
    letters = Letters("a", "b", "c", "ab ")
    whole = letters.decode(ids)
    pieces = told(letters, ids, stops)
    # the stop string that is complete first ends it; what stands before it is told
    ends = [whole[:end] for end in range(len(whole) + 1) if any(stop in whole[:end] for stop in stops)]
    if not ends:
        assert "".join(pieces) == whole
        return
    said = "".join(pieces)
    assert whole.startswith(said)
    assert any(whole[len(said) :].startswith(stop) for stop in stops)
    assert not any(stop in said for stop in stops)


def test_a_possible_beginning_is_held_until_it_is_none():
    letters = Letters("It is #", "#", "# or", " ###", " End", "less")
    assert told(letters, [0, 1, 2, 3, 4, 5], ["### End"]) == ["It is ", "", "### or", " ", ""]
    assert told(letters, [0, 1, 2, 3], ["### End"])[-2:] == [" ", "###"]
