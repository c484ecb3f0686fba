"""What training will see of the data, counted, and what looks wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar_gpu.data.batches import pack_rows
from entrenar_gpu.data.samples import Samples
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.ops.loss import IGNORE

# A share of the samples beyond which something is wrong rather than odd.
MANY = 0.1
BINS = 12


@dataclass(frozen=True)
class Inspection:
    """`lengths` are (from, to, samples) of bins; `packed` and `unpacked` the share of row positions that hold data."""

    samples: int
    tokens: int
    trained_tokens: int
    cut: int
    skipped: int
    lost: int
    rows: int
    packed: float
    unpacked: float
    lengths: tuple[tuple[int, int, int], ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def inspect_samples(samples: Samples, tokenizer: Tokenizer | None, seq: int) -> Inspection:
    """Count what is there. `seq` is the length of a row, at which samples were cut."""
    lengths = samples.lengths
    rows = len(pack_rows(lengths.tolist(), range(len(samples)), seq))
    return Inspection(
        samples=len(samples),
        tokens=len(samples.tokens),
        trained_tokens=samples.trained_tokens,
        cut=samples.cut,
        skipped=samples.skipped,
        lost=samples.lost,
        rows=rows,
        packed=len(samples.tokens) / (rows * seq),
        unpacked=len(samples.tokens) / (len(samples) * seq),
        lengths=_histogram(lengths, seq),
        notes=samples.notes,
        problems=tuple(_problems(samples, tokenizer, seq)),
    )


def _histogram(lengths: np.ndarray, seq: int) -> tuple[tuple[int, int, int], ...]:
    """Bins of equal width up to the longest sample; the last one holds that too."""
    longest = int(lengths.max())
    edges = np.unique(np.linspace(1, longest + 1, min(BINS, longest) + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    return tuple((int(a), int(b) - 1, int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True))


def _problems(samples: Samples, tokenizer: Tokenizer | None, seq: int) -> list[str]:
    found = []
    everything = len(samples) + samples.skipped
    if samples.lost > MANY * everything:
        found.append(
            f"{samples.lost:,} of {everything:,} samples are cut before anything that is trained:"
            f" their prompts alone fill {seq} tokens; raise --seq"
        )
    if tokenizer is None:
        return found
    if (doubled := _with_two_bos(samples, tokenizer.bos_id)) > 0:
        found.append(
            f"{doubled:,} samples begin with two BOS tokens; take the one out that the rows or the template write"
        )
    whole = samples.lengths < seq
    if (without := int(np.count_nonzero(whole & ~_train_an_end(samples, tokenizer)))) > MANY * np.count_nonzero(whole):
        found.append(
            f"{without:,} of {np.count_nonzero(whole):,} samples that are not cut train no end of turn or text:"
            " the model will not learn to stop"
        )
    return found


def _with_two_bos(samples: Samples, bos: int | None) -> int:
    starts = samples.starts[:-1][samples.lengths > 1]
    return (
        0
        if bos is None
        else int(np.count_nonzero((samples.tokens[starts] == bos) & (samples.tokens[starts + 1] == bos)))
    )


def _train_an_end(samples: Samples, tokenizer: Tokenizer) -> np.ndarray:
    """For each sample whether one of its targets ends a turn or a text."""
    ends = np.isin(samples.targets, np.array(sorted(tokenizer.eos_ids), np.int32)) & (samples.targets != IGNORE)
    return np.add.reduceat(ends, samples.starts[:-1], dtype=np.int64) > 0
