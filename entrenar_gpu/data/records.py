"""What each row of a source means, which of it is trained, and what is wrong with it.

A row has one of these shapes, the first that is there with all its keys (shapes.py), and a source may mix them:

    {"input_ids": [...], "labels", "weights"} loss where the label is not -100; labels stand at their own token
    {"messages": [...], "tools": [...]?}      loss on what the assistant says
    {"conversations": [...], "tools"?}        the same, as ShareGPT writes it
    {"prompt": ..., "completion": ...}        loss on the completion; texts, or lists of messages
    {"instruction": ..., "input"?, "output"}  the same, as Alpaca writes it
    {"text": ...}                             loss on every token

A `system` beside a conversation or a prompt is its system message. Other keys are ignored. EOS is appended to texts
and completions, unless a chat template has already closed the turn. `--loss-on all` trains every token of all shapes
but the first; labels that are written out are kept as they are, and turns marked as not to be learned are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from entrenar_gpu.chat import Conversation, FailedRow, Message, Span
from entrenar_gpu.data.lines import Row
from entrenar_gpu.data.messages import (
    LEAST_WEIGHT,
    is_weight,
    kind_of,
    read_messages,
    read_tools,
    read_variables,
    turn_weights,
)
from entrenar_gpu.data.rows import RowSource, plain
from entrenar_gpu.data.shapes import from_alpaca, from_sharegpt, renamed, shape_of, with_system
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.ops.loss import IGNORE

_MASKS = ("completion_mask", "assistant_masks")  # beside input_ids: 1 where a token is trained
# Rows that are tokenised together, on all cores: up to so many, or so many bytes of them.
ROWS_AT_ONCE = 1024
_BYTES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Draft:
    """A row before tokenisation: its text, the characters to train (None: all), whether EOS ends it, how much each span
    counts in the loss (None: all the same).

    `rendered` text comes from a chat template, which writes its own special tokens; `shortened` text goes on.
    """

    row: int
    text: str
    spans: list[Span] | None
    eos: bool
    rendered: bool
    shortened: bool = False
    weights: list[float] | None = None


@dataclass(frozen=True)
class Tokens:
    """A row that was tokenised already."""

    ids: list[int]
    labels: list[int]
    weights: list[float] | None = None  # of the tokens in the loss; None: all the same


@dataclass(frozen=True)
class _Chat:
    """A conversation before it is rendered: how much each of the assistant's turns counts in the loss, 0 being not
    trained; whether a completion's end is to be made sure of."""

    row: int
    conversation: Conversation
    weights: list[float]
    completion: bool = False
    shortened: bool = False


@dataclass(frozen=True)
class Reading:
    """How the rows of a run are to be read: the model's vocabulary, and what the options say."""

    vocab_size: int
    loss_on: str = "completions"
    completions: str = "chat"
    columns: Mapping[str, str] = field(default_factory=dict)


