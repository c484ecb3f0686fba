"""What the messages of a row mean: nulls that exports leave behind, contents as parts, and marks of what to learn."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from entrenar_gpu.chat import Message
from entrenar_gpu.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

_TEXT_PARTS = ("text", "input_text", "output_text")
_SWITCHES = ("train", "training")  # axolotl's; OpenAI has a weight, of 0 or 1
_DETAILS = ("train_detail", "training_detail")
_REASONING = ("reasoning_content", "reasoning", "thinking")
# What an assistant says instead of a content, which no template writes: OpenAI's older form of a call, and answers that
# are none.
_INSTEAD = ("function_call", "refusal", "audio")
LEAST_WEIGHT = 1e-6  # of what counts in the loss; its reciprocal is the largest


def read_messages(value: Any, key: str) -> list[Message]:
    """A conversation: objects with a role and a content (text, a list of text parts, or null beside tool calls).

    Keys that are null are left out, as are empty lists of tool calls. Raises UserError naming `key` and the message.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{key} must be a list of messages, not {kind_of(value)}")
    return [m if _is_plain(m) else _message(m, f"{key}: message {i}") for i, m in enumerate(value, 1)]


def _is_plain(message: Any) -> bool:
    """Whether a message is a role and a text, as nearly all are."""
    return (
        type(message) is dict
        and len(message) == 2
        and message.get("role") in ROLES
        and type(message.get("content")) is str
    )


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{where} must be an object with a role and a content")
    if message["role"] not in ROLES:
        raise UserError(f"{where} has role {message['role']!r}; known: {', '.join(ROLES)}")
    result = without_nulls(message)
    for name in _REASONING:
        if not isinstance(result.get(name, ""), str):
            raise UserError(f"{where}: {name} must be text, not {kind_of(result[name])}")
    if result.get("tool_calls") == []:
        del result["tool_calls"]
    elif "tool_calls" in result:
        result["tool_calls"] = _calls(result["tool_calls"], where)
    content = message.get("content")
    instead = next((name for name in _INSTEAD if result.get(name)), None)
    if instead is not None and not content:
        raise UserError(f"{where} has {instead} and no content; only contents and tool_calls are trained")
    if isinstance(content, list):
        result["content"] = [_part(part, where) for part in content]
    elif content is None and result.get("tool_calls"):
        if "content" in message:
            result["content"] = None
    elif content is None and any(result.get(name) for name in _REASONING):
        result["content"] = ""
    elif not isinstance(content, str):
        raise UserError(f"{where} must have a content that is text, not {kind_of(content)}")
    return result


def _calls(value: Any, where: str) -> list[Any]:
    """Tool calls: objects that have a name, or a function with one; they and their list may be JSON text."""
    value = _decoded(value)
    if not isinstance(value, list):
        raise UserError(f"{where}: tool_calls must be a list, not {kind_of(value)}")
    calls = [without_nulls(_decoded(call)) for call in value]
    for call in calls:
        called = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(called, dict) or not isinstance(called.get("name"), str):
            raise UserError(f"{where}: tool_calls holds {kind_of(call)} without the name of a function")
    return calls


def _part(part: Any, where: str) -> dict[str, Any]:
    """A part of a content as an object of type text; everything else is refused by its type."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise UserError(f"{where} holds a part that is {kind_of(part)}")
    part = without_nulls(part)
    kind = part.get("type", "text" if "text" in part else next(iter(part), "none"))
    if kind not in _TEXT_PARTS:
        raise UserError(f"{where} holds a part of type {str(kind)[:40]!r}; only text is read")
    if not isinstance(part.get("text"), str):
        raise UserError(f"{where} holds a part whose text is {kind_of(part.get('text'))}")
    return {**part, "type": "text"}


def without_nulls(value: Any, kept: tuple[str, ...] = ()) -> Any:
    """A JSON value without the keys that are null: tables give every row the keys of all. `kept` ones stay."""
    if isinstance(value, dict):
        return {k: without_nulls(v, kept) for k, v in value.items() if v is not None or k in kept}
    return [without_nulls(item, kept) for item in value] if isinstance(value, list) else value


def turn_weights(messages: list[Message], key: str) -> list[float]:
    """For each turn of the assistant how much its tokens count in the loss: 1 unless it is marked otherwise, 0 where it
    is not to be learned."""
    weights = [1.0 if len(m) == 2 else _weight(m, f"{key}: message {i}") for i, m in enumerate(messages, 1)]
    return [weight for weight, message in zip(weights, messages, strict=True) if message["role"] == "assistant"]


def _weight(message: Message, where: str) -> float:
    """What a message's own marks say. Those that cannot be followed are refused."""
    for name in _DETAILS:
        if message.get(name):
            raise UserError(f"{where} has {name}: parts of a turn cannot be marked, only the turn (train, weight)")
    switches = {name: message[name] for name in _SWITCHES if name in message}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise UserError(f"{where}: {name} must be true or false, not {kind_of(value)}")
        if value and message["role"] != "assistant":
            raise UserError(f"{where}: {name} is true, but only turns of the assistant are trained")
    weight = message.get("weight", 1)
    if not is_weight(weight):
        bounds = f"{LEAST_WEIGHT:g} to {1 / LEAST_WEIGHT:g}"
        raise UserError(f"{where}: weight must be 0 or a number from {bounds}, not {json.dumps(weight)[:40]}")
    if weight not in (0, 1) and message["role"] != "assistant":
        raise UserError(f"{where}: weight is {weight:g}, but only turns of the assistant are trained")
    return float(weight) if all(switches.values()) else 0.0


def is_weight(value: Any) -> bool:
    """Whether a value may say how much a token counts: 0, which leaves it out, or a number that f32's sums can bear."""
    return isinstance(value, int | float) and (value == 0 or LEAST_WEIGHT <= value <= 1 / LEAST_WEIGHT)


def read_tools(value: Any) -> list[Any] | None:
    """The tools of a row: a list of objects; it or each of them may be JSON text."""
    if isinstance(value, str):
        value = _decoded(value) if value.strip() else None
    elif value is not None:
        value = without_nulls(value, kept=("default", "const"))
    if value is None:
        return None
    if not isinstance(value, list):
        raise UserError(f"tools must be a list, not {kind_of(value)}")
    tools = [_decoded(tool) for tool in value]
    wrong = next((tool for tool in tools if not isinstance(tool, dict)), None)
    if wrong is not None:
        raise UserError(f"tools must be a list of objects, not of {kind_of(wrong)}")
    return tools


def _decoded(value: Any) -> Any:
    """What a text of JSON says; anything else as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def read_variables(value: Any) -> Mapping[str, Any]:
    """What a row's `chat_template_kwargs` sets for its template."""
    if value is not None and not isinstance(value, dict):
        raise UserError(f"chat_template_kwargs must be an object, not {kind_of(value)}")
    return without_nulls(value or {})


def kind_of(value: Any) -> str:
    """A JSON value's kind, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if value == []:
        return "an empty list"
    if type(value) in names:
        return names[type(value)]
    return "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}"
