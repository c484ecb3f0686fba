"""Drafts from what stood before, and when they are tried."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from entrenar_gpu.infer.drafts import LONGEST_DRAFT, NgramIndex, Speculation


def looked_up(tokens: list[int], longest: int) -> list[int]:
    """The definition, by looking through everything: the latest earlier place of the last 3 tokens, else of 2."""
    for n in (3, 2):
        ends = [e for e in range(n, len(tokens)) if tokens[e - n : e] == tokens[-n:]]
        if len(tokens) >= n and ends:
            return tokens[ends[-1] : ends[-1] + longest]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40), st.integers(1, 6))
def test_a_draft_is_what_followed_last_time(tokens, known, longest):
    index = NgramIndex(tokens[:known])
    for token in tokens[known:]:
        index.push(token)
    assert index.draft(longest) == looked_up(tokens, longest)


def steps(seconds_with: float, yielded: int, count: int) -> list[bool]:
    """Whether each of `count` steps was drafted, where a plain step takes a second."""
    speculation, drafted = Speculation(), []
    for _ in range(count):
        longest = speculation.longest()
        drafted.append(longest > 0)
        if longest:
            speculation.stepped(seconds_with, 1, longest, yielded)
        else:
            speculation.stepped(1.0, 1, 0, 1)
    return drafted


def test_drafts_go_on_where_they_are_faster_and_stop_where_they_are_not():
    faster, slower = steps(1.2, 4, 200), steps(2.0, 1, 200)
    assert not any(faster[:3])
    assert sum(faster[3:]) > 180
    assert sum(slower) < 40
    assert any(slower[100:]), "they are tried again"
    speculation = Speculation()
    for seconds in (9.0, 1.0, 1.0, 1.0):  # the first compiles
        speculation.stepped(seconds, 1, 0, 1)
    for seconds in (9.0, 1.2, 1.2):
        speculation.stepped(seconds, 1, 8, 4)
    assert speculation.longest() == LONGEST_DRAFT
    assert not any(Speculation(enabled=False).longest() for _ in range(100))
    assert LONGEST_DRAFT > 1
