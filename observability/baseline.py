"""What a step should have taken, and how far off "far" is: robust centre and scale of times that are never Gaussian.

Times on a shared machine have heavy tails and come in bursts, so a scale from the median absolute deviation alone
would call every tenth step an anomaly. `noise_scale` therefore also looks at how the upper tail of the run itself falls
off and never lets four of its units be rarer than the run's own tail says (peaks over threshold; Siffer et al.,
"Anomaly detection in streams with extreme value theory", KDD 2017, with an exponential tail fitted to two quantiles,
because quantiles stay put when a few steps of the tail are faults).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.ndimage import median_filter

from observability.spans import Floats
from observability.steps import StepTable

WINDOW: Final = 101  # steps of the moving baseline
HEALTHY_START: Final = 100  # steps after the warm-up that give the fixed baseline
MAD_TO_SIGMA: Final = 1.4826  # of a Gaussian
_FLOOR: Final = 0.005  # of the centre: below half a percent a difference matters to nobody
_TAIL: Final = (0.90, 0.95)  # quantiles that the tail's slope is taken from
_RARE: Final = 5e-4  # how often a clean step may pass _RARE_AT units of scale
_RARE_AT: Final = 4.0
_LONG_BATCH: Final = 1.02  # so much more work than usual is "a longer batch"
_SUPERLINEAR: Final = 1.35  # attention makes time grow faster than tokens: time <= work^1.35


@dataclass(frozen=True)
class Scores:
    """Times of steps (rows), in one or many kinds of span (columns), against their moving baseline; seconds."""

    expected: Floats
    excess: Floats
    scale: Floats

    @property
    def z(self) -> Floats:
        result: Floats = self.excess / self.scale
        return result


def relative_work(table: StepTable) -> Floats:
    """Positions computed by each step over the run's median; ones where the trace does not tell."""
    for key in ("row_tokens", "tokens"):
        work = table.values.get(key)
        if work is not None and np.all(np.isfinite(work)) and np.all(work > 0):
            result: Floats = work / np.median(work)
            return result
    return np.ones(len(table))


def score(times: Floats, work: Floats, exclude: Floats | None = None) -> Scores:
    """`times` [steps] or [steps, kinds] against a moving median, given the relative work [steps] of each step.

    Where work varies from step to step the dependence on it is learned; where it only jumps now and then, any time
    between "no dependence" and "somewhat more than proportional" is taken as explained. Steps in the mask `exclude`
    do not shape the noise scale.
    """
    columns = times.reshape(len(times), -1)
    expected, excess, scale = (np.empty_like(columns) for _ in range(3))
    for k in range(columns.shape[1]):
        expected[:, k], excess[:, k] = _against_median(columns[:, k], work)
        scale[:, k] = local_scale(excess[:, k], columns[:, k], exclude)
    return Scores(*(part.reshape(times.shape) for part in (expected, excess, scale)))


def moving_median(values: Floats, window: int = WINDOW) -> Floats:
    """Centred moving median; at the ends the series is reflected."""
    result: Floats = median_filter(values, size=min(window, 2 * len(values) - 1), mode="mirror")
    return result


def noise_scale(excess: Floats, centre: float) -> float:
    """One sigma of `excess`: the robust core, or the tail where that is heavier; never below the floor."""
    core = MAD_TO_SIGMA * float(np.median(np.abs(excess - np.median(excess))))
    return max(core, tail_scale(excess), _FLOOR * centre, 1e-9)


def tail_scale(excess: Floats) -> float:
    """The scale at which only `_RARE` of the steps pass `_RARE_AT` units, by an exponential upper tail."""
    if len(excess) < 40:
        return 0.0
    low, high = (float(q) for q in np.quantile(excess, _TAIL))
    decay = (high - low) / np.log((1 - _TAIL[0]) / (1 - _TAIL[1]))
    return float(low + decay * np.log((1 - _TAIL[0]) / _RARE)) / _RARE_AT


def local_scale(excess: Floats, times: Floats, exclude: Floats | None = None) -> Floats:
    """Noise of the whole run, raised where the surroundings of a step are noisier than the run."""
    kept = excess if exclude is None or np.all(exclude) else excess[~exclude.astype(bool)]
    whole = noise_scale(kept, float(np.median(times)))
    around = MAD_TO_SIGMA * moving_median(np.abs(excess))
    result: Floats = np.maximum(whole, around)
    return result


def _against_median(times: Floats, work: Floats) -> tuple[Floats, Floats]:
    """(expected, excess) of one column."""
    low, high = _explained_by_work(times, work)
    middle = np.sqrt(low * high)
    centre = moving_median(times / middle)
    bounded = np.clip(times, centre * low, centre * high)
    # What is expected of a step is the time within the explained range that is nearest to what it took.
    return bounded, times - bounded


def _explained_by_work(times: Floats, work: Floats) -> tuple[Floats, Floats]:
    """Factors on the baseline that each step's work explains: the least and the most."""
    exponent = work_exponent(times, work)
    if exponent is not None:
        factor = work**exponent
        return factor, factor
    longer = work > _LONG_BATCH
    return np.ones_like(work), np.where(longer, work**_SUPERLINEAR, 1.0)


def work_exponent(times: Floats, work: Floats) -> float | None:
    """How time grows with work (time ~ work^exponent, 0 to 2); None where work varies too little to tell."""
    x = np.log(work)
    if np.subtract(*np.quantile(x, [0.75, 0.25])) < 0.02:
        return None
    usable = times > 0
    y = np.log(np.where(usable, times, 1.0)) - moving_median(np.log(np.where(usable, times, 1.0)))
    # Theil-Sen over pairs that lie far apart in work: robust against a third of the steps being odd.
    order = np.argsort(x[usable], kind="stable")
    half = len(order) // 2
    first, second = order[:half], order[-half:]
    dx, dy = x[usable][second] - x[usable][first], y[usable][second] - y[usable][first]
    apart = dx > 0.01
    return float(np.clip(np.median(dy[apart] / dx[apart]), 0.0, 2.0)) if apart.any() else None
