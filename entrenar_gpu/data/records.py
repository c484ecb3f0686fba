"""What each line of a JSONL file means, which of it is trained, and what is wrong with it.

A line is one object in one of four shapes, and a file may mix them. Keys that are null do not count, and the first of
these shapes that is there with all its keys is taken:

    {"input_ids": [...], "labels": [...]?}  loss where the label is not -100; labels stand at their own token
    {"messages": [...], "tools": [...]?}    loss on what the assistant says
    {"prompt": ..., "completion": ...}      loss on the completion; texts, or lists of messages
    {"text": ...}                           loss on every token

Other keys are ignored. EOS is appended to texts and completions, unless a chat template has already closed the turn.
`--loss-on all` trains every token of the last three shapes; labels that are written out are kept as they are, and
turns that are marked as not to be learned are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from entrenar_gpu.chat import Conversation, FailedRow, Message, Span
from entrenar_gpu.data.lines import Line, read_lines
from entrenar_gpu.data.messages import kind_of, read_messages, read_tools, read_variables, trained_turns
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.ops.loss import IGNORE

_SHAPES = (("input_ids",), ("messages",), ("prompt", "completion"), ("text",))
_MASKS = ("completion_mask", "assistant_masks")  # beside input_ids: 1 where a token is trained
# Lines that are tokenised together, on all cores: up to so many, or so many bytes of them.
_LINES_AT_ONCE, _BYTES_AT_ONCE = 1024, 1 << 20


@dataclass(frozen=True)
class Draft:
    """A line before tokenisation: its text, the characters to train (None: all), whether EOS ends it.

    `rendered` text comes from a chat template, which writes its own special tokens; `shortened` text goes on.
    """

    line: int
    text: str
    spans: list[Span] | None
    eos: bool
    rendered: bool
    shortened: bool = False


@dataclass(frozen=True)
class Tokens:
    """A line that was tokenised already."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class _Chat:
    """A conversation before it is rendered: which of the assistant's turns are trained; whether a completion's end
    is to be made sure of."""

    line: int
    conversation: Conversation
    trained: list[bool]
    marked: bool
    completion: bool = False
    shortened: bool = False


