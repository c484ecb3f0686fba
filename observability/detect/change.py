"""One change of level for good, where steps scatter by as much as it: on a machine that other programs share.

Blocks of steps (sustained.py) need noise that they average out, and many of them to know it. Here every step is a vote,
cut off so that none counts for more than a little, and the place that parts them best is held against their scatter and
autocorrelation. Where it is known by how much each step scatters, its vote counts by that.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from observability.detect.baseline import core_scale
from observability.detect.findings import ALARM_AT
from observability.detect.sustained import LEVEL_SHAPE, LOW, Shift, find_shifts, with_floor
from observability.read import Floats

LEAST_STEPS: Final = 24  # on each side of a change
ENOUGH_STEPS: Final = 3 * LEAST_STEPS  # of a run; fewer cannot tell a change from what comes and goes
_BEGIN: Final = 8  # steps: a stretch that begins earlier began with the run
_MOST: Final = 1.0  # sigmas of a step, beyond which it counts no more
_MOST_ALIKE: Final = 0.98
_CORRELATED: Final = 0.1  # autocorrelation; less is what estimates from a hundred steps scatter by


def lasting_shifts(times: Floats, least: float, quantile: float = LOW, scatter: Floats | None = None) -> list[Shift]:
    """Slowdowns by at least `least` that stay, of steps whose level others make come and go.

    What the run began with is no change there, and a short stretch is one of many. `scatter` as for `find_change`,
    which is surer with it than blocks of steps are.
    """
    if len(times) < ENOUGH_STEPS:
        return []
    change = None if scatter is None else find_change(times, least, scatter)
    if change is not None:
        return [change]
    found = find_shifts(times, least, quantile)
    found = [shift for shift in found if shift.first >= _BEGIN and shift.last - shift.first >= LEAST_STEPS]
    change = find_change(times, least) if scatter is None and not found else None
    return found if change is None else [change]


def find_change(times: Floats, least: float, scatter: Floats | None = None) -> Shift | None:
    """The rise by at least `least` from which on `times` stay high, None where there is none beyond doubt. Seconds.

    `scatter` [steps] is by how much each step may lie off, in logarithms and relative to the others, so that a step in
    which everything scatters has a small vote; all have the same where it is None.
    """
    count = len(times)
    if count < ENOUGH_STEPS:
        return None
    logs = np.log(times)
    unit = np.ones(count) if scatter is None else scatter
    off = (logs - np.median(logs)) / unit
    most = _MOST * max(core_scale(off), 1e-6)
    votes, weight = np.clip(off, -most, most) * unit, unit**-2
    cuts = np.arange(LEAST_STEPS, count - LEAST_STEPS + 1)
    sums, weights = np.cumsum(votes * weight), np.cumsum(weight)
    was, now = weights[cuts - 1], weights[-1] - weights[cuts - 1]
    before, after = sums[cuts - 1] / was, (sums[-1] - sums[cuts - 1]) / now
    apart = (after - before) / np.sqrt(1 / was + 1 / now)
    best = int(np.argmax(apart))
    first = int(cuts[best])
    rest = (votes - np.where(np.arange(count) < first, before[best], after[best])) / unit
    z = float(apart[best] / np.sqrt(max(float(np.mean(rest**2)), 1e-12) * _inflation(rest)))
    healthy, level = (float(np.exp(np.median(part))) for part in (logs[:first], logs[first:]))
    if z < ALARM_AT or level < (1 + least) * healthy:
        return None
    return Shift(LEVEL_SHAPE, first, count - 1, healthy, level, with_floor(z, healthy, level))


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
