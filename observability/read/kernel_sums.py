"""Kernels by operation and shape, summed over the layers of a step.

A model of 36 layers has its attention 36 times a step, each a kind of span of its own; what somebody who tunes kernels
asks is what all of them took together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from observability.read.span_table import KERNEL, Floats, Ints, SpanTable

_MOST_GROUPS: Final = 500


@dataclass(frozen=True)
class KernelGroup:
    """Every kernel of one `operation` and `shape`; launches, FLOP and bytes moved are those of a typical step."""

    operation: str
    shape: str
    launches: float
    flops: float
    bytes: float

    @property
    def label(self) -> str:
        return f"{self.operation} {self.shape}".strip()


@dataclass(frozen=True)
class KernelSums:
    """`seconds[i, g]` is what all kernels of group g took in the step with number `steps[i]`."""

    steps: Ints
    groups: tuple[KernelGroup, ...]
    seconds: Floats

    @property
    def busy(self) -> Floats:
        """Seconds of each step in kernels."""
        result: Floats = self.seconds.sum(axis=1)
        return result


def operation(name: str) -> str:
    """The operation in a kernel's name: what follows the module, as in layers.3.self_attn/attention."""
    return name.rsplit("/", 1)[-1]


def kernel_sums(spans: SpanTable, run: int, step: Ints) -> KernelSums | None:
    """The sums of the run's kernels in the steps numbered `step`; None where the trace has no kernels of theirs."""
    rows = np.flatnonzero((spans.run == run) & (spans.level == KERNEL))
    position = np.searchsorted(step, spans.step[rows])
    known = (position < len(step)) & (step[np.minimum(position, len(step) - 1)] == spans.step[rows])
    rows, position = rows[known], position[known]
    if not len(rows):
        return None
    keys: dict[tuple[str, str], int] = {}
    used = np.unique(spans.name[rows])
    by_name = np.zeros(len(spans.labels), dtype=np.int64)
    operations: dict[str, int] = {}
    for label in used.tolist():
        by_name[label] = operations.setdefault(operation(spans.labels[label]), len(operations))
    pairs = np.stack([by_name[spans.name[rows]], spans.shape[rows]])
    unique, group = np.unique(pairs[0] * len(spans.labels) + pairs[1], return_inverse=True)
    names = list(operations)
    for code in unique.tolist():
        keys[names[code // len(spans.labels)], spans.labels[code % len(spans.labels)]] = len(keys)
    with_kernels, place = np.unique(position, return_inverse=True)
    seconds = np.zeros((len(with_kernels), len(keys)))
    np.add.at(seconds, (place, group), (spans.end[rows] - spans.start[rows]) / 1e9)
    launches, flops, moved = (
        np.bincount(group, weights=weights, minlength=len(keys)) / len(with_kernels)
        for weights in (None, spans.flops[rows], spans.bytes[rows])
    )
    groups = tuple(
        KernelGroup(name, shape, float(launches[g]), float(flops[g]), float(moved[g]))
        for (name, shape), g in keys.items()
    )
    sums = KernelSums(step[with_kernels], groups, seconds)
    return _largest(sums) if len(groups) > _MOST_GROUPS else sums


def _largest(sums: KernelSums) -> KernelSums:
    kept = np.sort(np.argsort(-sums.seconds.sum(axis=0))[:_MOST_GROUPS])
    return replace(sums, groups=tuple(sums.groups[g] for g in kept), seconds=sums.seconds[:, kept])


def joined(parts: list[KernelSums]) -> KernelSums | None:
    """The sums of consecutive parts of one run as one; launches, FLOP and bytes by how many steps each part has."""
    if len(parts) < 2:
        return parts[0] if parts else None
    keys: dict[tuple[str, str], int] = {}
    for part in parts:
        for group in part.groups:
            keys.setdefault((group.operation, group.shape), len(keys))
    total = sum(len(part.steps) for part in parts)
    seconds, work = np.zeros((total, len(keys))), np.zeros((len(keys), 3))
    at = 0
    for part in parts:
        columns = [keys[group.operation, group.shape] for group in part.groups]
        seconds[at : at + len(part.steps), columns] = part.seconds
        share = len(part.steps) / total
        for column, group in zip(columns, part.groups, strict=True):
            work[column] += np.array([group.launches, group.flops, group.bytes]) * share
        at += len(part.steps)
    groups = tuple(KernelGroup(name, shape, *work[g].tolist()) for (name, shape), g in keys.items())
    return KernelSums(np.concatenate([part.steps for part in parts]), groups, seconds)
