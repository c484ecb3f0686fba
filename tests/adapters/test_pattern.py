"""Patterns of strangers are matched as `re` does, and in bounded time."""

import re
import time

import pytest

from entrenar_gpu.adapters.pattern import TooSlow, check_pattern, full_match

PATH = "model.layers.11.self_attn.q_proj"
PATTERNS = [
    r".*\.q_proj",
    r"model\.layers\.(\d+)\.self_attn\.(q|k)_proj",
    r"(.*\.)?(layers.1.self_attn.q_proj)",
    "q_proj",
    "",
]
ENDLESS = [r"((.*)*)*\d!", r"(\w|\.|\w\.)*!", r"(.*.*.*.*.*.*.*.*.*.*.*.*)*!", r"(a?){60}(.|..)*!"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_match_is_that_of_re(pattern):
    ours, theirs = full_match(pattern, PATH), re.fullmatch(pattern, PATH)
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        assert ours.groups() == theirs.groups()


@pytest.mark.parametrize("pattern", ENDLESS)
def test_one_that_backtracks_for_ever_is_one_line(pattern):
    start, message = time.monotonic(), ""
    try:
        assert full_match(pattern, PATH * 3) is None
    except TooSlow as error:
        message = str(error)
    assert message == "" or message.startswith("pattern ")
    assert "\n" not in message
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("pattern", ["(", "*", "[a", "a{2,1}", "(?P<x"])
def test_what_is_no_pattern_is_told(pattern):
    with pytest.raises(ValueError, match=r"\w"):
        check_pattern(pattern)
