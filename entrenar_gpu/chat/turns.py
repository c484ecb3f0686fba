"""Where in a rendering the assistant speaks, and what closes its turns.

What is trained is what the model itself would say when asked: from the end of the generation prompt up to and
including the token that ends the turn, in the one rendering of the whole conversation. So Qwen3's empty think block
in the last turn is trained (its generation prompt stops before it), and the newline after `<|im_end|>` is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entrenar_gpu.chat.habits import Habits
from entrenar_gpu.chat.sandbox import (
    ASKED,
    CLOSE,
    OPEN,
    SAID,
    SLOT,
    SLOT_END,
    CompiledTemplate,
    Message,
    Span,
    TemplateFailure,
)

_SKELETONS = 256  # kept; ordinary files have fewer kinds of conversation
_TOOL_ROLES = ("tool", "function", "ipython")
_PADDING = "\t \t"  # around a slot: shows what a template strips


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the character span [start, end) of each stretch that the assistant says."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class _Frame:
    """What one conversation's kind has around its contents: before each and after the last, which ends of a content
    are stripped, and for each turn of the assistant its message and how far it reaches beyond the content."""

    around: list[str]
    stripped: list[tuple[bool, bool]]
    turns: list[tuple[int, int, int]]

    def fit(self, text: str, contents: Sequence[str]) -> list[Span] | None:
        """The assistant's spans in `text`, where that is exactly these contents in this frame."""
        at, places, pieces = 0, [], []
        for before, content, (left, right) in zip(self.around, contents, self.stripped, strict=False):
            content = content.lstrip() if left else content
            content = content.rstrip() if right else content
            places.append((at + len(before), at + len(before) + len(content)))
            at = places[-1][1]
            pieces += [before, content]
        if "".join([*pieces, self.around[-1]]) != text:
            return None
        return [(places[i][0] - before, places[i][1] + after) for i, before, after in self.turns]