class Reader:
    """Turns the rows of one source into drafts and tokens."""

    def __init__(self, source: RowSource, tokenizer: Tokenizer | None, reading: Reading) -> None:
        self.source, self.reading, self.vocab_size = source, reading, reading.vocab_size
        self.train_all = reading.loss_on == "all"
        self._tokenizer = tokenizer
        has_template = tokenizer is not None and tokenizer.has_chat_template
        self._as_chat = reading.completions == "chat" and has_template
        self._completions = 0  # rows of prompt and completion texts
        self._missing = set(reading.columns.values())  # columns that no row has had so far

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UserError("needs the model's tokenizer.json; only input_ids can be trained without one")
        return self._tokenizer

    def notes(self) -> tuple[str, ...]:
        """What was decided about the rows that a user may want to know."""
        if not self._completions:
            return ()
        if self._as_chat:
            return ("completions in the chat template (--completions raw: as they are)",)
        has_template = self._tokenizer is not None and self._tokenizer.has_chat_template
        return ("completions as they are" + ("" if has_template else ": the model has no chat template"),)

    def chunks(self, at_once: int = ROWS_AT_ONCE) -> Iterator[list[Draft | Tokens]]:
        """The rows in order, some at a time. Raises UserError naming the first row that is wrong."""
        chunk: list[Draft | Tokens | _Chat] = []
        size = 0
        rows = iter(self.source)
        while True:
            try:
                row = next(rows, None)
                if row is None:
                    break
                chunk.append(self._named(row))
            except UserError:
                yield self._rendered(chunk)  # what is wrong with rows before this one comes first
                raise
            size += row.weight
            if len(chunk) == at_once or size > _BYTES_AT_ONCE:
                yield self._rendered(chunk)
                chunk, size = [], 0
        yield self._rendered(chunk)
        if self._missing:
            raise UserError(f"--map: no row of {self.source.name} has a column {min(self._missing)!r}")

    def _named(self, row: Row) -> Draft | Tokens | _Chat:
        try:
            return self._read(row)
        except UserError as error:
            raise UserError(f"{self.source.place(row.number)}: {error}") from None
        except RecursionError:
            raise UserError(f"{self.source.place(row.number)}: nested too deeply") from None

    def _read(self, row: Row) -> Draft | Tokens | _Chat:
        record = _parse(row.content)
        if self.reading.columns:
            self._missing -= record.keys()
            record = renamed(record, self.reading.columns)
        kind = self._shape(record)
        if kind == "input_ids":
            return self._tokens(record)
        tokenizer = self.tokenizer
        if kind == "text":
            draft: Draft | _Chat = Draft(row.number, _text(record, "text"), None, eos=True, rendered=False)
        elif kind in ("messages", "conversations"):
            turns = record["messages"] if kind == "messages" else from_sharegpt(record)
            messages = read_messages(with_system(turns, record), kind)
            draft = self._conversation(row.number, messages, turn_weights(messages, kind), record)
        else:
            record = from_alpaca(record, self._as_chat) if kind == "instruction" else record
            draft = self._completion(row.number, record)
        if isinstance(draft, Draft):
            _encodable(draft.text)
        else:
            tokenizer.template(draft.conversation.tools)
        return replace(draft, shortened=True) if row.shortened else draft

    def _shape(self, record: Mapping[str, Any]) -> str:
        try:
            return shape_of(record)
        except UserError as error:
            missing = [f"{name}={old}" for name, old in self.reading.columns.items() if name not in record]
            hint = f"; --map: this row has no column for {', '.join(missing)}" if missing else ""
            raise UserError(f"{error}{hint}") from None

    def _completion(self, number: int, record: Mapping[str, Any]) -> Draft | _Chat:
        if isinstance(record["prompt"], list) or isinstance(record["completion"], list):
            prompt = read_messages(with_system(record["prompt"], record), "prompt")
            completion = read_messages(record["completion"], "completion")
            earlier = turn_weights(prompt, "prompt")
            if not self.train_all:
                earlier = [0.0] * len(earlier)
            weights = [*earlier, *turn_weights(completion, "completion")]
            return self._conversation(number, [*prompt, *completion], weights, record, completion=True)
        asked, said = _text(record, "prompt"), _text(record, "completion")
        self._completions += 1
        messages: list[Message] = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        messages = with_system(messages, record)
        if self._as_chat:
            return self._conversation(number, messages, [1.0], record, completion=True)
        if len(messages) == 3:
            asked = f"{messages[0]['content']}\n\n{asked}"
        spans = None if self.train_all else [(len(asked), len(asked) + len(said))]
        return Draft(number, asked + said, spans, eos=True, rendered=False)

    def _conversation(
        self,
        number: int,
        messages: list[Message],
        weights: list[float],
        record: Mapping[str, Any],
        completion: bool = False,
    ) -> _Chat:
        variables = read_variables(record.get("chat_template_kwargs"))
        conversation = Conversation(messages, read_tools(record.get("tools")), variables)
        return _Chat(number, conversation, weights, completion)

    def _tokens(self, record: Mapping[str, Any]) -> Tokens:
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
        weights = None if record.get("weights") is None else _weights(record, len(ids))
        if weights is not None:
            labels = [label if w else IGNORE for label, w in zip(labels, weights, strict=True)]
        if record.get("attention_mask") is not None:
            there = _unpadded(_bits(record, "attention_mask", len(ids)))
            ids, labels, weights = ids[there], labels[there], weights and weights[there]
        return Tokens(ids, labels, weights if weights and any(w not in (0, 1) for w in weights) else None)

    def _rendered(self, chunk: Sequence[Draft | Tokens | _Chat]) -> list[Draft | Tokens]:
        """The chunk with every conversation rendered, those of one template together."""
        done: dict[int, Draft] = {}
        failed: list[tuple[int, UserError]] = []
        chats = [row for row in chunk if isinstance(row, _Chat)]
        groups: dict[tuple[bool, str], list[_Chat]] = {}
        for chat in chats:
            with_tools = chat.conversation.tools is not None
            ask = "text" if self.train_all and all(weight == 1 for weight in chat.weights) else "turns"
            groups.setdefault((with_tools, ask), []).append(chat)
        for (with_tools, ask), group in groups.items():
            template = self.tokenizer.template([] if with_tools else None)
            try:
                texts = template.render_all([chat.conversation for chat in group], ask)
            except FailedRow as error:
                failed.append((group[error.row].row, error))
                continue
            for chat, rendered in zip(group, texts, strict=True):
                try:
                    done[chat.row] = self._drafted(chat, rendered.text, None if ask == "text" else rendered.spans)
                except UserError as error:
                    failed.append((chat.row, error))
        if failed:
            number, reason = min(failed, key=lambda pair: pair[0])
            raise UserError(f"{self.source.place(number)}: {reason}") from None
        return [done[row.row] if isinstance(row, _Chat) else row for row in chunk]

    def _drafted(self, chat: _Chat, text: str, spans: list[Span] | None) -> Draft:
        """A rendered conversation with the characters to train, and how much they count."""
        _encodable(text)
        eos = chat.completion and not self.tokenizer.ends_with_special(text)
        if spans is None:
            return Draft(chat.row, text, None, eos=eos, rendered=True, shortened=chat.shortened)
        weights = chat.weights
        if len(spans) != len(weights):
            if any(weight != 1 for weight in weights):
                raise UserError(
                    "the chat template's generation tags do not mark one span per turn; use messages without marks"
                )
            weights = [1.0] * len(spans)
        if eos and spans:
            # EOS comes last: what the template writes before it (a newline) is said too
            spans = [*spans[:-1], (spans[-1][0], len(text))]
            eos = weights[-1] > 0
        turns = list(zip(spans, weights, strict=True))
        if self.train_all:
            turns = _with_the_rest(turns, len(text))
        turns = [(span, weight) for span, weight in turns if weight]
        equal = all(weight == 1 for _, weight in turns)
        return Draft(
            chat.row,
            text,
            [span for span, _ in turns],
            eos=eos,
            rendered=True,
            shortened=chat.shortened,
            weights=None if equal else [weight for _, weight in turns],
        )


