"""Samples into rows, rows into batches: seeded shuffling, packing, and iterators that resume where they stopped.

A row has S positions. Packed rows hold several whole samples one behind the other; positions and attention restart at
each. What follows the last sample of a row is padding, every position of which is a segment of its own: attention
there sees one key and stays finite, and its target is ignored.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar_gpu.data.order import mixed_order, shuffled, words_of
from entrenar_gpu.data.samples import Samples
from entrenar_gpu.errors import UserError
from entrenar_gpu.ops.loss import IGNORE

Batch = dict[str, NDArray[Any]]

# Rows that packing keeps open: enough to fill rows well, few enough that a long file packs in linear time.
OPEN_ROWS = 1024


def pack_rows(lengths: Sequence[int], order: Iterable[int], seq: int, keep_order: bool = False) -> list[list[int]]:
    """Sample indices of each row: every sample of `order` whole, once, at most `seq` tokens a row.

    Best fit: a sample goes where it leaves the least room. With `keep_order` only the last row is open, so that rows
    read one after another give the samples in order (next fit).
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free positions, row) of the open rows, ascending
    for i in order:
        at = bisect_left(rooms, (lengths[i], -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            if keep_order:
                rooms.clear()
            elif len(rooms) == OPEN_ROWS:
                rooms.pop(0)  # the fullest
            room, row = seq, len(rows)
            rows.append([])
        rows[row].append(i)
        if room > lengths[i]:
            insort(rooms, (room - lengths[i], row))
    return rows


def collate(samples: Samples, rows: Sequence[Sequence[int]], batch: int, seq: int) -> Batch:
    """The graph's inputs for up to `batch` rows of samples, the rest empty rows; each array is [batch, seq].

    input_ids u32 (0 in padding), targets i32 (IGNORE without loss), positions u32 (index in the sample),
    segment_start u32 (index in the row of the first position of this position's sample); where samples are weighted
    also weights f32 (0 without loss).
    """
    arrays: Batch = {
        "input_ids": np.zeros((batch, seq), np.uint32),
        "targets": np.full((batch, seq), IGNORE, np.int32),
        "positions": np.zeros((batch, seq), np.uint32),
        "segment_start": np.tile(np.arange(seq, dtype=np.uint32), (batch, 1)),
    }
    if samples.weights is not None:
        arrays["weights"] = np.zeros((batch, seq), np.float32)
    for b, row in enumerate(rows):
        start = 0
        for i in row:
            tokens, targets = samples[i]
            here = (b, slice(start, start + len(tokens)))
            arrays["input_ids"][here] = tokens
            arrays["targets"][here] = targets
            arrays["positions"][here] = np.arange(len(tokens))
            arrays["segment_start"][here] = start
            if samples.weights is not None:
                arrays["weights"][here] = samples.weights[samples.starts[i] : samples.starts[i + 1]]
            start += len(tokens)
    return arrays


def eval_batches(samples: Samples, *, batch: int, seq: int, pack: bool = True) -> Iterator[Batch]:
    """Every sample once, in the same order each time; the last batch is filled up with empty rows."""
    rows = _rows(samples, range(len(samples)), seq, pack, keep_order=False)
    for at in range(0, len(rows), batch):
        yield collate(samples, rows[at : at + batch], batch, seq)


def segment_lengths(segment_start: NDArray[np.uint32]) -> NDArray[np.int64]:
    """How many positions the sample at each position of a batch has, [batch, seq]; 1 in padding."""
    batch, seq = segment_start.shape
    first = segment_start.astype(np.int64) + seq * np.arange(batch)[:, None]
    return np.bincount(first.reshape(-1), minlength=batch * seq)[first]


def count_targets(batches: Sequence[Batch]) -> int:
    """How many positions have a target."""
    return sum(int(np.count_nonzero(batch["targets"] != IGNORE)) for batch in batches)


def weight_of(batches: Sequence[Batch]) -> float:
    """What the sum of losses is divided by: the sum of the weights, or the number of targets where all weigh 1."""
    if all("weights" not in batch for batch in batches):
        return count_targets(batches)
    return sum(float(batch["weights"].sum(dtype=np.float64)) for batch in batches)


@dataclass(frozen=True)
class Step:
    """What one optimizer step trains on: micro-batches, how many positions of them have a target, the passes over the
    data made when it is done, how many positions hold data, prompts included and padding not, and the sum of the
    targets' weights."""

    micro_batches: list[Batch]
    tokens: int
    epoch: float
    positions: int
    weight: float

    @classmethod
    def of(cls, micro_batches: list[Batch], epoch: float, positions: int) -> Step:
        """With weights of at most 1, divided by a power of two: a mean is the same, and f16 holds its gradients."""
        largest = max((float(batch["weights"].max()) for batch in micro_batches if "weights" in batch), default=0.0)
        if largest > 0:
            factor = np.float32(2.0 ** -math.ceil(math.log2(largest)))
            micro_batches = [batch | {"weights": batch["weights"] * factor} for batch in micro_batches]
        return cls(micro_batches, count_targets(micro_batches), epoch, positions, weight_of(micro_batches))


class TrainBatches:
    """An endless iterator over optimizer steps of `accumulate` micro-batches of `batch` rows.

    An epoch is one pass: every sample once, in an order drawn from (seed, epoch), or that of the file; with `mix`, as
    many samples, of which each of `samples.groups` has its share. Epochs run on into each other, so every step is full,
    also where the data fill less than one. What comes next depends only on the arguments and on `state`, a small JSON
    object.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch: int,
        seq: int,
        accumulate: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        pack: bool = True,
        mix: Sequence[float] | None = None,
    ) -> None:
        self.samples, self.batch, self.seq, self.accumulate = samples, batch, seq, accumulate
        self._seed, self._shuffle, self._pack, self._mix = seed, shuffle, pack, mix
        self._epoch, self._next = 0, 0
        self._rows = self._epoch_rows(0)

    def steps(self, epochs: float) -> int:
        """How many steps make `epochs` passes; the last one may begin the pass after."""
        whole = int(epochs)
        rows = float(sum(len(self._epoch_rows(epoch)) for epoch in range(whole)))
        if epochs > whole:
            rows += (epochs - whole) * len(self._epoch_rows(whole))
        return math.ceil(rows / (self.batch * self.accumulate))

    @property
    def weighted(self) -> bool:
        """Whether batches have weights."""
        return self.samples.weights is not None

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        rows = [[self._next_row() for _ in range(self.batch)] for _ in range(self.accumulate)]
        micro_batches = [collate(self.samples, some, self.batch, self.seq) for some in rows]
        positions = sum(int(self.samples.lengths[row].sum()) for some in rows for row in some)
        return Step.of(micro_batches, self._epoch + self._next / len(self._rows), positions)

    def state(self) -> dict[str, Any]:
        """Where the iterator stands: the epoch, the row that comes next in it, and which data and order these count."""
        return {"epoch": self._epoch, "row": self._next, "order": self.fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. Raises UserError when that was one of other data or another order, or of none."""
        if state.get("order") != self.fingerprint:
            raise UserError(
                "--resume: the checkpoint was made with other data, or another --seq, --seed, --pack, --shuffle,"
                " --mix, --map, --loss-on or --completions"
            )
        epoch, row = state.get("epoch"), state.get("row")
        if type(epoch) is int and 0 <= epoch < 2**53:
            rows = self._epoch_rows(epoch)
            if type(row) is int and 0 <= row <= len(rows):
                self._epoch, self._next, self._rows = epoch, row, rows
                return
        raise UserError("--resume: the checkpoint's place in the data, an epoch and a row, is damaged")

    @property
    def fingerprint(self) -> str:
        """A hash of the data and of all that determines the order of rows."""
        order = f"{self.samples.fingerprint} {self.seq} {self._seed} {self._shuffle} {self._pack}"
        if self._mix is not None:
            order += f" {self.samples.groups} {self._mix}"
        return hashlib.sha256(order.encode()).hexdigest()

    def _next_row(self) -> list[int]:
        if self._next == len(self._rows):
            self._epoch, self._next = self._epoch + 1, 0
            self._rows = self._epoch_rows(self._epoch)
        self._next += 1
        return self._rows[self._next - 1]

    def _epoch_rows(self, epoch: int) -> list[list[int]]:
        words = words_of(self._seed, epoch)
        order: Iterable[int] = range(len(self.samples))
        if self._mix is not None:
            order = mixed_order(self.samples.groups, self._mix, epoch, self._seed, self._shuffle)
        elif self._shuffle:
            order = shuffled(len(self.samples), words)
        rows = _rows(self.samples, order, self.seq, self._pack, keep_order=not self._shuffle)
        # Packing leaves the rows that nothing fitted into for last; shuffled again, no part of an epoch is special.
        return [rows[i] for i in shuffled(len(rows), words)] if self._shuffle else rows


def _rows(samples: Samples, order: Iterable[int], seq: int, pack: bool, keep_order: bool) -> list[list[int]]:
    lengths = samples.lengths.tolist()
    if max(lengths) > seq:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit rows of {seq}")
    return pack_rows(lengths, order, seq, keep_order) if pack else [[i] for i in order]
