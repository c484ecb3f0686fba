"""What a step should have taken, and how far off "far" is: robust centre and scale of times that are never Gaussian.

Times on a shared machine have heavy tails and come in bursts, so a scale from the median absolute deviation alone
would call every tenth step an anomaly. `noise_scale` is therefore also no smaller than the run's own upper tail says,
read off at one quantile. Extreme-value fits (peaks over threshold) were tried on recorded runs: their extrapolation
varied by a factor of two from run to run, the quantile by a quarter.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.ndimage import median_filter

from observability.read import Floats, StepTable

Mask = npt.NDArray[np.bool_]

WINDOW: Final = 101  # steps of the moving baseline
HEALTHY_START: Final = 100  # steps after the warm-up that give the fixed baseline
MAD_TO_SIGMA: Final = 1.4826  # of a Gaussian
FLOOR: Final = 0.005  # of the centre: below half a percent a difference matters to nobody
# (quantile, how many sigmas it lies at): sigma by the tail is the excess at that quantile over that many. The further
# out, the nearer to the alarms, and the fewer faulty steps it takes to spoil it. A kind of span on its own bears 3%
# faulty steps; steps, whose faults the kinds of span show first, and alike kinds pooled bear 1.5%. A Gaussian has 1.88
# and 2.17 sigmas there; the smaller numbers are for tails that fall off more slowly further out.
NEAR_TAIL: Final = (0.97, 1.6)
FAR_TAIL: Final = (0.985, 1.85)
_FEW: Final = 30  # steps: so many more would be needed to know the scale well; see `uncertainty`
_SHORT_TAIL: Final = (0.90, 1.1)
_SURE_TAIL: Final = 40  # times below which only the short tail means anything
_EVENT: Final = 0.5  # of the centre
_FEW_EVENTS: Final = 0.1  # of the steps
_LONG_BATCH: Final = 1.02  # so much more work than usual is "a longer batch"
_FAR_LONGER: Final = 1.1  # batches so much longer, if they are few, vary in the time they take for their tokens
_FEW_LONGER: Final = 0.2
_SUPERLINEAR: Final = 1.35  # attention makes time grow faster than tokens: time <= work^1.35


@dataclass(frozen=True)
class Scores:
    """Times of steps (rows), in one or many kinds of span (columns), against their moving baseline; seconds.

    `factor` is what a step's work made of the baseline: `expected` over the moving median.
    """

    expected: Floats
    excess: Floats
    scale: Floats
    factor: Floats

    @property
    def z(self) -> Floats:
        result: Floats = self.excess / self.scale
        return result


def relative_work(table: StepTable) -> Floats:
    """Positions computed by each step over the run's median, or trained tokens where positions never change.

    Ones where the trace tells neither.
    """
    known = (table.values[key] for key in ("row_tokens", "tokens") if key in table.values)
    for work in known:
        if np.all(np.isfinite(work)) and np.all(work > 0) and np.ptp(work) > 0:
            result: Floats = work / np.median(work)
            return result
    return np.ones(len(table))


def pools_of(table: StepTable) -> list[Hashable]:
    """For `score`: which kinds of span are alike, layers and kernels of one pass or phases."""
    return [(kind.level, kind.phase) for kind in table.kinds]


def score(times: Floats, work: Floats, exclude: Mask | None = None, pools: Sequence[Hashable] = ()) -> Scores:
    """`times` [steps] or [steps, kinds] against a moving median, given the relative work [steps] of each step.

    Where work varies from step to step the dependence on it is learned; where it only jumps now and then, any time
    between "no dependence" and "somewhat more than proportional" is taken as explained. Steps in the mask `exclude`
    do not shape the noise scale. Columns with the same entry in `pools` are alike (layers of one pass) and share the
    tail of their noise, so that a fault in one of them does not pass for its noise.
    """
    columns = times.reshape(len(times), -1)
    parts = tuple(np.empty_like(columns) for _ in range(4))
    expected, excess, scale, factor = parts
    for k in range(columns.shape[1]):
        expected[:, k], factor[:, k] = _expected(columns[:, k], work)
        excess[:, k] = columns[:, k] - expected[:, k]
    kept = np.ones(len(columns), dtype=bool) if exclude is None or np.all(exclude) else ~exclude
    for k, tail in enumerate(_tails(columns[kept], excess[kept], factor[kept], pools)):
        per_work = excess[:, k] / factor[:, k]
        around = MAD_TO_SIGMA * moving_median(np.abs(per_work))
        whole = max(core_scale(per_work[kept]), tail) * uncertainty(int(kept.sum()))
        scale[:, k] = np.maximum(whole, around) * factor[:, k]
    return Scores(*(part.reshape(times.shape) for part in parts))


def moving_median(values: Floats, window: int = WINDOW) -> Floats:
    """Centred moving median; at the ends the series is reflected."""
    result: Floats = median_filter(values, size=min(window, 2 * len(values) - 1), mode="mirror")
    return result


def core_scale(excess: Floats) -> float:
    """One sigma of the bulk of `excess`, whatever its tails."""
    return MAD_TO_SIGMA * float(np.median(np.abs(excess - np.median(excess))))


def noise_scale(excess: Floats, centre: float, tail: tuple[float, float] = FAR_TAIL) -> float:
    """One sigma of `excess`: the robust core, or the tail where that is heavier; never below the floor."""
    known = max(core_scale(excess), tail_scale(excess, centre, tail)) * uncertainty(len(excess))
    return max(known, FLOOR * centre, 1e-9)


def uncertainty(count: int) -> float:
    """By how much a scale estimated from so few steps may be too small: 1.6 for twenty, 1.02 for a thousand."""
    return float(np.sqrt(1 + _FEW / max(count, 1)))


def tail_scale(excess: Floats, centre: float, tail: tuple[float, float]) -> float:
    """One sigma of the upper tail of `excess`."""
    quantile, sigmas = tail if len(excess) >= _SURE_TAIL else _SHORT_TAIL
    return float(np.quantile(_without_events(excess, centre), quantile)) / sigmas


def _without_events(excess: Floats, centre: float) -> Floats:
    """`excess` without events too large and too far from the rest to be the tail of anything.

    That is values of at least `_EVENT` of the centre, twice the greatest of the rest, few of all.
    """
    most = int(_FEW_EVENTS * len(excess))
    top = np.sort(np.partition(excess, len(excess) - most - 1)[-most - 1 :])[::-1]
    far = np.flatnonzero(top[:-1] >= np.maximum(_EVENT * centre, 2 * top[1:]))
    return excess[excess <= top[far[-1] + 1]] if len(far) else excess


def _tails(columns: Floats, excess: Floats, factor: Floats, pools: Sequence[Hashable]) -> list[float]:
    """Sigma by the tail of each column, or of all columns of its pool relative to their medians; with the floor."""
    centres = np.maximum(np.median(columns / factor, axis=0), 1e-12)
    relative = excess / factor / centres
    members: dict[Hashable, list[int]] = {}
    for k in range(columns.shape[1]):
        members.setdefault(pools[k] if pools else k, []).append(k)
    result = np.zeros(columns.shape[1])
    for alike in members.values():
        # steps have no pool; a kind of span on its own has one of its own
        tail = FAR_TAIL if not pools or len(alike) > 2 else NEAR_TAIL
        result[alike] = centres[alike] * max(tail_scale(relative[:, alike].reshape(-1), 1.0, tail), FLOOR, 1e-9)
    return [float(tail) for tail in result]


def _expected(times: Floats, work: Floats) -> tuple[Floats, Floats]:
    """(expected, factor) of one column."""
    exponent = work_exponent(times, work)
    if exponent is not None:
        least = work**exponent
        centre = moving_median(times / least)
        long = work > _FAR_LONGER
        most = np.where(long & (np.mean(long) <= _FEW_LONGER), work ** max(exponent, _SUPERLINEAR), least)
    else:
        long = work > _LONG_BATCH  # few, or the exponent were known
        centre = np.interp(np.arange(len(times)), np.flatnonzero(~long), moving_median(times[~long]))
        least, most = np.ones_like(work), np.where(long, work**_SUPERLINEAR, 1.0)
    # What is expected of a step is the time that is nearest to what it took, of those that its work explains.
    expected = np.clip(times, centre * least, centre * most)
    return expected, np.where(centre > 0, expected / np.where(centre > 0, centre, 1.0), 1.0)


def work_exponent(times: Floats, work: Floats) -> float | None:
    """How time grows with work (time ~ work^exponent, 0 to 2); None where too few steps differ in it to tell."""
    if np.all(work == work[:1]):
        return None
    usable = times > 0
    x, y = np.log(work[usable]), np.log(times[usable])
    near = x - moving_median(x) if len(x) else x
    if _varies(near):
        x, y = near, y - moving_median(y)  # from step to step: what else changes over the run must not matter
    elif not _varies(x):
        return None
    # Theil-Sen over pairs that lie far apart in work: robust against a third of the steps being odd.
    order = np.argsort(x, kind="stable")
    half = len(order) // 2
    first, second = order[:half], order[-half:]
    dx, dy = x[second] - x[first], y[second] - y[first]
    apart = dx > 0.01
    return float(np.clip(np.median(dy[apart] / dx[apart]), 0.0, 2.0)) if apart.any() else None


def _varies(logs: Floats) -> bool:
    """Whether more than a twentieth of the steps differ from the others by 2% and more."""
    return len(logs) > 0 and float(np.subtract(*np.quantile(logs, [0.95, 0.05]))) >= 0.02
