"""A pause that comes every N steps, found by folding the run at every period."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from observability.read import Floats, Ints

# A "slow" step is one above this quantile; which one suits is not known. The first is for every third step.
_LEVELS: Final = (0.60, 0.80, 0.90, 0.95, 0.98, 0.99, 0.995)
_LEAST_REPEATS: Final = 4
_LONGEST: Final = 1000  # steps
_HIT_RATE: Final = 0.7
_CHANCE: Final = 1e-4  # accepted probability that chance alone lines the slow steps up, over all periods tried


@dataclass(frozen=True)
class Period:
    """Every `period` steps from row `first` on, up to row `last`; `rows` are the rows concerned."""

    period: int
    rows: Ints


def find_period(z: Floats) -> Period | None:
    """The clearest period in the scores `z` of consecutive steps, or None when chance explains them all."""
    count = len(z)
    longest = min(count // _LEAST_REPEATS, _LONGEST)
    best_chance, best = np.log(_CHANCE), None
    for level in _LEVELS:
        slow = z > max(float(np.quantile(z, level)), 1.0)
        before = np.concatenate([[0], np.cumsum(slow)])
        rows = np.flatnonzero(slow)
        for period in range(2, longest + 1):
            for offset in _promising(rows, period):
                found = _stretch(slow, before, period, int(offset))
                if found is None:
                    continue
                chance, own = found
                # Every level, period, offset, beginning and end that was open to choice counts.
                chance += np.log(len(_LEVELS) * longest**2 / 2 * (count / period) ** 2 / 2)
                if chance < best_chance:
                    best_chance, best = chance, Period(period, own)
    return best


def _promising(rows: Ints, period: int) -> Ints:
    """Offsets whose slow steps, of those in `rows`, are enough of the steps from their first to their last."""
    offsets = rows % period
    hits = np.bincount(offsets, minlength=period)
    first, last = np.zeros(period, dtype=np.int64), np.zeros(period, dtype=np.int64)
    last[offsets] = rows  # of equal places the last value stays
    first[offsets[::-1]] = rows[::-1]
    return np.flatnonzero((hits >= _LEAST_REPEATS) & (hits >= _HIT_RATE * ((last - first) // period + 1)))


def _stretch(slow: npt.NDArray[np.bool_], before: Ints, period: int, offset: int) -> tuple[float, Ints] | None:
    """(log of the chance, rows) between the first and the last slow step of this period and offset.

    The chance is taken from how often the steps in between are slow: in a burst they all are, and nothing follows.
    """
    hit = np.flatnonzero(slow[offset::period])
    rows = offset + period * np.arange(hit[0], hit[-1] + 1)
    if len(hit) < _HIT_RATE * len(rows):
        return None
    others = before[rows[-1]] - before[rows[0]] - len(hit) + 1
    rate = (others + 1) / (rows[-1] - rows[0] - len(rows) + 3)
    return float(binom.logsf(len(hit) - 1, len(rows), min(rate, 1.0))), rows