def _with_the_rest(turns: list[tuple[Span, float]], length: int) -> list[tuple[Span, float]]:
    """Spans of a text of `length` characters with those between them, which count once."""
    edges = [0, *(edge for span, _ in turns for edge in span), length]
    rest = [((a, b), 1.0) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
    return sorted([*turns, *rest])


def _encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("holds half a surrogate pair (\\ud800 to \\udfff alone), which is not text") from None


def _parse(content: Any) -> Mapping[str, Any]:
    if isinstance(content, bytes):
        try:
            record = json.loads(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 text (byte {error.start + 1} of the line)") from None
        except json.JSONDecodeError as error:
            raise UserError(f"not valid JSON: {error.msg} (column {error.colno})") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"not valid JSON: {error}") from None
    else:
        record = plain(content)
    if not isinstance(record, Mapping):
        raise UserError(f"expected a JSON object, not {kind_of(record)}")
    return record


def _text(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise UserError(f"{key} must be text, not {kind_of(record[key])}")
    return str(record[key])


def _integers(record: Mapping[str, Any], key: str) -> list[int]:
    value = record[key]
    if not isinstance(value, list) or not all(type(i) is int for i in value):
        raise UserError(f"{key} must be a list of whole numbers")
    return value


def _bits(record: Mapping[str, Any], key: str, length: int) -> list[int]:
    """A mask beside input_ids: 0 or 1 for each."""
    value = record[key]
    if not isinstance(value, list) or not all(bit in (0, 1) and not isinstance(bit, float) for bit in value):
        raise UserError(f"{key} must be a list of 0 and 1")
    if len(value) != length:
        raise UserError(f"{key}: {len(value)} of them for {length} input_ids")
    return value


def _weights(record: Mapping[str, Any], length: int) -> list[float]:
    """How much each token counts in the loss; 0 leaves it out."""
    value = record["weights"]
    if not isinstance(value, list) or not all(isinstance(w, int | float) and not isinstance(w, bool) for w in value):
        raise UserError("weights must be a list of numbers")
    wrong = next((w for w in value if not is_weight(w)), None)
    if wrong is not None:
        raise UserError(
            f"weights: {str(wrong)[:40]} is neither 0 nor between {LEAST_WEIGHT:g} and {1 / LEAST_WEIGHT:g}"
        )
    if len(value) != length:
        raise UserError(f"weights: {len(value)} of them for {length} input_ids")
    return value


def _unpadded(mask: list[int]) -> slice:
    """What is left without the padding at either end, which an attention_mask of 0 shows."""
    if 1 not in mask:
        return slice(0)
    first, last = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[first:last]:
        raise UserError("attention_mask: 0 between tokens; only padding at the ends can be left out")
    return slice(first, last)
