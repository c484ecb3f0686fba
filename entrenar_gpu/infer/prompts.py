"""Prompts as token ids: texts to be continued, conversations to be answered, and files of them."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entrenar_gpu.chat import Conversation, Message
from entrenar_gpu.config import refuse_named_pipe
from entrenar_gpu.data import Tokenizer, read_messages
from entrenar_gpu.errors import UserError

Messages = str | Sequence[Message] | Conversation  # a text is one message of the user


def conversations(messages: Any) -> Any:
    """A list of conversations as it is, and one conversation as a list of it."""
    several = isinstance(messages, Sequence) and not isinstance(messages, str | bytes) and len(messages) > 0
    if not several or isinstance(messages[0], Mapping):
        return [messages]
    return messages


def encode_text(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a text to be continued."""
    return tokenizer.encode_prompt(_utf8(prompt))


def token_ids(ids: Any, name: str) -> list[int]:
    """Token ids as Python's own integers. Raises UserError naming what is none."""
    try:
        return [operator.index(i) for i in ids]
    except TypeError:
        raise UserError(f"{name}: expected a sequence of token ids, whole numbers") from None


def encode_chat(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Token ids of a conversation with the opening of an answer. Raises UserError where there is no template."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": _utf8(messages)}]
    if isinstance(messages, Conversation):
        conversation = messages
    else:
        given = list(messages) if isinstance(messages, tuple) else messages
        conversation = Conversation(read_messages(given, "messages"))
    (rendered,) = tokenizer.template(conversation.tools).render_all([conversation], "prompt")
    return tokenizer.encode(_utf8(rendered.text), add_special_tokens=False)


def encode_row(tokenizer: Tokenizer, row: Mapping[str, Any], chat: bool | None, system: str | None = None) -> list[int]:
    """Token ids of a row with a `prompt` or `messages`; a prompt is a turn of the user where `chat` says so.

    With None it is one where the model has a template. Raises UserError for a system's message outside a chat.
    """
    as_chat = "messages" in row or (tokenizer.has_chat_template if chat is None else chat)
    if not as_chat:
        if system is not None:
            raise UserError("--system: belongs to a chat; the model has no chat template, or --no-chat is given")
        return encode_text(tokenizer, row["prompt"])
    messages: list[Message] = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return encode_chat(tokenizer, messages)


def read_prompts(path: str, flag: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with a `prompt` or `messages`. Raises UserError naming file and line."""
    rows = [_row(line, f"{path}:{number}") for number, line in enumerate(text_lines(path, flag), 1) if line.strip()]
    if not rows:
        raise UserError(f"{flag}: {path}: holds no prompts")
    return rows


def text_lines(path: str | Path, flag: str = "") -> list[str]:
    """The lines of a text file; only a newline ends one, as in JSON lines. Raises UserError naming flag and file."""
    refuse_named_pipe(path, flag)
    where = f"{flag}: {path}" if flag else str(path)
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")  # Windows editors begin with a mark
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text") from None


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not valid JSON") from None
    if not isinstance(row, dict) or not (isinstance(row.get("prompt"), str) or "messages" in row):
        raise UserError(f"{where}: expected an object with a prompt that is text, or messages")
    if "messages" in row:
        row["messages"] = read_messages(row["messages"], f"{where}: messages")
    return row


def _utf8(text: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"--prompt: expected text, not a {type(text).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in text):  # bytes of the command line, half a pair in JSON
        raise UserError("--prompt: not UTF-8 text")
    return text
