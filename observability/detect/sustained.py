"""Slowdowns that stay: a level that steps up (throttling) or creeps up (drift), seen against the healthy start.

Medians of blocks of steps are split into stretches of one level (binary segmentation), and stretches above the fixed
baseline are joined and told apart by which fits better, a step or a ramp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from observability.detect.baseline import HEALTHY_START, MAD_TO_SIGMA, core_scale
from observability.read import Floats, Ints

_BLOCK: Final = 10  # steps a block; fewer in a short run
_BLOCKS: Final = 40  # in a short run, if it has steps for them
_LEAST_BLOCK: Final = 4
_SPLIT_AT: Final = 5.0  # sigmas of the difference of two means at which a stretch is split
_LEAST_BLOCKS: Final = 3
_LEAST_RISE: Final = 0.03  # a smaller slowdown is not worth a line
_RISE_OF_NOISE: Final = 2.0  # sigmas of the bulk of single steps: a smaller one is within what steps do anyway
_RISE_AT: Final = 4.0  # sigmas of one block's median
_FEW_BLOCKS: Final = 8  # so many more would be needed to know their noise well
_NINETIETH: Final = 1.645  # sigmas of a Gaussian within which nine tenths of it lie
_LONG: Final = 0.2  # of the run: so long a faster stretch is what the run can do
_LEAST_RAMP_BLOCKS: Final = 6  # a shorter ramp cannot be told from a step


@dataclass(frozen=True)
class Shift:
    """Rows `first` to `last` (inclusive) ran at `level` seconds where `healthy` were expected; `kind` names the shape.

    For a drift, `level` is where it ended and `slope` the relative rise a step.
    """

    kind: str  # throttle or drift
    first: int
    last: int
    healthy: float
    level: float
    z: float
    slope: float = 0.0


def find_shifts(times: Floats) -> list[Shift]:
    """Sustained slowdowns in the times of consecutive steps, already corrected for their work. Seconds."""
    block = min(max(len(times) // _BLOCKS, _LEAST_BLOCK), _BLOCK)
    count = len(times) // block
    if count < 3 * _LEAST_BLOCKS:
        return []
    blocks = np.log(np.median(times[: count * block].reshape(count, block), axis=1))
    sigma = _block_noise(blocks)
    stretches = _split(blocks, 0, count, sigma)
    healthy = _healthy(blocks, stretches, HEALTHY_START // block)
    steps = np.diff(np.log(times))
    threshold = max(np.log1p(_LEAST_RISE), _RISE_AT * sigma, _RISE_OF_NOISE * core_scale(steps) / np.sqrt(2))
    shifts = []
    for first, last in _elevated(blocks, stretches, healthy, threshold):
        shifts.append(_shape(blocks, first, last, healthy, sigma, block, len(times)))
    return shifts


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
    blocks: Floats, stretches: list[tuple[int, int]], healthy: float, threshold: float
) -> list[tuple[int, int]]:
    """Neighbouring stretches above the healthy level, joined: block ranges [first, end)."""
    joined: list[tuple[int, int]] = []
    for first, end in stretches:
        if float(np.median(blocks[first:end])) - healthy < threshold / 2:
            continue
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return [(a, b) for a, b in joined if float(np.quantile(blocks[a:b], 0.75)) - healthy >= threshold]


def _shape(blocks: Floats, first: int, end: int, healthy: float, sigma: float, block: int, rows: int) -> Shift:
    """Step or ramp, whichever leaves less unexplained over the slow stretch and as much before it.

    `block` is the steps of a block, `rows` the steps of the run.
    """
    begin = max(0, first - (end - first))
    part = blocks[begin:end]
    position = np.arange(begin, end)
    level = float(np.median(blocks[first:end]))
    as_step = _best_step(part, healthy)
    onset, slope, as_ramp = _best_ramp(part, position, healthy)
    last = rows - 1 if end == len(blocks) else end * block - 1
    rise = np.sqrt(end - first) * (level - healthy) / sigma
    if end - first >= _LEAST_RAMP_BLOCKS and as_ramp < as_step and slope > 0:
        top = healthy + slope * (end - onset)
        return Shift(
            "drift", onset * block, last, float(np.exp(healthy)), float(np.exp(top)), float(rise), slope / block
        )
    return Shift("throttle", first * block, last, float(np.exp(healthy)), float(np.exp(level)), float(rise))


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
