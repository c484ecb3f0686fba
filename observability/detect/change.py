"""One change of level for good, where steps scatter by as much as it: on a machine that other programs share.

Blocks of steps (sustained.py) need noise that they average out, and many of them to know it. Here every step is a vote,
cut off so that none counts for more than a little, and the place that parts them best is held against their scatter and
autocorrelation.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from observability.detect.baseline import core_scale
from observability.detect.findings import ALARM_AT
from observability.detect.sustained import LEVEL_SHAPE, LOW, Shift, find_shifts
from observability.read import Floats

LEAST_STEPS: Final = 24  # on each side of a change
_BEGIN: Final = 8  # steps: a stretch that begins earlier began with the run
_MOST: Final = 1.0  # sigmas of a step, beyond which it counts no more
_MOST_ALIKE: Final = 0.98
_CORRELATED: Final = 0.1  # autocorrelation; less is what estimates from a hundred steps scatter by


def lasting_shifts(times: Floats, least: float, quantile: float = LOW) -> list[Shift]:
    """Slowdowns by at least `least` that stay, of steps whose level others make come and go.

    What the run began with is no change there, and a short stretch is one of many.
    """
    found = find_shifts(times, least, quantile)
    found = [shift for shift in found if shift.first >= _BEGIN and shift.last - shift.first >= LEAST_STEPS]
    change = None if found else find_change(times, least)
    return found if change is None else [change]


def find_change(times: Floats, least: float) -> Shift | None:
    """The rise by at least `least` from which on `times` stay high, None where there is none beyond doubt. Seconds."""
    count = len(times)
    if count < 3 * LEAST_STEPS:
        return None
    logs = np.log(times)
    votes = (logs - np.median(logs)) / max(core_scale(logs), 1e-6)
    votes = np.clip(votes, -_MOST, _MOST)
    cuts = np.arange(LEAST_STEPS, count - LEAST_STEPS + 1)
    sums = np.cumsum(votes)
    before, after = sums[cuts - 1] / cuts, (sums[-1] - sums[cuts - 1]) / (count - cuts)
    apart = (after - before) / np.sqrt(1 / cuts + 1 / (count - cuts))
    best = int(np.argmax(apart))
    first = int(cuts[best])
    rest = np.where(np.arange(count) < first, votes - before[best], votes - after[best])
    z = float(apart[best] / np.sqrt(max(float(np.mean(rest**2)), 1e-12) * _inflation(rest)))
    healthy, level = (float(np.exp(np.median(part))) for part in (logs[:first], logs[first:]))
    if z < ALARM_AT or level < (1 + least) * healthy:
        return None
    return Shift(LEVEL_SHAPE, first, count - 1, healthy, level, z)


def _inflation(rest: Floats) -> float:
    """By how much the variance of a mean grows as neighbours are alike: 1 + 2 sum of autocorrelations.

    Up to the first that estimates cannot tell from none (Geyer 1992, section 3.3, by single lags); no less than the
    first says of a process of first order, whose estimate a change taken out makes too small (Kendall 1954).
    """
    total, count = max(float(np.dot(rest, rest)), 1e-30), len(rest)

    def alike(lag: int) -> float:
        return float(np.dot(rest[:-lag], rest[lag:])) / total

    inflation = 1.0
    for lag in range(1, count // 3):
        if alike(lag) + 1 / count <= _CORRELATED:
            break
        inflation += 2 * (alike(lag) + 1 / count)
    first = min(alike(1) + (1 + 4 * alike(1)) / count, _MOST_ALIKE)
    return max(inflation, (1 + first) / (1 - first))
