"""The shapes that a row may have, brought to those that are trained: tokens, messages, prompt and completion, text.

Keys that are null do not count, and the first of SHAPES that is there with all its keys is taken.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from entrenar_gpu.data.messages import kind_of, without_nulls
from entrenar_gpu.errors import UserError

SHAPES = (
    ("input_ids",),
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("text",),
)
_SHOWN = "messages; conversations; prompt and completion; instruction and output; text; input_ids (and labels)"
# What a column may be called to be read.
COLUMNS = (
    *(key for shape in SHAPES for key in shape),
    "input", "system", "tools", "chat_template_kwargs", "labels", "weights", "attention_mask", "completion_mask",
    "assistant_masks",
)  # fmt: skip

# Who speaks in ShareGPT's conversations, which have no standard.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
# Alpaca's own prompts, for completions as they are.
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the"
    " request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


def shape_of(record: Mapping[str, Any]) -> str:
    """The first key of the shape that a row is taken in. Raises UserError."""
    there = {key for key, value in record.items() if value is not None}
    for shape in SHAPES:
        if there.issuperset(shape):
            return shape[0]
    for pair in (("prompt", "completion"), ("instruction", "output")):
        if there.intersection(pair):
            (missing,) = set(pair) - there
            reason = f"{missing} must be text, not null" if missing in record else f"{missing!r} is missing"
            raise UserError(f"{pair[0]} and {pair[1]} go together; {reason}")
    found = f"keys {', '.join(map(repr, record))[:200] or 'none'}" + (", all null" if record and not there else "")
    raise UserError(f"expected one of {_SHOWN}; found {found}")


def parse_columns(text: str | None) -> dict[str, str]:
    """{name read: name in the row} of `prompt=question,completion=answer`. Raises UserError naming --map."""
    columns: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        name, _, old = (word.strip() for word in part.partition("="))
        if not old:
            raise UserError(f"--map: {part!r} is not NAME=COLUMN, as in prompt=question,completion=answer")
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(COLUMNS)}"
            raise UserError(f"--map: {name!r} is nothing that a row is read by{hint}")
        if name in columns or old in columns.values():
            raise UserError(f"--map: {part!r} names a column a second time")
        columns[name] = old
    return columns


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The row with columns called as `columns` says. Those that have the names already give way."""
    if not columns:
        return record
    moved = {name: record[old] for name, old in columns.items() if old in record}
    return {key: value for key, value in record.items() if key not in columns.values()} | moved


def from_sharegpt(record: Mapping[str, Any]) -> list[Any]:
    """Messages of `conversations`: objects with `from` and `value`, or messages already."""
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"conversations must be a list of turns, not {kind_of(turns)}")
    return [_turn(turn, f"conversations: turn {i}") for i, turn in enumerate(turns, 1)]


def _turn(turn: Any, where: str) -> Any:
    if not isinstance(turn, dict) or turn.get("from") is None:
        return turn  # a message, or what reading it as one will refuse
    speaker, value = turn["from"], turn.get("value")
    speaker = speaker.lower() if isinstance(speaker, str) else speaker
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        said = repr(turn["from"])[:40] if isinstance(speaker, str) else kind_of(speaker)
        raise UserError(f"{where} is from {said}; known: {', '.join(_SPEAKERS)}")
    more = {key: inner for key, inner in turn.items() if key not in ("from", "value") and inner is not None}
    if speaker == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": [_call(value, where)], **more}
    return {"role": _SPEAKERS[speaker], "content": value, **more}


def _call(value: Any, where: str) -> dict[str, Any]:
    """The tool call that a turn of a function call holds as JSON."""
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(f"{where}: a function_call holds JSON with a name and arguments")
    return {"type": "function", "function": without_nulls(call)}


def from_alpaca(record: Mapping[str, Any], as_chat: bool) -> dict[str, Any]:
    """`prompt` and `completion` of an instruction, its input where it has one, and the output."""
    texts = {key: record.get(key) for key in ("instruction", "input", "output")}
    for key, value in texts.items():
        if not isinstance(value, str) and not (key == "input" and value is None):
            raise UserError(f"{key} must be text, not {kind_of(value)}")
    if record.get("history"):
        raise UserError("history: earlier turns beside an instruction are not read; write them as messages")
    asked, given = texts["instruction"], texts["input"]
    if as_chat:
        prompt = f"{asked}\n\n{given}" if given else asked
    else:
        paired = ", paired with an input that provides further context" if given else ""
        prompt = _ALPACA.format(paired=paired, instruction=asked, input=f"### Input:\n{given}\n\n" if given else "")
    return {**record, "prompt": prompt, "completion": texts["output"]}


def with_system(messages: Any, record: Mapping[str, Any]) -> Any:
    """Messages with those of a `system` column in front, where they do not begin with their own."""
    said = record.get("system")
    if said is None or said == "" or not isinstance(messages, list):
        return messages
    if not isinstance(said, str):
        raise UserError(f"system must be text, not {kind_of(said)}")
    first = messages[0] if messages else None
    if isinstance(first, dict) and first.get("role") in ("system", "developer"):
        return messages
    return [{"role": "system", "content": said}, *messages]
