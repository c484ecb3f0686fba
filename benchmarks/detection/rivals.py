"""What scikit-learn's general outlier detectors and a plain z-score make of the same runs.

Each gets a score per step; the score that counts as an alarm is the one with the best F1 on the tuning draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from sklearn.preprocessing import StandardScaler

from benchmarks.detection.scoring import Event, merged
from observability.read.step_table import StepTable

Scorer = Callable[[StepTable], np.ndarray]
QUANTILES: Final = (0.90, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)


def _features(table: StepTable) -> np.ndarray:
    paused = np.zeros(len(table))
    for pause in table.pauses:
        paused[np.searchsorted(table.step, pause.step)] += pause.seconds
    columns = [table.seconds, paused, table.values["row_tokens"], *table.durations.T]
    return StandardScaler().fit_transform(np.stack(columns, axis=1))


def isolation_forest(table: StepTable) -> np.ndarray:
    model = IsolationForest(n_estimators=100, random_state=0).fit(_features(table))
    return -model.score_samples(_features(table))


def local_outlier_factor(table: StepTable) -> np.ndarray:
    return -LocalOutlierFactor(n_neighbors=20).fit(_features(table)).negative_outlier_factor_


def plain_z(table: StepTable) -> np.ndarray:
    waited = table.wall_seconds.copy()
    for pause in table.pauses:
        waited[np.searchsorted(table.step, pause.step)] += pause.seconds
    return (waited - waited.mean()) / waited.std()


RIVALS: Final[dict[str, Scorer]] = {
    "IsolationForest": isolation_forest,
    "LocalOutlierFactor": local_outlier_factor,
    "plain z-score": plain_z,
}


def events_above(scores: np.ndarray, threshold: float) -> list[Event]:
    rows = np.flatnonzero(scores > threshold)
    return merged([(int(row), int(row), "") for row in rows])


def median_shift(table: StepTable, threshold: float = 6.0) -> list[Event]:
    """A plain test of each kind of span, and of the step: is the median of the second half above that of the first?

    The difference over its standard error, for a Gaussian of the same median absolute deviation.
    """
    half = len(table) // 2
    columns = np.column_stack([table.seconds, table.durations])
    first, second = columns[:half], columns[half:]
    was, now = np.median(first, axis=0), np.median(second, axis=0)
    spread = [1.4826 * np.median(np.abs(part - np.median(part, axis=0)), axis=0) for part in (first, second)]
    error = 1.2533 * np.sqrt(spread[0] ** 2 / half + spread[1] ** 2 / (len(table) - half))
    material = now - was >= 0.005 * np.median(table.seconds)
    shifted = np.any(material & (now - was >= threshold * np.maximum(error, 1e-9)))
    return [Event(half, len(table) - 1, {"": len(table) - half})] if shifted else []
