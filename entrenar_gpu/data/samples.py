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

_IGNORED = array("i", [IGNORE])


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
        self.tokens, self.targets, self.starts = array("i"), array("i"), array("q", [0])
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

    def add_spans(self, ids: array[int], spans: Sequence[tuple[int, int]]) -> None:
        """The same for a sample of which the tokens [first, last) of `spans` are trained, and all count the same."""
        tokens = ids if len(ids) <= self.seq else ids[: self.seq]
        targets = array("i")
        for first, last in sorted(spans):
            first = max(first, len(targets) + 1)  # a token may stand in two spans; the first one is no target
            if first < min(last, len(tokens)):
                targets += _IGNORED * (first - 1 - len(targets))
                targets += tokens[first:last]
        if not targets:
            self._skip(len(ids) > self.seq)
            return
        self.cut += len(ids) > self.seq
        targets += _IGNORED * (len(tokens) - len(targets))
        self.tokens += tokens
        self.targets += targets
        self.starts.append(len(self.tokens))

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