class Conversations:
    """Renders conversations with one template, each put in the form that the template reads."""

    def __init__(self, template: CompiledTemplate) -> None:
        self._template = template
        self._habits = Habits(template)
        self._frames: dict[str, _Frame | None] = {}
        self._seen: set[str] = set()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        variables: Mapping[str, Any],
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """The conversation as the model reads it; with the opening of the assistant's turn if asked. Marks no turn."""
        messages = self._habits.adapt(messages)
        return Rendered(_unmarked(self._template.render(messages, tools, add_generation_prompt, variables)).text, [])

    def render_turns(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> Rendered:
        """The conversation, and what the assistant says in it: the template's `generation` tags, or every turn.

        Raises TemplateFailure when the template gives no way to tell a turn's extent.
        """
        messages = self._habits.adapt(messages)
        rendered = _unmarked(self._template.render(messages, tools, False, variables))
        if rendered.spans:
            said = "".join(rendered.text[start:end] for start, end in rendered.spans)
            for i, message in enumerate(messages):
                if any(name not in said for name in _called_names(message)):
                    raise _uncalled(i)
            return rendered
        frame = self._frame(messages, tools, variables)
        spans = frame.fit(rendered.text, [message["content"] for message in messages]) if frame else None
        return Rendered(
            rendered.text, self._located(rendered.text, messages, tools, variables) if spans is None else spans
        )

    def closings(self, tools: Sequence[Any] | None = None) -> list[str]:
        """The text of what closes the assistant's turn: its first special token, or all there is. Empty if unknown.

        Of the last turn of a conversation; where nothing closes that, of one that is followed by another.
        """
        user, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": SAID}
        for conversation in ([user, said], [user, said, user]):
            for messages in (conversation, [{"role": "system", "content": "a"}, *conversation]):
                try:
                    after = _unmarked(self._template.render(messages, tools)).text.partition(SAID)[2]
                except TemplateFailure:
                    continue
                if len(conversation) > 2:
                    ends = self._special_ends(after)
                    closing = after[: min(ends)[1]] if ends else ""
                else:
                    closing = after[: self._closing_length(after)]
                specials = sorted(self._special_ends(closing))
                if closing.strip():
                    return [closing[slice(*specials[0])] if specials else closing.strip()]
        return []

    def _frame(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> _Frame | None:
        """The frame of conversations of this kind, from the second one on; None where contents may change it."""
        if not all(
            isinstance(m.get("content"), str) and m["content"].strip() and not m.get("tool_calls") for m in messages
        ):
            return None
        others = [m["role"] if len(m) == 2 else sorted({**m, "content": ""}.items(), key=str) for m in messages]
        kind = json.dumps([others, tools, variables])
        if kind not in self._frames:
            if len(self._seen) >= _SKELETONS:
                self._seen.clear()
                self._frames.clear()
            if kind not in self._seen:
                self._seen.add(kind)
                return None
            self._frames[kind] = self._learn(messages, tools, variables)
        return self._frames[kind]

    def _learn(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> _Frame | None:
        """The frame of a conversation whose every content is a slot; the slots' numbers keep them apart."""
        slots = [f"{SLOT}{i}{SLOT_END}" for i in range(len(messages))]
        shown = [
            {**message, "content": _PADDING + slot + _PADDING} for message, slot in zip(messages, slots, strict=True)
        ]
        try:
            text = self._template.render(shown, tools, False, variables)
            spans = self._located(text, shown, tools, variables)
        except TemplateFailure:
            return None
        parts = re.split(f"({SLOT}[0-9]+{SLOT_END})", text)
        if parts[1::2] != slots:
            return None
        around, stripped, turns, at = [], [], [], 0
        roles = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i, slot in enumerate(slots):
            before, after = parts[2 * i], parts[2 * i + 2]
            kept = before.endswith(_PADDING), after.startswith(_PADDING)
            begin = at + len(before)
            end = begin + len(slot)
            if kept[0]:
                begin, parts[2 * i] = begin - len(_PADDING), before[: -len(_PADDING)]
            if kept[1]:
                end, parts[2 * i + 2] = end + len(_PADDING), after[len(_PADDING) :]
            around.append(parts[2 * i])
            stripped.append((not kept[0], not kept[1]))
            if i in roles:
                start, stop = spans[roles.index(i)]
                turns.append((i, begin - start, stop - end))
            at = end
        return _Frame([*around, parts[-1]], stripped, turns)

    def _located(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> list[Span]:
        find = _Search(self._template, tools, variables, self._closing_length)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [find.turn(messages, i, text) for i in turns]
        # Gemma 4 writes what a tool answers into the turn that called it: not the assistant's words.
        for place in filter(
            None, (find.place(messages, i) for i, m in enumerate(messages) if m["role"] in _TOOL_ROLES)
        ):
            for i, (start, end) in zip(turns, spans, strict=True):
                if start <= place < end:
                    raise _untraceable(i)
        return spans

    def _special_ends(self, closing: str) -> list[Span]:
        """The first place of each special token in `closing`."""
        return [(at, at + len(t)) for t in self._template.special_tokens if t and (at := closing.find(t)) >= 0]

    def _closing_length(self, closing: str) -> int:
        """Length of the part of `closing` that the model says: to the end of its first special token, if any."""
        ends = self._special_ends(closing)
        return min(ends)[1] if ends else len(closing.rstrip())


class _Search:
    """Finds turns by putting a mark in place of a content and rendering again."""

    def __init__(
        self, template: CompiledTemplate, tools: Any, variables: Mapping[str, Any], closing_length: Any
    ) -> None:
        self._template, self._tools, self._variables = template, tools, variables
        self._closing_length = closing_length

    def turn(self, messages: Sequence[Message], i: int, text: str) -> Span:
        """The span of message `i` in the rendering `text`."""
        names, failures = _called_names(messages[i]), []
        for said in _marked_turns(messages[i]):
            try:
                start, end = self._turn(messages, i, text, said)
                if all(name in text[start:end] for name in names):
                    return start, end
                raise _untraceable(i)
            except TemplateFailure as failure:
                failures.append(failure)
        if names and SAID not in self._rendered([*messages[:i], said, *messages[i + 1 :]]):  # the last has it in a name
            raise _uncalled(i)
        raise failures[0]

    def _turn(self, messages: Sequence[Message], i: int, text: str, said: Message) -> Span:
        """The same, by `said`, which has a mark, in place of the message."""
        before, after = self._around(SAID, [*messages[:i], said, *messages[i + 1 :]], i)
        frame = self._frame(messages, i, said)
        start = len(before) - len(frame)

        # The closing follows the content whether or not another message comes.
        alone = after if i == len(messages) - 1 else self._around(SAID, [*messages[:i], said], i)[1]
        rest = after[self._closing_length(after[: _common_length(after, alone)]) :]
        end = len(text) - len(rest)

        located = before.endswith(frame) and text.startswith(before[:start]) and text.endswith(rest) and start <= end
        if not located:
            raise _untraceable(i)
        return start, end

    def _frame(self, messages: Sequence[Message], i: int, said: Message) -> str:
        """What stands between the generation prompt and the mark in `said`.

        Both are read from the end of the question, which is marked too: what comes earlier may render differently in
        the shorter conversation that ends with the prompt.
        """
        context = messages[:i] or [{"role": "user"}]
        asked = [*context[:-1], _asking(context[-1])]
        last = len(asked) - 1
        prompt = self._around(ASKED, asked, last, add_generation_prompt=True)[1]
        answered = self._around(ASKED, [*asked, said, *messages[i + 1 :]], last)[1].partition(SAID)[0]
        shared = _common_length(prompt, answered)
        if shared < len(prompt):
            # So may the end of the question (Hermes closes the last tool's answer otherwise): then the opening of the
            # turn, which is what is asked for beside the question, is looked for by itself.
            bare = self._around(ASKED, asked, last)[1]
            opening = prompt[_common_length(prompt, bare) :]
            if opening and opening in answered:
                shared = answered.rindex(opening) + len(opening)
            elif opening and shared < len(prompt) - len(opening):
                raise _untraceable(i)
        return answered[shared:]

    def place(self, messages: Sequence[Message], i: int) -> int | None:
        """Where in the rendering something of message `i`, none of the assistant's, stands; None where that is not to
        be told, as of an empty one."""
        if not isinstance(messages[i].get("content"), str) or not messages[i]["content"].strip():
            return None
        marked = [*messages[:i], _asking(messages[i]), *messages[i + 1 :]]
        place = self._rendered(marked).find(ASKED)
        return place if place >= 0 else None

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return self._template.render(messages, self._tools, add_generation_prompt, self._variables)

    def _around(
        self, mark: str, messages: Sequence[Message], i: int, add_generation_prompt: bool = False
    ) -> tuple[str, str]:
        """The rendering before and after `mark`, which stands in place of the content of message `i`."""
        before, found, after = self._rendered(messages, add_generation_prompt).partition(mark)
        if not found:
            raise _untraceable(i)
        return before, after


def _untraceable(i: int) -> TemplateFailure:
    return TemplateFailure(
        f"cannot tell where the chat template puts message {i + 1}; loss on all tokens (--loss-on all)"
        " needs no such place"
    )


def _uncalled(i: int) -> TemplateFailure:
    return TemplateFailure(f"message {i + 1}: the chat template writes no tool calls", at_fault=False)


def _marked_turns(message: Message) -> Iterator[Message]:
    """A turn of the assistant with a mark in it: as its content, which is the plainest, or where the template asks for
    more of the turn behind its content, or in the name of what it calls."""
    content, calls = message.get("content"), message.get("tool_calls")
    yield {"role": "assistant", "content": _in_form(content, SAID)}
    if calls and isinstance(calls[0], Mapping):
        yield {**message, "tool_calls": [_renamed(calls[0]), *calls[1:]]}
    elif isinstance(content, str):
        yield {**message, "content": content + SAID}


def _renamed(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _renamed(call["function"])}
    return {**call, "name": SAID}


def _called_names(message: Message) -> list[str]:
    """What a turn of the assistant calls, where templates write it as it is."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or [] if isinstance(call, Mapping)]
    names = [call.get("name") for call in calls if isinstance(call, Mapping)]
    return [name for name in names if isinstance(name, str) and name.isascii() and name.isprintable()]


def _in_form(content: Any, text: str) -> Any:
    """`text` as a content of the same form: a list of parts, or itself."""
    return [{"type": "text", "text": text}] if isinstance(content, list) else text


def _asking(message: Message) -> Message:
    """`message` with a mark within its content: templates look at its ends (Qwen3 knows tool responses by them)."""
    content = message.get("content")
    if message["role"] == "assistant" or not isinstance(content, str):
        return {"role": message["role"], "content": _in_form(content, ASKED)}
    middle = len(content) // 2
    return {**message, "content": content[:middle] + ASKED + content[middle:]}


def _common_length(a: str, b: str) -> int:
    """How many characters `a` and `b` begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _unmarked(marked: str) -> Rendered:
    """The text without the marks of `generation` tags, and the spans they enclosed."""
    if OPEN not in marked:
        return Rendered(marked, [])
    text = ""
    spans: list[Span] = []
    for i, piece in enumerate(marked.replace(CLOSE, OPEN).split(OPEN)):
        if i % 2:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return Rendered(text, spans)
