"""Batches of rows that come one by one: read as steps need them, in their order, and never kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar_gpu.data.batches import Batch, Step, collate
from entrenar_gpu.data.given import Stream
from entrenar_gpu.data.load import add_chunk
from entrenar_gpu.data.records import Reader, Reading
from entrenar_gpu.data.samples import SampleBuilder, Samples
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.ops.loss import IGNORE

ROWS_AT_ONCE = 64  # are tokenised together, and read ahead of the step that needs them

Sample = tuple[NDArray[np.uint32], NDArray[np.int32], NDArray[np.float32]]  # tokens, targets, weights of these


class StreamBatches:
    """An iterator over optimizer steps, as TrainBatches is one, that ends where the rows do.

    Rows that can be begun anew are, pass after pass. Packed rows hold samples in their order (next fit). A resumed run
    reads the rows that were trained on once more, and passes them over. Batches have weights, since a row yet to come
    may.
    """

    weighted = True

    def __init__(
        self,
        stream: Stream,
        tokenizer: Tokenizer | None,
        reading: Reading,
        *,
        batch: int,
        seq: int,
        accumulate: int = 1,
        pack: bool = True,
    ) -> None:
        self._stream, self._tokenizer, self._reading = stream, tokenizer, reading
        self.batch, self.seq, self.accumulate, self._pack = batch, seq, accumulate, pack
        self.samples = SampleBuilder(seq).samples(("rows as they come",))
        self._restart()

    def _restart(self) -> None:
        self._taken, self._epoch = 0, 0  # samples in rows so far, passes begun before this one
        self._samples = self._all()
        self._waiting: Sample | None = None  # did not fit any more

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        micro_batches: list[Batch] = []
        positions = 0
        for _ in range(self.accumulate):
            rows = [row for _ in range(self.batch) if (row := self._next_row())]
            positions += sum(len(tokens) for row in rows for tokens, _, _ in row)
            micro_batches.append(_collated(rows, self.batch, self.seq))
        step = Step.of(micro_batches, float(self._epoch), positions)
        if not step.tokens:
            raise StopIteration
        return step

    def state(self) -> dict[str, Any]:
        """How many samples were trained on, and what else decides which come next."""
        return {"samples": self._taken, "order": self.fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on behind the samples of a `state`. Raises UserError where it is none of a stream, or rows are missing."""
        taken = state.get("samples")
        if state.get("order") != self.fingerprint or type(taken) is not int or taken < 0:
            raise UserError(
                "--resume: the checkpoint was made with other data, or another --seq, --batch, --pack,"
                " --loss-on or --completions"
            )
        if taken == self._taken:
            return
        if not self._stream.again and (self._taken or self._waiting):
            raise UserError(f"{self._stream.name}: rows that were read cannot be read again; make another Trainer")
        self._restart()
        for _ in range(taken):
            if self._next_sample() is None:
                raise UserError(f"--resume: {self._stream.name} ends before what the checkpoint was trained on")
            self._taken += 1

    @property
    def fingerprint(self) -> str:
        order = f"stream {self.seq} {self._pack} {self._reading}"
        return hashlib.sha256(order.encode()).hexdigest()

    def _next_row(self) -> list[Sample]:
        row: list[Sample] = []
        room = self.seq
        while (sample := self._next_sample()) is not None:
            if row and (not self._pack or len(sample[0]) > room):
                self._waiting = sample
                break
            row.append(sample)
            room -= len(sample[0])
        self._taken += len(row)
        return row

    def _next_sample(self) -> Sample | None:
        if self._waiting is not None:
            sample, self._waiting = self._waiting, None
            return sample
        return next(self._samples, None)

    def _all(self) -> Iterator[Sample]:
        """Samples, pass after pass where the rows can be begun anew."""
        while True:
            read = 0
            reader = Reader(self._stream.source(), self._tokenizer, self._reading)
            for chunk in reader.chunks(ROWS_AT_ONCE):
                builder = SampleBuilder(self.seq)
                add_chunk(chunk, reader, builder)
                samples = builder.samples()
                read += len(samples)
                weights = samples.weights
                if weights is None:
                    weights = (samples.targets != IGNORE).astype(np.float32)
                for i, start in enumerate(samples.starts[:-1]):
                    yield *samples[i], weights[start : samples.starts[i + 1]]
            if not self._stream.again:
                return
            if not read:
                raise UserError(f"{self._stream.name}: holds no token to train")
            self._epoch += 1


def _collated(rows: list[list[Sample]], batch: int, seq: int) -> Batch:
    """The inputs of a micro-batch; rows that are missing are empty."""
    parts = [sample for row in rows for sample in row]
    starts = np.cumsum([0, *(len(tokens) for tokens, _, _ in parts)])
    tokens = np.concatenate([np.zeros(0, np.uint32), *(tokens for tokens, _, _ in parts)])
    targets = np.concatenate([np.zeros(0, np.int32), *(targets for _, targets, _ in parts)])
    weights = np.concatenate([np.zeros(0, np.float32), *(weights for _, _, weights in parts)])
    numbers = iter(range(len(parts)))
    samples = Samples(tokens, targets, starts, weights=weights)
    return collate(samples, [[next(numbers) for _ in row] for row in rows], batch, seq)
