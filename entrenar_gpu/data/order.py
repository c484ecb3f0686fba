"""The order of samples in each pass over the data: seeded, and the same wherever a run is taken up again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from entrenar_gpu.errors import UserError


def shuffled(count: int, words: np.random.Philox) -> list[int]:
    """The numbers below `count` in an order drawn from `words`.

    Ranks of raw random words: NumPy promises these streams to stay the same between versions, permutations not.
    """
    return np.argsort(words.random_raw(count), kind="stable").tolist()


def words_of(*seeds: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(seeds))


def parse_mix(text: str | None, sources: int) -> tuple[float, ...] | None:
    """The shares of `0.7,0.3`, which sum to 1 when this returns them. Raises UserError naming --mix."""
    if text is None:
        return None
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--mix: {text!r} is not a list of numbers, as in 0.7,0.3") from None
    if len(shares) != sources:
        raise UserError(f"--mix: {len(shares)} shares for {sources} of --data")
    if not all(math.isfinite(share) and share > 0 for share in shares):
        raise UserError(f"--mix: {text!r}: shares are numbers above 0")
    return tuple(share / sum(shares) for share in shares)


def mixed_order(groups: Sequence[int], mix: Sequence[float], epoch: int, seed: int, shuffle: bool) -> list[int]:
    """Samples of a pass in which each group has its share: as many as all groups have together.

    A group is gone through again and again, in an order of its own each time, without regard to where a pass ends: no
    sample of it comes a second time before all others have come.
    """
    counts = _counts(sum(groups), mix)
    drawn: list[int] = []
    places: list[float] = []
    first = 0
    for number, (size, count) in enumerate(zip(groups, counts, strict=True)):
        for i in range(epoch * count, (epoch + 1) * count):
            if i == epoch * count or i % size == 0:
                lap = shuffled(size, words_of(seed, i // size, number)) if shuffle else range(size)
            drawn.append(first + lap[i % size])
        places += [(i + 0.5) / count for i in range(count)]
        first += size
    if shuffle:
        return [drawn[i] for i in shuffled(len(drawn), words_of(seed, epoch))]
    return [drawn[i] for i in np.argsort(places, kind="stable")]


def _counts(total: int, mix: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total` and are nearest to the shares: the largest remainders are rounded up."""
    exact = [share * total for share in mix]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(mix)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
