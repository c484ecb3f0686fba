"""Tokenised samples with their targets, in flat arrays. The shift from labels to targets happens here and only here."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar_gpu.ops.loss import IGNORE


@dataclass(frozen=True)
class Samples:
    """All samples of a file, end to end: sample i holds positions starts[i] to starts[i+1].

    `tokens` [N] are token ids; `targets` [N] the token to predict at each position, IGNORE where there is no loss:
    the sample's next label, so the last position of a sample has none. `weights` [N] say how much the targets count, 0
    where there is none; they are None where all count the same. `skipped` samples had nothing to train and are
    not here, `lost` ones of them because what they train lay behind the cut; `cut` ones were longer than allowed.
    `notes` say how the rows were read, for people. `groups` are the numbers of samples that came from each of several
    sources, in order.
    """

    tokens: NDArray[np.uint32]
    targets: NDArray[np.int32]
    starts: NDArray[np.int64]
    skipped: int = 0
    cut: int = 0
    notes: tuple[str, ...] = ()
    lost: int = 0
    groups: tuple[int, ...] = ()
    weights: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
        """Tokens and targets of sample `i`, as views."""
        span = slice(self.starts[i], self.starts[i + 1])
        return self.tokens[span], self.targets[span]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    @cached_property
    def trained_tokens(self) -> int:
        """How many positions have a target."""
        return int(np.count_nonzero(self.targets != IGNORE))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that training sees of the data: equal data, equal text."""
        digest = hashlib.sha256()
        for values, kind in ((self.tokens, "<u4"), (self.targets, "<i4"), (self.starts, "<i8")):
            digest.update(values.astype(kind, copy=False).data)
        if self.weights is not None:
            digest.update(self.weights.astype("<f4", copy=False).data)
        return digest.hexdigest()


class SampleBuilder:
    """Gathers samples into flat arrays: cuts at `seq`, shifts labels to targets, leaves out what has no target."""

    def __init__(self, seq: int) -> None:
        self.seq, self.skipped, self.cut, self.lost = seq, 0, 0, 0
        self.tokens, self.targets, self.starts = array("I"), array("i"), array("q", [0])
        self._weighted: list[tuple[int, NDArray[np.float32]]] = []  # weights of targets, and where they begin

    def __len__(self) -> int:
        return len(self.starts) - 1

    def add(self, ids: Sequence[int], labels: Sequence[int], weights: Sequence[float] | None = None) -> None:
        """One sample; `labels` stand at their own token, IGNORE where it is not trained, `weights` likewise."""
        targets = [*labels[1 : self.seq], IGNORE]
        if all(target == IGNORE for target in targets):
            self._skip(any(label != IGNORE for label in labels[self.seq :]))
            return
        self.cut += len(ids) > self.seq
        if weights is not None:
            self._weighted.append((len(self.tokens), np.array([*weights[1 : self.seq], 0], np.float32)))
        self.tokens.extend(ids[: self.seq])
        self.targets.extend(targets)
        self.starts.append(len(self.tokens))

    def add_spans(self, rows: Sequence[tuple[Sequence[int], Sequence[tuple[int, int]]]]) -> None:
        """Samples of which the tokens of these spans [first, last) are trained: ids and spans of each."""
        kept, starts = array("I"), array("q", [0])
        begins, ends = array("q"), array("q")  # of what is trained; a sample's first token is no target
        for ids, spans in rows:
            at = len(kept)
            kept.extend(ids if len(ids) <= self.seq else ids[: self.seq])
            stop = len(kept)
            starts.append(stop)
            for first, last in spans:
                if max(first, 1) < last:
                    begins.append(min(at + max(first, 1), stop))
                    ends.append(min(at + last, stop))
        tokens, bounds = _view(kept, np.uint32), _view(starts, np.int64)
        edges = [np.bincount(_view(places, np.int64), minlength=len(tokens) + 1) for places in (begins, ends)]
        trained = np.cumsum(edges[0] - edges[1])[:-1] > 0
        targets = np.full(len(tokens), IGNORE, np.int32)
        targets[:-1][trained[1:]] = tokens[1:][trained[1:]]
        counts = np.concatenate([[0], np.cumsum(trained)])
        there = counts[bounds[1:]] > counts[bounds[:-1]]
        long = np.array([len(ids) > self.seq for ids, _ in rows], bool)
        self.cut += int(np.count_nonzero(long & there))
        self.skipped += int(np.count_nonzero(~there))
        self.lost += int(np.count_nonzero(long & ~there))
        lengths = np.diff(bounds)
        if not there.all():
            positions = np.repeat(there, lengths)
            tokens, targets = tokens[positions], targets[positions]
        begin = len(self.tokens)
        self.tokens.frombytes(tokens.tobytes())
        self.targets.frombytes(targets.tobytes())
        self.starts.frombytes((begin + np.cumsum(lengths[there])).tobytes())

    def _skip(self, trains_behind_the_cut: bool) -> None:
        self.skipped += 1
        self.lost += trains_behind_the_cut

    def samples(self, notes: tuple[str, ...] = (), groups: tuple[int, ...] = ()) -> Samples:
        """What was added so far."""
        return Samples(
            _view(self.tokens, np.uint32),
            _view(self.targets, np.int32),
            _view(self.starts, np.int64),
            self.skipped,
            self.cut,
            notes,
            self.lost,
            groups,
            self._weights(),
        )

    def _weights(self) -> NDArray[np.float32] | None:
        if not self._weighted:
            return None
        weights = (_view(self.targets, np.int32) != IGNORE).astype(np.float32)
        for start, values in self._weighted:
            weights[start : start + len(values)] *= values
        return weights


def _view(values: array[int], kind: type) -> NDArray[Any]:
    """An array over the same memory: a copy would double it."""
    return np.frombuffer(values, kind) if values else np.zeros(0, kind)
