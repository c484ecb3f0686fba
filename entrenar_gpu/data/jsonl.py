"""JSONL in, tokenised samples out.

A file is read in the order of its lines, a thousand at a time: one thread parses them and has their conversations
rendered (records.py), while this one tokenises the lines before. Memory holds no more of the file than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from entrenar_gpu.chat import Span
from entrenar_gpu.data.prefix import Encoded
from entrenar_gpu.data.records import Draft, Reader, Tokens
from entrenar_gpu.data.samples import SampleBuilder, Samples
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError

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
        _add(chunk, reader, builder)
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


def _add(chunk: list[Draft | Tokens], reader: Reader, builder: SampleBuilder) -> None:
    """Tokenise the lines of a chunk together and add them in their order."""
    encoded: dict[int, Encoded] = {}
    for with_spans in (False, True):
        drafts = [d for d in chunk if isinstance(d, Draft) and (d.spans is not None) == with_spans]
        if drafts:
            spans = [draft.spans or [] for draft in drafts] if with_spans else None
            batch = reader.tokenizer.encode_beginnings([draft.text for draft in drafts], builder.seq, spans)
            encoded.update((draft.line, encoding) for draft, encoding in zip(drafts, batch, strict=True))
    for line in chunk:
        if isinstance(line, Tokens):
            builder.add(line.ids, line.labels)
        else:
            builder.add_spans(*_ended(line, *encoded.pop(line.line), reader, builder.seq))


def _ended(draft: Draft, ids: list[int], spans: list[Span], reader: Reader, seq: int) -> tuple[list[int], list[Span]]:
    """A text's ids with what begins and ends it, and which of them are trained.

    A token is trained when any of its characters is: one that spans a prompt's end belongs to the answer. What ends a
    text is trained, what begins it is not where a prompt follows.
    """
    where, tokenizer = f"{reader.path}:{draft.line}", reader.tokenizer
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
        elif draft.rendered or not tokenizer.ending:
            raise UserError(f"{tokenizer.folder}: no eos_token in tokenizer_config.json to end texts with")
    if (highest := max(ids[:seq], default=0)) >= reader.vocab_size:
        raise UserError(
            f"{where}: the tokenizer gives token id {highest}, outside the model's vocabulary of {reader.vocab_size}"
        )
    return ids, spans if draft.spans is not None else [(0, len(ids))]
