"""JSONL in, tokenised samples out: what each line means, which of its tokens are trained, and what is wrong with it.

A line is one object in one of four shapes, and a file may mix them:

    {"messages": [...], "tools": [...]?}    loss on what the assistant says
    {"prompt": ..., "completion": ...}      loss on the completion; texts, or lists of messages
    {"text": ...}                           loss on every token
    {"input_ids": [...], "labels": [...]?}  loss where the label is not -100; labels stand at their own token

Other keys are ignored. EOS is appended to texts and completions, unless a chat template has already closed the turn.
`--loss-on all` trains every token of the first three shapes; labels that are written out are kept as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu.data.chat import Message, Rendered, Span
from entrenar_gpu.data.samples import SampleBuilder, Samples
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.ops.loss import IGNORE

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

_SHAPES = (("messages",), ("prompt", "completion"), ("text",), ("input_ids",))
_LINES_AT_ONCE = 1024  # tokenised together, on all cores


def data_files(data: str | Path, eval_data: str | Path | None = None) -> tuple[Path, Path | None]:
    """The training file that `--data` names and the evaluation file, if there is one (`--eval-data` wins)."""
    path = Path(data)
    if not path.exists():
        raise UserError(f"--data: {path} not found")
    held_out = None if eval_data is None else Path(eval_data)
    if path.is_dir():
        beside = path / "valid.jsonl"
        held_out = beside if held_out is None and beside.exists() else held_out
        path /= "train.jsonl"
        if not path.is_file():
            raise UserError(f"--data: {path} not found; a data folder holds train.jsonl and maybe valid.jsonl")
    if held_out is not None and not held_out.is_file():
        raise UserError(f"--eval-data: {held_out} not found")
    return path, held_out


def load_samples(
    path: str | Path,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    seq: int,
    loss_on: str = "completions",
    completions: str = "chat",
) -> Samples:
    """Read and tokenise a JSONL file; samples longer than `seq` tokens are cut there.

    `vocab_size` is the model's; `tokenizer` may be None where every line holds input_ids; `loss_on` is "completions"
    or "all"; `completions` is "chat" or "raw". Raises UserError: FILE:LINE and what is wrong with the line, or that
    the file holds nothing to train.
    """
    reader = _Reader(str(path), tokenizer, vocab_size, loss_on == "all", completions == "chat")
    builder = SampleBuilder(seq)
    lines = reader.lines()
    while chunk := [reader.read(number, line) for number, line in islice(lines, _LINES_AT_ONCE)]:
        for ids, labels in reader.tokenise(chunk):
            builder.add(ids, labels)
    samples = builder.samples(reader.notes())
    if not len(samples):
        raise UserError(f"{path}: holds no token to train ({samples.skipped} samples without any)")
    return samples


@dataclass(frozen=True)
class _Draft:
    """A line before tokenisation: its text, the characters to train (None: all), whether EOS ends it.

    `rendered` text comes from a chat template, which writes its own special tokens.
    """

    line: int
    text: str
    spans: list[Span] | None
    eos: bool
    rendered: bool


@dataclass(frozen=True)
class _Tokens:
    """A line that was tokenised already."""

    ids: list[int]
    labels: list[int]


class _Reader:
    """Turns the lines of one file into token ids and labels."""

    def __init__(self, path: str, tokenizer: Tokenizer | None, vocab_size: int, train_all: bool, as_chat: bool) -> None:
        self.path, self.vocab_size, self.train_all = path, vocab_size, train_all
        self._as_chat = as_chat and tokenizer is not None and tokenizer.has_chat_template
        self._completions = 0  # rows of prompt and completion texts
        self._tokenizer = tokenizer

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Line number, from 1, and content of every line that is not blank."""
        try:
            with open(self.path, "rb") as stream:
                for number, line in enumerate(stream, 1):
                    # Windows editors begin a file with a byte order mark
                    line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                    if line.strip():
                        yield number, line
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None

    def notes(self) -> tuple[str, ...]:
        """What was decided about the file's lines that a user may want to know."""
        if not self._completions:
            return ()
        if self._as_chat:
            return ("completions in the chat template (--completions raw: as they are)",)
        has_template = self._tokenizer is not None and self._tokenizer.has_chat_template
        return ("completions as they are" + ("" if has_template else ": the model has no chat template"),)

    def read(self, number: int, line: bytes) -> _Draft | _Tokens:
        try:
            return self._read(number, line)
        except UserError as error:
            raise UserError(f"{self.path}:{number}: {error}") from None

    def _read(self, number: int, line: bytes) -> _Draft | _Tokens:
        record = _parse(line)
        (kind, *_) = shape = _shape(record)
        missing = [key for key in shape if key not in record]
        if missing:
            raise UserError(f"{' and '.join(shape)} go together; {missing[0]!r} is missing")
        if kind == "input_ids":
            return self._tokens(record)
        if kind == "text":
            draft = _Draft(number, _text(record, "text"), None, eos=True, rendered=False)
        elif kind == "messages":
            draft = self._conversation(number, _messages(record, "messages"), record.get("tools"))
        else:
            draft = self._completion(number, record)
        try:
            draft.text.encode()
        except UnicodeEncodeError:
            raise UserError("holds half a surrogate pair (\\ud800 to \\udfff alone), which is not text") from None
        return draft

    def _completion(self, number: int, record: dict[str, Any]) -> _Draft:
        if isinstance(record["prompt"], list) or isinstance(record["completion"], list):
            prompt, completion = _messages(record, "prompt"), _messages(record, "completion")
        else:
            asked, said = _text(record, "prompt"), _text(record, "completion")
            self._completions += 1
            if not self._as_chat:
                spans = None if self.train_all else [(len(asked), len(asked) + len(said))]
                return _Draft(number, asked + said, spans, eos=True, rendered=False)
            prompt, completion = [{"role": "user", "content": asked}], [{"role": "assistant", "content": said}]
        earlier = sum(message["role"] == "assistant" for message in prompt)
        draft = self._conversation(number, [*prompt, *completion], record.get("tools"), earlier)
        if self.tokenizer.ends_with_special(draft.text):
            return draft
        # EOS comes last: what the template writes before it (a newline) is said too
        spans = draft.spans and [*draft.spans[:-1], (draft.spans[-1][0], len(draft.text))]
        return _Draft(number, draft.text, spans, eos=True, rendered=True)

    def _conversation(self, number: int, messages: list[Message], tools: Any, earlier: int = 0) -> _Draft:
        """The conversation; the first `earlier` turns of the assistant are not trained."""
        if tools is not None and not isinstance(tools, list):
            raise UserError(f"tools must be a list, not {_kind(tools)}")
        if self.train_all:
            return _Draft(number, self.tokenizer.render(messages, tools=tools), None, eos=False, rendered=True)
        rendered: Rendered = self.tokenizer.render_turns(messages, tools)
        turns = sum(message["role"] == "assistant" for message in messages)
        if earlier and len(rendered.spans) != turns:
            raise UserError("the chat template's generation tags do not mark one span a turn; use messages instead")
        return _Draft(number, rendered.text, rendered.spans[earlier:], eos=False, rendered=True)

    def _tokens(self, record: dict[str, Any]) -> _Tokens:
        ids = _integers(record, "input_ids")
        bad = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise UserError(f"input_ids: token id {bad} is outside the model's vocabulary of {self.vocab_size}")
        if record.get("labels") is None:
            return _Tokens(ids, ids)
        labels = _integers(record, "labels")
        if len(labels) != len(ids):
            raise UserError(f"labels: {len(labels)} of them for {len(ids)} input_ids")
        bad = next((i for i in labels if i != IGNORE and not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise UserError(f"labels: {bad} is neither {IGNORE} nor in the model's vocabulary of {self.vocab_size}")
        return _Tokens(ids, labels)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UserError("needs the model's tokenizer.json; only input_ids can be trained without one")
        return self._tokenizer

    def tokenise(self, chunk: list[_Draft | _Tokens]) -> Iterator[tuple[list[int], list[int]]]:
        """Ids and labels of each line, in the order of the lines."""
        encoded: dict[int, tuple[list[int], list[Span]]] = {}
        for rendered in (False, True):
            drafts = [d for d in chunk if isinstance(d, _Draft) and d.rendered == rendered]
            if drafts:
                texts = [draft.text for draft in drafts]
                batch = self.tokenizer.encode_batch(texts, add_special_tokens=not rendered)
                encoded.update((draft.line, encoding) for draft, encoding in zip(drafts, batch, strict=True))
        for draft in chunk:
            if isinstance(draft, _Tokens):
                yield draft.ids, draft.labels
            else:
                yield self._labelled(draft, *encoded[draft.line])

    def _labelled(self, draft: _Draft, ids: list[int], offsets: list[Span]) -> tuple[list[int], list[int]]:
        """A token is trained when any of its characters is: one that spans a prompt's end belongs to the answer."""
        eos = self.tokenizer.eos_id
        if draft.spans is None:
            labels = list(ids)
        else:
            begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
            trained = np.zeros(len(ids), bool)
            for start, end in draft.spans:
                trained |= (begins < end) & (ends > start)
            labels = np.where(trained, ids, IGNORE).tolist()
        if draft.eos and ids[-1:] != [eos]:
            if eos is None:
                raise UserError(f"{self.tokenizer.folder}: no eos_token in tokenizer_config.json to end texts with")
            ids, labels = [*ids, eos], [*labels, eos]
        if max(ids, default=0) >= self.vocab_size:
            raise UserError(
                f"{self.path}:{draft.line}: the tokenizer gives token id {max(ids)}, outside the model's vocabulary of"
                f" {self.vocab_size}"
            )
        return ids, labels


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"expected a JSON object, not {_kind(record)}")
    return record


def _shape(record: dict[str, Any]) -> tuple[str, ...]:
    shapes = [shape for shape in _SHAPES if record.keys() & set(shape)]
    if len(shapes) == 1:
        return shapes[0]
    found = "; ".join(" and ".join(shape) for shape in shapes) or f"keys {', '.join(map(repr, record)) or 'none'}"
    raise UserError(f"expected one of messages; prompt and completion; text; input_ids (and labels); found {found}")


def _text(record: dict[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise UserError(f"{key} must be text, not {_kind(record[key])}")
    return str(record[key])


def _integers(record: dict[str, Any], key: str) -> list[int]:
    value = record[key]
    if not isinstance(value, list) or not all(type(i) is int for i in value):
        raise UserError(f"{key} must be a list of whole numbers")
    return value


def _messages(record: dict[str, Any], key: str) -> list[Message]:
    """A conversation: objects with a role and a content (text, a list of parts, or null beside tool calls)."""
    messages = record[key]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{key} must be a list of messages, not {_kind(messages)}")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{key}: message {i} must be an object with a role and a content")
        if message["role"] not in ROLES:
            raise UserError(f"{key}: message {i} has role {message['role']!r}; known: {', '.join(ROLES)}")
        content = message.get("content")
        if not (isinstance(content, (str, list)) or (content is None and message.get("tool_calls"))):
            raise UserError(f"{key}: message {i} must have a content that is text, not {_kind(content)}")
    return messages


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number")
