"""JSONL in, tokenised samples out.

A file is read in the order of its lines, a thousand at a time: one thread parses them and has their conversations
rendered (records.py), while this one tokenises the lines before. Memory holds no more of the file than that.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from entrenar_gpu.data.records import Draft, Reader, Tokens
from entrenar_gpu.data.samples import SampleBuilder, Samples
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.ops.loss import IGNORE

T = TypeVar("T")


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
    reader = Reader(str(path), tokenizer, vocab_size, loss_on == "all", completions == "chat")
    builder = SampleBuilder(seq)
    for chunk in _ahead(reader.chunks()):
        for ids, labels in _tokenised(chunk, reader, seq):
            builder.add(ids, labels)
    samples = builder.samples(reader.notes())
    if not len(samples):
        raise UserError(f"{path}: holds no token to train ({samples.skipped} samples without any)")
    return samples


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, the next of which is made by another thread while one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _tokenised(chunk: list[Draft | Tokens], reader: Reader, seq: int) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of each line, in the order of the lines; whole, or cut anywhere behind `seq` tokens."""
    encoded: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
    for with_offsets in (False, True):
        drafts = [d for d in chunk if isinstance(d, Draft) and (d.spans is not None) == with_offsets]
        if drafts:
            batch = reader.tokenizer.encode_batch([draft.text for draft in drafts], seq, with_offsets)
            encoded.update((draft.line, encoding) for draft, encoding in zip(drafts, batch, strict=True))
    for line in chunk:
        yield (line.ids, line.labels) if isinstance(line, Tokens) else _labelled(line, *encoded[line.line], reader, seq)


def _labelled(
    draft: Draft, ids: list[int], offsets: list[tuple[int, int]], reader: Reader, seq: int
) -> tuple[list[int], list[int]]:
    """A token is trained when any of its characters is: one that spans a prompt's end belongs to the answer.

    What ends a text is trained, what begins it is not where a prompt follows.
    """
    where, tokenizer = f"{reader.path}:{draft.line}", reader.tokenizer
    if draft.shortened and len(ids) < seq:
        raise UserError(
            f"{where}: the line is too long: the part of its text that is read holds less than --seq tokens"
        )
    labels = list(ids) if draft.spans is None else [IGNORE] * len(ids)
    for start, end in draft.spans or ():
        first = bisect_right(offsets, start, key=_end)
        last = bisect_left(offsets, end, key=_begin)
        labels[first:last] = ids[first:last]
    if not draft.rendered:
        before, framed = tokenizer.framed(ids)
        opening = framed[:before] if draft.spans is None else [IGNORE] * before
        labels = [*opening, *labels, *framed[before + len(ids) :]]
        ids = framed
    if draft.eos and ids[-1:] != [tokenizer.eos_id]:
        if tokenizer.eos_id is not None:
            ids, labels = [*ids, tokenizer.eos_id], [*labels, tokenizer.eos_id]
        elif draft.rendered or not tokenizer.ending:
            raise UserError(f"{tokenizer.folder}: no eos_token in tokenizer_config.json to end texts with")
    if max(ids[:seq], default=0) >= reader.vocab_size:
        raise UserError(
            f"{where}: the tokenizer gives token id {max(ids[:seq])}, outside the model's vocabulary of"
            f" {reader.vocab_size}"
        )
    return ids, labels


def _begin(span: tuple[int, int]) -> int:
    return span[0]


def _end(span: tuple[int, int]) -> int:
    return span[1]
