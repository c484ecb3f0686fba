"""Slowdowns that stay: a level that steps up (throttling) or creeps up (drift), seen against the healthy start.

Lower quartiles of blocks of steps are split into stretches of one level (binary segmentation), and stretches above the
fixed baseline are joined and told apart by which fits better, a step or a ramp. Kinds of span are looked at one by one,
each against its like, so that what holds up all alike hides none of them (kinds.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np

from observability.detect.baseline import FLOOR, HEALTHY_START, MAD_TO_SIGMA
from observability.read import Floats, Ints

_BLOCK: Final = 10  # steps a block; fewer in a short run
_BLOCKS: Final = 40  # in a short run, if it has steps for them
_LEAST_BLOCK: Final = 4
_SPLIT_AT: Final = 4.0  # sigmas of the difference of two means at which a stretch is split
_LEAST_BLOCKS: Final = 3
LEAST_RISE: Final = 0.03  # a smaller slowdown is not worth a line
_RISE_OF_NOISE: Final = 1.5  # sigmas of a block: a smaller rise is within what blocks of steps do anyway
# Of the steps of a block: noise mostly adds to a step, and its lower quartile wanders far less than its median.
LOW: Final = 0.25
_SURE_AT: Final = 5.0  # sigmas of the difference of the two levels
_FEW_BLOCKS: Final = 8  # so many more would be needed to know their noise well
_NINETIETH: Final = 1.645  # sigmas of a Gaussian within which nine tenths of it lie
_CLIP: Final = 4.0  # sigmas: further out a block is an event, and says nothing of how levels wander
_LONG: Final = 0.2  # of the run: so long a faster stretch is what the run can do
_LEAST_RAMP_BLOCKS: Final = 6  # a shorter ramp cannot be told from a step
_RAMP_BETTER: Final = 0.9  # a ramp must leave at most so much of what a step leaves unexplained


LEVEL_SHAPE: Final = "level"
DRIFT_SHAPE: Final = "drift"


@dataclass(frozen=True)
class Shift:
    """Rows `first` to `last` (inclusive) ran at `level` seconds where `healthy` were expected; `kind` names the shape.

    For a drift, `level` is where it ended and `slope` the relative rise a step.
    """

    kind: str  # LEVEL_SHAPE or DRIFT_SHAPE
    first: int
    last: int
    healthy: float
    level: float
    z: float
    slope: float = 0.0


def with_floor(z: float, healthy: float, level: float) -> float:
    """`z` in sigmas of no less than FLOOR of the level: what took nothing before scattered by nothing."""
    return min(z, (1 - healthy / level) / FLOOR)


def find_shifts(times: Floats, least: float = LEAST_RISE, quantile: float = LOW) -> list[Shift]:
    """Sustained slowdowns in the times of consecutive steps, already corrected for their work. Seconds.

    A rise must be at least `least` of the healthy level, and more than levels wander on their own: the difference of
    the two levels is held against the noise of blocks and their autocorrelation, see `_surety`. `quantile` is what
    stands for a block of steps.
    """
    block = min(max(len(times) // _BLOCKS, _LEAST_BLOCK), _BLOCK)
    count = len(times) // block
    if count < 3 * _LEAST_BLOCKS:
        return []
    parts = times[: count * block].reshape(count, block)
    blocks = np.log(np.quantile(parts, quantile, axis=1))
    typical = float(np.exp(np.median(np.log(np.median(parts, axis=1)) - blocks)))  # what people are told are medians
    sigma = _block_noise(blocks)
    stretches = _split(blocks, 0, count, sigma)
    healthy = _healthy(blocks, stretches, HEALTHY_START // block)
    threshold = max(np.log1p(least), _RISE_OF_NOISE * sigma)
    for base, cut in _cuts(blocks, stretches, healthy, threshold):
        elevated = _elevated(blocks, stretches, base, threshold, cut)
        shifts = [_shape(blocks, first, end, base, block, len(times)) for first, end in elevated]
        surety = _surety(blocks, elevated, shifts, base, sigma, block)
        sure = [
            replace(
                shift,
                z=with_floor(z, shift.healthy, shift.level),
                healthy=shift.healthy * typical,
                level=shift.level * typical,
            )
            for shift, z in zip(shifts, surety, strict=True)
            if z >= _SURE_AT and np.log(shift.level / shift.healthy) >= threshold
        ]
        if sure:
            return sure
    return []


def _cuts(
    blocks: Floats, stretches: list[tuple[int, int]], healthy: float, threshold: float
) -> Iterator[tuple[float, float]]:
    """(healthy level, level from which a stretch counts as slow): first as the start of the run says.

    Where nothing is sure so, levels wander by themselves, and a stretch may still lie above them by more than they
    differ among themselves. So half of the run or more is taken for what it does, the rest held against its middle.
    """
    yield healthy, healthy + threshold / 2
    levels = [float(np.median(blocks[a:b])) for a, b in stretches]
    for low, cut in pairwise(sorted(levels)):
        if cut - low >= max(threshold, low - min(levels)):
            rest = np.concatenate([blocks[a:b] for (a, b), level in zip(stretches, levels, strict=True) if level < cut])
            if len(rest) >= len(blocks) / 2:
                yield max(healthy, float(np.median(rest))), cut


def _surety(
    blocks: Floats, stretches: list[tuple[int, int]], shifts: list[Shift], healthy: float, sigma: float, block: int
) -> list[float]:
    """How many sigmas each elevated stretch of blocks lies above the others, by an honest count of blocks.

    What the levels and ramps found leave unexplained is the noise; where it is autocorrelated, as of a level that
    wanders, so many blocks tell as little as n / (1 + 2 sum rho) independent ones.
    """
    rest = blocks - healthy
    outside = np.ones(len(blocks), dtype=bool)
    for (first, end), shift in zip(stretches, shifts, strict=True):
        outside[first:end] = False
        place = np.arange(first, end)
        if shift.kind == DRIFT_SHAPE:
            part = (place - shift.first / block + 0.5) * block * shift.slope
            rest[first:end] = blocks[first:end] - np.log(shift.healthy * (1 + np.maximum(part, 0.0)))
        else:
            rest[first:end] = blocks[first:end] - np.median(blocks[first:end])
    noise = max(MAD_TO_SIGMA * float(np.median(np.abs(rest))), sigma)
    rest = np.clip(rest, -_CLIP * noise, _CLIP * noise)
    inflation = _inflation(rest)
    result = []
    for first, end in stretches:
        rise = float(np.mean(blocks[first:end])) - healthy
        error = noise * np.sqrt(inflation * (1 / (end - first) + 1 / max(int(outside.sum()), _LEAST_BLOCKS)))
        result.append(rise / float(error))
    return result


def _inflation(rest: Floats) -> float:
    """1 + 2 sum of autocorrelations, up to the first that is not positive (Geyer 1992, section 3.3, by single lags)."""
    total, count = float(np.dot(rest, rest)), len(rest)
    inflation = 1.0
    for lag in range(1, count // 3):
        # the bias of an estimate from so few blocks is about -1/count
        rho = float(np.dot(rest[:-lag], rest[lag:])) / max(total, 1e-30) + 1 / count
        if rho <= 0.05:
            break
        inflation += 2 * rho
    return inflation


def _healthy(blocks: Floats, stretches: list[tuple[int, int]], start: int) -> float:
    """The fixed baseline: the level of the run's start or, where that was slow already, of a long faster stretch."""
    begin = float(np.median(blocks[: max(_LEAST_BLOCKS, min(start, len(blocks) // 4))]))
    least = max(_LEAST_BLOCKS, round(_LONG * len(blocks)))
    return min([begin, *(float(np.median(blocks[a:b])) for a, b in stretches if b - a >= least)])


def _block_noise(blocks: Floats) -> float:
    """Sigma of a block's median. Differences of neighbours see no level or slope; their tail guards against bursts."""
    steps = np.diff(blocks)
    steps = np.abs(steps - np.median(steps)) / np.sqrt(2)
    tail = float(np.quantile(steps, 0.9)) / _NINETIETH
    known = max(MAD_TO_SIGMA * float(np.median(steps)), tail, 1e-4)
    return known * float(np.sqrt(1 + _FEW_BLOCKS / len(steps)))


def _split(blocks: Floats, first: int, end: int, sigma: float) -> list[tuple[int, int]]:
    """Stretches [first, end) of one level each."""
    length = end - first
    if length < 2 * _LEAST_BLOCKS:
        return [(first, end)]
    part = blocks[first:end]
    cut = np.arange(_LEAST_BLOCKS, length - _LEAST_BLOCKS + 1)
    sums = np.cumsum(part)
    before, after = sums[cut - 1] / cut, (sums[-1] - sums[cut - 1]) / (length - cut)
    score = np.abs(after - before) / (sigma * np.sqrt(1 / cut + 1 / (length - cut)))
    best = int(np.argmax(score))
    if score[best] < _SPLIT_AT:
        return [(first, end)]
    middle = first + int(cut[best])
    return _split(blocks, first, middle, sigma) + _split(blocks, middle, end, sigma)


def _elevated(
    blocks: Floats, stretches: list[tuple[int, int]], healthy: float, threshold: float, cut: float
) -> list[tuple[int, int]]:
    """Neighbouring stretches at the level `cut` and above, joined: block ranges [first, end)."""
    joined: list[tuple[int, int]] = []
    for first, end in stretches:
        if float(np.median(blocks[first:end])) < cut:
            continue
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return [(a, b) for a, b in joined if float(np.quantile(blocks[a:b], 0.75)) - healthy >= threshold]


def _shape(blocks: Floats, first: int, end: int, healthy: float, block: int, rows: int) -> Shift:
    """Step or ramp, whichever leaves less unexplained over the slow stretch and as much before it; z is not yet known.

    `block` is the steps of a block, `rows` the steps of the run. Ramps are fitted to seconds, not to their logarithms:
    what fills up or leaks adds as much with each step.
    """
    begin = max(0, first - (end - first))
    part, base = np.exp(blocks[begin:end]), float(np.exp(healthy))
    position = np.arange(begin, end)
    level = float(np.exp(np.median(blocks[first:end])))
    as_step = _best_step(part, base)
    onset, slope, as_ramp = _best_ramp(part, position, base)
    last = rows - 1 if end == len(blocks) else end * block - 1
    if end - first >= _LEAST_RAMP_BLOCKS and as_ramp < _RAMP_BETTER * as_step and slope > 0:
        top = base + slope * (end - 0.5 - onset)
        return Shift(DRIFT_SHAPE, onset * block, last, base, top, 0.0, slope / block / base)
    return Shift(LEVEL_SHAPE, first * block, last, base, level, 0.0)


def _best_step(part: Floats, healthy: float) -> float:
    """Absolute error of the best single step up from the healthy level."""
    return min(
        float(np.sum(np.abs(part[:cut] - healthy)) + np.sum(np.abs(part[cut:] - np.median(part[cut:]))))
        for cut in range(len(part))
    )


def _best_ramp(part: Floats, position: Ints, healthy: float) -> tuple[int, float, float]:
    """(onset block, slope a block, absolute error) of the best ramp from the healthy level to the end of the part."""
    best = (int(position[0]), 0.0, float("inf"))
    for onset in position[:-2]:
        run = np.maximum(position - onset, 0)
        rising = run > 0
        slope = float(np.median((part[rising] - healthy) / run[rising]))
        error = float(np.sum(np.abs(part - healthy - slope * run)))
        if error < best[2]:
            best = (int(onset), slope, error)
    return best
