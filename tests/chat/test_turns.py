"""The frame of a kind of conversation, learned once: it finds the turns that searching each conversation finds."""

from datetime import datetime

import pytest

from entrenar_gpu.chat.sandbox import CompiledTemplate
from entrenar_gpu.chat.turns import Conversations
from tests.data.test_chat import TURNS, assistant, user
from tests.helpers import chat_templates

NAMES = ("QWEN3", "QWEN3_THINKING", "QWEN25", "LLAMA3", "LLAMA2", "CLOSED", "SCRIPT")
CONTENTS = [
    ("a", "b"),
    (" a ", "b\n"),
    ("a\u00a0", "\u2003b"),
    ("same", "same"),
    ("<tool_response>1</tool_response>", "b"),
    ("a", "<think>\nhm\n</think>\n\nb"),
    ("a", "\nb"),
    ("a", ""),
    ("<|im_end|>", "b<|im_end|>"),
]


def conversations(name: str) -> Conversations:
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    template = CompiledTemplate(
        getattr(chat_templates, name), named, chat_templates.SPECIAL_TOKENS, datetime(2024, 1, 1)
    )
    return Conversations(template)


@pytest.mark.parametrize("name", NAMES)
def test_spans_are_those_of_the_search(name):
    """Of two turns with every pair of contents: by a frame learned before, and without one."""
    learned = conversations(name)
    for content in ("x", "y", "z"):
        learned.render_turns([user(content), assistant(content)] * 2, None, {})
    frames = [frame for frame in learned._frames.values() if frame is not None]
    assert frames
    for first in CONTENTS:
        for second in CONTENTS[:1] + CONTENTS[-4:]:
            messages = [user(first[0]), assistant(first[1]), user(second[0]), assistant(second[1])]
            assert learned.render_turns(messages, None, {}) == conversations(name).render_turns(messages, None, {})


@pytest.mark.parametrize(("source", "messages", "expected"), TURNS.values(), ids=TURNS)
def test_turns_are_the_same_when_seen_again(source, messages, expected):
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    made = Conversations(CompiledTemplate(source, named, chat_templates.SPECIAL_TOKENS, datetime(2024, 7, 26)))
    for _ in range(3):
        rendered = made.render_turns(messages, None, {})
        assert [rendered.text[start:end] for start, end in rendered.spans] == expected


def test_the_frame_is_what_finds_them():
    made = conversations("QWEN25")
    rows = [[user(str(i)), assistant("b" * i)] for i in range(1, 5)]
    for row in rows[:2]:
        made.render_turns(row, None, {})
    made._located = None  # no search from now on
    for row in rows[2:]:
        rendered = made.render_turns(row, None, {})
        ((start, end),) = rendered.spans
        assert rendered.text[start:end] == row[1]["content"] + "<|im_end|>"