class Reader:
    """Turns the lines of one file into drafts and tokens."""

    def __init__(self, path: str, tokenizer: Tokenizer | None, vocab_size: int, train_all: bool, as_chat: bool) -> None:
        self.path, self.vocab_size, self.train_all = path, vocab_size, train_all
        self._tokenizer = tokenizer
        self._as_chat = as_chat and tokenizer is not None and tokenizer.has_chat_template
        self._completions = 0  # rows of prompt and completion texts

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UserError("needs the model's tokenizer.json; only input_ids can be trained without one")
        return self._tokenizer

    def notes(self) -> tuple[str, ...]:
        """What was decided about the file's lines that a user may want to know."""
        if not self._completions:
            return ()
        if self._as_chat:
            return ("completions in the chat template (--completions raw: as they are)",)
        has_template = self._tokenizer is not None and self._tokenizer.has_chat_template
        return ("completions as they are" + ("" if has_template else ": the model has no chat template"),)

    def chunks(self) -> Iterator[list[Draft | Tokens]]:
        """The lines in order, some at a time. Raises UserError naming the first line that is wrong."""
        chunk: list[Draft | Tokens | _Chat] = []
        size = 0
        for line in read_lines(self.path):
            try:
                chunk.append(self._read(line))
            except UserError as error:
                yield self._rendered(chunk)  # what is wrong with lines before this one comes first
                raise UserError(f"{self.path}:{line.number}: {error}") from None
            size += len(line.content)
            if len(chunk) == _LINES_AT_ONCE or size > _BYTES_AT_ONCE:
                yield self._rendered(chunk)
                chunk, size = [], 0
        yield self._rendered(chunk)

    def _read(self, line: Line) -> Draft | Tokens | _Chat:
        record = _parse(line.content)
        kind = _shape(record)
        if kind == "input_ids":
            return self._tokens(record)
        tokenizer = self.tokenizer
        if kind == "text":
            draft: Draft | _Chat = Draft(line.number, _text(record, "text"), None, eos=True, rendered=False)
        elif kind == "messages":
            messages = read_messages(record["messages"], "messages")
            draft = self._conversation(line.number, messages, trained_turns(messages, "messages"), record)
        else:
            draft = self._completion(line.number, record)
        if isinstance(draft, Draft):
            _encodable(draft.text)
        else:
            tokenizer.template(draft.conversation.tools)
        return replace(draft, shortened=True) if line.shortened else draft

    def _completion(self, number: int, record: dict[str, Any]) -> Draft | _Chat:
        if isinstance(record["prompt"], list) or isinstance(record["completion"], list):
            prompt, completion = (read_messages(record[key], key) for key in ("prompt", "completion"))
            earlier = [False] * len(trained_turns(prompt, "prompt"))
            trained = [*earlier, *trained_turns(completion, "completion")]
            return self._conversation(number, [*prompt, *completion], trained, record, completion=True)
        asked, said = _text(record, "prompt"), _text(record, "completion")
        self._completions += 1
        if not self._as_chat:
            spans = None if self.train_all else [(len(asked), len(asked) + len(said))]
            return Draft(number, asked + said, spans, eos=True, rendered=False)
        messages: list[Message] = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        return self._conversation(number, messages, [True], record, completion=True)

    def _conversation(
        self,
        number: int,
        messages: list[Message],
        trained: list[bool],
        record: dict[str, Any],
        completion: bool = False,
    ) -> _Chat:
        variables = read_variables(record.get("chat_template_kwargs"))
        conversation = Conversation(messages, read_tools(record.get("tools")), variables)
        marked = any(not mark for mark in (trained_turns(messages, "messages") if completion else trained))
        return _Chat(number, conversation, trained, marked, completion)

    def _tokens(self, record: dict[str, Any]) -> Tokens:
        ids = _integers(record, "input_ids")
        bad = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise UserError(f"input_ids: token id {bad} is outside the model's vocabulary of {self.vocab_size}")
        labels = ids if record.get("labels") is None else _integers(record, "labels")
        if len(labels) != len(ids):
            raise UserError(f"labels: {len(labels)} of them for {len(ids)} input_ids")
        bad = next((i for i in labels if i != IGNORE and not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise UserError(f"labels: {bad} is neither {IGNORE} nor in the model's vocabulary of {self.vocab_size}")
        for name in _MASKS:
            if record.get("labels") is None and record.get(name) is not None:
                mask = _bits(record, name, len(ids))
                labels = [label if bit else IGNORE for label, bit in zip(labels, mask, strict=True)]
        if record.get("attention_mask") is not None:
            ids, labels = _unpadded(ids, labels, _bits(record, "attention_mask", len(ids)))
        return Tokens(ids, labels)

    def _rendered(self, chunk: Sequence[Draft | Tokens | _Chat]) -> list[Draft | Tokens]:
        """The chunk with every conversation rendered, those of one template together."""
        done: dict[int, Draft] = {}
        failed: list[tuple[int, UserError]] = []
        chats = [line for line in chunk if isinstance(line, _Chat)]
        groups: dict[tuple[bool, str], list[_Chat]] = {}
        for chat in chats:
            with_tools = chat.conversation.tools is not None
            ask = "text" if self.train_all and not chat.marked else "turns"
            groups.setdefault((with_tools, ask), []).append(chat)
        for (with_tools, ask), group in groups.items():
            template = self.tokenizer.template([] if with_tools else None)
            try:
                texts = template.render_all([chat.conversation for chat in group], ask)
            except FailedRow as error:
                failed.append((group[error.row].line, error))
                continue
            for chat, rendered in zip(group, texts, strict=True):
                try:
                    done[chat.line] = self._drafted(chat, rendered.text, None if ask == "text" else rendered.spans)
                except UserError as error:
                    failed.append((chat.line, error))
        if failed:
            line, reason = min(failed, key=lambda pair: pair[0])
            raise UserError(f"{self.path}:{line}: {reason}") from None
        return [done[line.line] if isinstance(line, _Chat) else line for line in chunk]

    def _drafted(self, chat: _Chat, text: str, spans: list[Span] | None) -> Draft:
        """A rendered conversation with the characters to train."""
        _encodable(text)
        if spans is not None and not all(chat.trained):
            if len(spans) != len(chat.trained):
                raise UserError(
                    "the chat template's generation tags do not mark one span per turn; use messages without marks"
                )
            pairs = list(zip(spans, chat.trained, strict=True))
            spans = [span for span, trained in pairs if trained]
            if self.train_all:
                marked = _marks_of(chat)
                spans = _between([span for (span, _), mark in zip(pairs, marked, strict=True) if not mark], len(text))
        elif self.train_all:
            spans = None
        eos = chat.completion and not self.tokenizer.ends_with_special(text)
        if eos and spans:
            # EOS comes last: what the template writes before it (a newline) is said too
            spans = [*spans[:-1], (spans[-1][0], len(text))]
        return Draft(chat.line, text, spans, eos=eos, rendered=True, shortened=chat.shortened)


def _marks_of(chat: _Chat) -> list[bool]:
    """For each turn of the assistant whether its own marks let it be trained, in a prompt too."""
    return trained_turns(list(chat.conversation.messages), "messages")


def _between(left_out: list[Span], length: int) -> list[Span]:
    """The spans of a text of `length` characters between those that are left out."""
    edges = [0, *(edge for span in left_out for edge in span), length]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def _encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("holds half a surrogate pair (\\ud800 to \\udfff alone), which is not text") from None


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
        raise UserError(f"expected a JSON object, not {kind_of(record)}")
    return record


def _shape(record: dict[str, Any]) -> str:
    """The first key of the shape that a line is taken in."""
    there = {key for key, value in record.items() if value is not None}
    for shape in _SHAPES:
        if there.issuperset(shape):
            return shape[0]
    begun = {"prompt", "completion"} & there
    if begun:
        (missing,) = {"prompt", "completion"} - begun
        reason = f"{missing} must be text, not null" if missing in record else f"{missing!r} is missing"
        raise UserError(f"prompt and completion go together; {reason}")
    found = f"keys {', '.join(map(repr, record))[:200] or 'none'}" + (", all null" if record and not there else "")
    raise UserError(f"expected one of messages; prompt and completion; text; input_ids (and labels); found {found}")


def _text(record: dict[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise UserError(f"{key} must be text, not {kind_of(record[key])}")
    return str(record[key])


def _integers(record: dict[str, Any], key: str) -> list[int]:
    value = record[key]
    if not isinstance(value, list) or not all(type(i) is int for i in value):
        raise UserError(f"{key} must be a list of whole numbers")
    return value


def _bits(record: dict[str, Any], key: str, length: int) -> list[int]:
    """A mask beside input_ids: 0 or 1 for each."""
    value = record[key]
    if not isinstance(value, list) or not all(bit in (0, 1) and not isinstance(bit, float) for bit in value):
        raise UserError(f"{key} must be a list of 0 and 1")
    if len(value) != length:
        raise UserError(f"{key}: {len(value)} of them for {length} input_ids")
    return value


def _unpadded(ids: list[int], labels: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
    """Without the padding at either end, which an attention_mask of 0 shows."""
    if 1 not in mask:
        return [], []
    first, last = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[first:last]:
        raise UserError("attention_mask: 0 between tokens; only padding at the ends can be left out")
    return ids[first:last], labels[first:last]
