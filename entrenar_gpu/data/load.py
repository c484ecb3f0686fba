"""Rows in, tokenised samples out.

A source is read in the order of its rows, a thousand at a time: one thread parses them and has their conversations
rendered (records.py), another has the rows before tokenised, while this one puts those before these where they are
kept. Memory holds no more of the source than that.
"""

from __future__ import annotations

import contextlib
import gc
from array import array
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias, TypeVar

from entrenar_gpu.chat import Span
from entrenar_gpu.data.prefix import Beginning
from entrenar_gpu.data.records import Draft, Reader, Reading, Tokens
from entrenar_gpu.data.rows import RowSource, open_file
from entrenar_gpu.data.samples import SampleBuilder, Samples
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.ops.loss import IGNORE

T = TypeVar("T")
Chunk: TypeAlias = Sequence[Draft | Tokens]


@contextlib.contextmanager
def _collected_seldom() -> Iterator[None]:
    """Rows are a great many objects and no cycles of them; to look for some after every 700 is 5% of reading."""
    first, *others = gc.get_threshold()
    gc.set_threshold(first and max(first, 50_000), *others)
    try:
        yield
    finally:
        gc.set_threshold(first, *others)


def load_samples(
    path: str | Path,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    seq: int,
    loss_on: str = "completions",
    completions: str = "chat",
) -> Samples:
    """Read and tokenise one file of rows; see `read_samples`."""
    reading = Reading(vocab_size, loss_on, completions)
    return read_samples([[open_file(Path(path))]], tokenizer, reading, seq)


@_collected_seldom()
def read_samples(
    groups: Sequence[Sequence[RowSource]], tokenizer: Tokenizer | None, reading: Reading, seq: int
) -> Samples:
    """Read and tokenise every source, one after the other; samples longer than `seq` tokens are cut there.

    Sources of a group count as one in `Samples.groups`. `tokenizer` may be None where every row holds input_ids.
    Raises UserError: the row's place and what is wrong with it, or that a group holds nothing to train.
    """
    builder = SampleBuilder(seq)
    counts: list[int] = []
    notes: dict[str, None] = {}
    for group in groups:
        before, skipped, lost = len(builder), builder.skipped, builder.lost
        for source in group:
            reader = Reader(source, tokenizer, reading)
            # closed before an error is told: what the tokenizer writes to stderr is held back until it is done
            with contextlib.closing(_ahead(_tokenised(_ahead(reader.chunks()), reader, seq))) as chunks:
                for chunk, begun in chunks:
                    _add(chunk, begun, reader, builder)
            notes |= dict.fromkeys(reader.notes())
        counts.append(len(builder) - before)
        if not counts[-1]:
            skipped, lost = builder.skipped - skipped, builder.lost - lost
            why = f", {lost} of them cut before it; raise --seq" if lost else ""
            raise UserError(f"{_names(group)}: holds no token to train ({skipped} samples without any{why})")
    return builder.samples(tuple(notes), tuple(counts))


def _names(group: Sequence[RowSource]) -> str:
    return group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")


def _ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The items, made by another thread: one waits and the next is begun while one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(next, items, None) for _ in range(2))
        try:
            while (item := coming.popleft().result()) is not None:
                coming.append(pool.submit(next, items, None))
                yield item
        finally:
            pool.shutdown(cancel_futures=True)


def add_chunk(chunk: Chunk, reader: Reader, builder: SampleBuilder) -> None:
    """Tokenise the rows of a chunk together and add them in their order."""
    _add(chunk, _begun(chunk, reader, builder.seq), reader, builder)


def _tokenised(chunks: Iterable[Chunk], reader: Reader, seq: int) -> Iterator[tuple[Chunk, list[Beginning]]]:
    for chunk in chunks:
        yield chunk, _begun(chunk, reader, seq)


def _begun(chunk: Chunk, reader: Reader, seq: int) -> list[Beginning]:
    """The texts of a chunk's drafts tokenised, all or at least the first `seq` tokens of more."""
    drafts = [row for row in chunk if isinstance(row, Draft)]
    return reader.tokenizer.begin([d.text for d in drafts], seq, [bool(d.spans) for d in drafts]) if drafts else []


def _add(chunk: Chunk, begun: Sequence[Beginning], reader: Reader, builder: SampleBuilder) -> None:
    drafts = [row for row in chunk if isinstance(row, Draft)]
    coming = iter(reader.tokenizer.locate(begun, [d.spans or () for d in drafts]) if drafts else ())
    for row in chunk:
        if isinstance(row, Tokens):
            builder.add(row.ids, row.labels, row.weights)
        else:
            ids, spans, weights = _ended(row, *next(coming), reader, builder.seq)
            if weights is None:
                builder.add_spans(ids, spans)
            else:
                builder.add(*_by_token(ids, spans, weights))


def _ended(
    draft: Draft, ids: array[int], spans: list[Span], reader: Reader, seq: int
) -> tuple[array[int], list[Span], list[float] | None]:
    """A text's ids with what begins and ends it, which of them are trained, and how much these spans count.

    A token is trained when any of its characters is: one that spans a prompt's end belongs to the answer. What ends a
    text is trained, what begins it is not where a prompt follows.
    """
    tokenizer, weights = reader.tokenizer, draft.weights
    if draft.shortened and len(ids) < seq:
        raise UserError(
            f"{_place(draft, reader)}: the line is too long: the part of its text that is read holds less than --seq"
            " tokens"
        )
    if not draft.rendered and (tokenizer.opening or tokenizer.ending):
        length = len(ids)
        before, after = tokenizer.missing_around(ids)
        ids = array("i", [*before, *ids, *after])
        spans = [(a + len(before), b + len(before)) for a, b in spans]
        spans.append((len(before) + length, len(ids)))
    # what tokenizer.json puts behind a text may hold EOS without ending with it
    ended = (ids and ids[-1] == tokenizer.eos_id) or (not draft.rendered and tokenizer.eos_id in tokenizer.ending)
    if draft.eos and not ended:
        if tokenizer.eos_id is not None:
            ids.append(tokenizer.eos_id)
            spans.append((len(ids) - 1, len(ids)))
            weights = weights and [*weights, weights[-1]]  # as the turn that it ends
        elif draft.rendered or not tokenizer.ending:
            raise UserError(f"{tokenizer.folder}: no eos_token in tokenizer_config.json to end texts with")
    if tokenizer.highest_id >= reader.vocab_size and (highest := max(ids[:seq], default=0)) >= reader.vocab_size:
        raise UserError(
            f"{_place(draft, reader)}: the tokenizer gives token id {highest}, outside the model's vocabulary of"
            f" {reader.vocab_size}"
        )
    return ids, spans if draft.spans is not None else [(0, len(ids))], weights


def _by_token(
    ids: Sequence[int], spans: Sequence[Span], weights: Sequence[float]
) -> tuple[Sequence[int], list[int], list[float]]:
    """The ids, their labels, and how much each counts."""
    labels, counted = [IGNORE] * len(ids), [0.0] * len(ids)
    for (first, last), weight in zip(spans, weights, strict=True):
        labels[first:last] = ids[first:last]
        counted[first:last] = [weight] * (last - first)
    return ids, labels, counted


def _place(draft: Draft, reader: Reader) -> str:
    return reader.source.place(draft.row)
