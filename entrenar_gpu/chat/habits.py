"""What form of a conversation a template takes, learned by showing it small ones; and conversations put in that form.

Rows come in more forms than any one template reads: contents as text or as lists of parts, arguments of tool calls as
objects or as JSON text, a null beside tool calls, a thought under one of three names. A template gets the row's own
form when that is what it reads, else the other one, so that no Python `repr` and no JSON within JSON is trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any

from entrenar_gpu.chat.sandbox import SLOT, CompiledTemplate, Message, TemplateFailure

# Names that the same thing has in different templates: what the assistant thinks before it answers.
REASONING = ("reasoning_content", "reasoning", "thinking")

_PROBE = f"{SLOT}probe"
_CALLED = "called_by_the_probe"


def _calling(arguments: Any = None, content: str | None = "") -> dict[str, Any]:
    function = {"name": _CALLED, "arguments": {"a": 1} if arguments is None else arguments}
    call = {"id": "call00001", "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


class Habits:
    """How one template reads a conversation."""

    def __init__(self, template: CompiledTemplate) -> None:
        self._template = template
        self.reads_parts = cache(self._reads_parts)

    def adapt(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in the form that the template reads. Raises TemplateFailure for what has no such form."""
        return [self._adapted(message, number) for number, message in enumerate(messages, 1)]

    def _adapted(self, message: Message, number: int) -> Message:
        content = message.get("content")
        if len(message) == 2 and isinstance(content, str):
            return message  # as nearly all are
        changed: dict[str, Any] = {}
        if isinstance(content, list) and not self.reads_parts(message["role"]):
            changed["content"] = "".join(part["text"] for part in content)
        calls = message.get("tool_calls")
        if calls:
            changed["tool_calls"] = [self._call(call, number) for call in calls]
            if "content" in message and content in (None, "") and content not in self._beside_calls:
                changed["content"] = next(iter(self._beside_calls), "")
        changed |= self._reasoning(message, number)
        return {**message, **changed} if changed else message

    def _call(self, call: Any, number: int) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(call["function"], number)}
        arguments = call.get("arguments")
        if isinstance(arguments, str) and not self._prints_argument_text:
            return {**call, "arguments": _decoded(arguments, number)}
        if isinstance(arguments, Mapping) and self._prints_argument_text and not self._encodes_arguments:
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return call

    def _reasoning(self, message: Message, number: int) -> dict[str, Any]:
        if message.keys().isdisjoint(REASONING):
            return {}
        given = {name: message[name] for name in REASONING if message.get(name)}
        if len(set(map(str, given.values()))) > 1:
            raise TemplateFailure(
                f"message {number}: {' and '.join(given)} differ; they have one meaning", at_fault=False
            )
        if not given or any(name in self._reasoning_names for name in given):
            return {}
        return {name: next(iter(given.values())) for name in self._reasoning_names[:1]}

    @cached_property
    def _reasoning_names(self) -> list[str]:
        """Those of the three names that the template reads of a message."""
        source = self._template.source
        return [name for name in REASONING if re.search(rf"""[.'"]{name}\b""", source)]

    def _reads_parts(self, role: str) -> bool:
        """Whether the template takes a list of parts as the content of such a message and writes its texts."""
        shown = {"role": role, "content": [{"type": "text", "text": _PROBE}]}
        question = {"role": "user", "content": "a"}
        contexts: dict[str, list[list[Message]]] = {
            "system": [[shown, question]],
            "developer": [[shown, question]],
            "user": [[shown]],
            "assistant": [[question, shown]],
        }
        for messages in contexts.get(role, [[question, _calling(), shown], [question, shown]]):
            text = self._tried(messages)
            if text is not None and _PROBE in text:
                return not re.search(f"[\"']{_PROBE}", text)
        return False

    @cached_property
    def _prints_argument_text(self) -> bool:
        """Whether arguments given as JSON text are written as they are."""
        text = self._called('{"probed": 1}')
        at = text.find('{"probed": 1}')
        return at >= 0 and text[at - 1 : at] != "'"

    @cached_property
    def _encodes_arguments(self) -> bool:
        """Whether arguments given as an object are written otherwise than as Python writes them."""
        text = self._called({"probed": 1})
        return "probed" in text and "'probed'" not in text

    @cached_property
    def _beside_calls(self) -> list[str | None]:
        """Empty contents beside which calls are written, and nothing else: DeepSeek's wants a null, most a text, and
        some print a null as a word."""
        text = '{"a": 1}' if self._prints_argument_text else None
        tried = {content: self._tried_call(text, content) for content in ("", None)}
        written = {content: text for content, text in tried.items() if text is not None and _CALLED in text}
        if len(written) == 2 and any(word in written[None] and word not in written[""] for word in ("None", "null")):
            del written[None]
        return list(written)

    def _called(self, arguments: Any) -> str:
        """What is written of a call, beside an empty content or else beside none."""
        tried = [self._tried_call(arguments, content) or "" for content in ("", None)]
        return next((text for text in tried if _CALLED in text), "")

    def _tried_call(self, arguments: Any, content: str | None) -> str | None:
        return self._tried([{"role": "user", "content": "a"}, _calling(arguments, content)])

    def _tried(self, messages: Sequence[Message]) -> str | None:
        try:
            return self._template.render(messages)
        except TemplateFailure:
            return None


def _decoded(arguments: str, number: int) -> Any:
    """The object that a tool call's arguments are the JSON text of."""
    try:
        value = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise TemplateFailure(f"message {number}: a tool call's arguments are not a JSON object", at_fault=False)
    return value
