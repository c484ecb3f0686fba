"""Rows in, tokenised samples out.

A source is read in the order of its rows, a thousand at a time: one thread parses them and has their conversations
rendered (records.py), while this one tokenises the rows before. Memory holds no more of the source than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from entrenar_gpu.chat import Span
from entrenar_gpu.data.prefix import Encoded
from entrenar_gpu.data.records import Draft, Reader, Reading, Tokens
from entrenar_gpu.data.rows import RowSource, open_file
from entrenar_gpu.data.samples import SampleBuilder, Samples
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError

T = TypeVar("T")


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
            for chunk in _ahead(reader.chunks()):
                add_chunk(chunk, reader, builder)
            notes |= dict.fromkeys(reader.notes())
        counts.append(len(builder) - before)
        if not counts[-1]:
            skipped, lost = builder.skipped - skipped, builder.lost - lost
            why = f", {lost} of them cut before it; raise --seq" if lost else ""
            raise UserError(f"{_names(group)}: holds no token to train ({skipped} samples without any{why})")
    return builder.samples(tuple(notes), tuple(counts))


def _names(group: Sequence[RowSource]) -> str:
    return group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, the next of which is made by another thread while one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def add_chunk(chunk: list[Draft | Tokens], reader: Reader, builder: SampleBuilder) -> None:
    """Tokenise the rows of a chunk together and add them in their order."""
    encoded: dict[int, Encoded] = {}
    for with_spans in (False, True):
        drafts = [d for d in chunk if isinstance(d, Draft) and (d.spans is not None) == with_spans]
        if drafts:
            spans = [draft.spans or [] for draft in drafts] if with_spans else None
            batch = reader.tokenizer.encode_beginnings([draft.text for draft in drafts], builder.seq, spans)
            encoded.update((draft.row, encoding) for draft, encoding in zip(drafts, batch, strict=True))
    for row in chunk:
        if isinstance(row, Tokens):
            builder.add(row.ids, row.labels, row.weights)
        else:
            builder.add_spans(*_ended(row, *encoded.pop(row.row), reader, builder.seq))


def _ended(
    draft: Draft, ids: list[int], spans: list[Span], reader: Reader, seq: int
) -> tuple[list[int], list[Span], list[float] | None]:
    """A text's ids with what begins and ends it, which of them are trained, and how much these spans count.

    A token is trained when any of its characters is: one that spans a prompt's end belongs to the answer. What ends a
    text is trained, what begins it is not where a prompt follows.
    """
    where, tokenizer, weights = reader.source.place(draft.row), reader.tokenizer, draft.weights
    if draft.shortened and len(ids) < seq:
        raise UserError(
            f"{where}: the line is too long: the part of its text that is read holds less than --seq tokens"
        )
    if not draft.rendered:
        length = len(ids)
        before, ids = tokenizer.framed(ids)
        spans = [(a + before, b + before) for a, b in spans]
        spans.append((before + length, len(ids)))
    if draft.eos and ids[-1:] != [tokenizer.eos_id]:
        if tokenizer.eos_id is not None:
            ids.append(tokenizer.eos_id)
            spans.append((len(ids) - 1, len(ids)))
            weights = weights and [*weights, weights[-1]]  # as the turn that it ends
        elif draft.rendered or not tokenizer.ending:
            raise UserError(f"{tokenizer.folder}: no eos_token in tokenizer_config.json to end texts with")
    if (highest := max(ids[:seq], default=0)) >= reader.vocab_size:
        raise UserError(
            f"{where}: the tokenizer gives token id {highest}, outside the model's vocabulary of {reader.vocab_size}"
        )
    return ids, spans if draft.spans is not None else [(0, len(ids))], weights
