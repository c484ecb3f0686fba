"""Kinds of steps: KMeans over standardised features, and what sets the slowest kind apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from observability.detect.baseline import Mask
from observability.detect.findings import duration, size
from observability.read import Floats, Ints, StepTable

MOST_CLUSTERS: Final = 5
_LEAST_STEPS: Final = 10
_SAMPLE: Final = 2000  # steps that the silhouette is computed on: it takes time with their square
_FITTED: Final = 5000  # steps, evenly spaced, that clusters of a longer run are found from
_WINSORISED: Final = (0.005, 0.995)  # features are cut off at these quantiles
_NAMED: Final = 4  # features at most
_DISTINCT: Final = 1.0  # sigmas between cluster and rest from which a feature is worth naming
_SEPARATE: Final = 0.25  # silhouette from which the kinds are kinds at all
# Bands of Kaufman and Rousseeuw, "Finding Groups in Data" (1990), chapter 2.
_MEANING: Final = (
    (0.7, "the kinds of steps are clearly apart"),
    (0.5, "the kinds of steps are reasonably apart"),
    (_SEPARATE, "the kinds of steps overlap; the split may be artificial"),
    (-1.0, "there are no distinct kinds of steps: all are much alike"),
)


@dataclass(frozen=True)
class Feature:
    """One column of features; `values` in their own unit."""

    name: str
    unit: str  # s, share, B, tokens
    group: str  # features of a group together weigh as much as one
    values: Floats


@dataclass(frozen=True)
class HighLatency:
    """The slowest cluster: which steps, how slow, and the features that differ most, in words."""

    cluster: int
    steps: list[int]
    mean_seconds: float
    others_mean_seconds: float
    distinguished_by: list[str]
    feature: str


@dataclass(frozen=True)
class Clusters:
    """`labels` gives each step's cluster; `k` is 1 (and `silhouette` None) for runs too short or uniform to split."""

    k: int
    silhouette: float | None
    labels: Ints
    high_latency: HighLatency | None

    @property
    def separate(self) -> bool:
        """Whether there are distinct kinds of steps to speak of."""
        return self.silhouette is not None and self.silhouette >= _SEPARATE

    @property
    def meaning(self) -> str:
        if self.silhouette is None:
            return "too few different steps to sort into kinds"
        return next(text for least, text in _MEANING if self.silhouette >= least)

    def to_json(self) -> dict[str, Any]:
        high = self.high_latency
        return {
            "k": self.k,
            "silhouette": self.silhouette,
            "meaning": self.meaning,
            "high_latency": None
            if high is None
            else {
                "steps": high.steps,
                "mean_seconds": high.mean_seconds,
                "others_mean_seconds": high.others_mean_seconds,
                "distinguished_by": high.distinguished_by,
            },
        }


def step_features(table: StepTable) -> list[Feature]:
    """Total time, phase shares, time by layer, memory and tokens; columns that never change are left out."""
    features = [Feature("step time", "s", "total", table.wall_seconds)]
    for index, kind in enumerate(table.kinds):
        column = table.durations[:, index]
        if kind.level == "phase":
            features.append(Feature(f"share of {kind.name}", "share", "phases", column / table.wall_seconds))
        elif kind.level == "layer":
            features.append(Feature(f"time in {kind.label}", "s", "layers", column))
    paused = table.wall_seconds - table.seconds
    features.append(Feature("share of checkpoints", "share", "phases", paused / table.wall_seconds))
    for key, name, unit in (("allocated_bytes", "memory", "B"), ("tokens", "tokens", "tokens")):
        values = table.values[key]
        if np.all(np.isfinite(values)):
            features.append(Feature(name, unit, key, values))
    return [feature for feature in features if np.ptp(feature.values) > 1e-9 * np.max(np.abs(feature.values))]


def cluster_steps(table: StepTable, cold: Mask, k: int | None = None) -> Clusters:
    """Clusters of a run's steps; `k` overrides the number that the silhouette would choose.

    Those in the mask `cold` are labelled -1: a step that compiles is so far from all others that it would be a cluster.
    """
    # scikit-learn takes over a second to import: live detection must not pay for it.
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    features = step_features(table)
    body = ~cold
    labels = np.where(body, 0, -1)
    whole = Clusters(1, None, labels, None)
    if body.sum() < _LEAST_STEPS or not features:
        return whole
    matrix = _standardised(features, body)
    distinct = len(np.unique(matrix[:_FITTED], axis=0))
    if distinct < 3:
        return whole
    choices = [min(k, distinct - 1)] if k else range(2, min(MOST_CLUSTERS, distinct - 1) + 1)
    best: tuple[float, int, Ints] | None = None
    for count in choices:
        means = KMeans(n_clusters=count, n_init=4, random_state=0).fit(matrix[:: max(len(matrix) // _FITTED, 1)])
        found = means.predict(matrix).astype(np.int64)
        if len(np.unique(found)) < 2:
            continue
        value = float(silhouette_score(matrix, found, sample_size=min(_SAMPLE, len(found)), random_state=0))
        if best is None or value > best[0]:
            best = (value, count, found)
    if best is None:
        return whole
    value, count, labels[body] = best
    return Clusters(count, value, labels, _slowest(table, features, labels))


def _standardised(features: list[Feature], rows: Mask) -> Floats:
    from sklearn.preprocessing import StandardScaler

    columns = np.stack([feature.values[rows] for feature in features], axis=1)
    # Without this a single odd step would be a cluster of its own.
    columns = np.clip(columns, *np.quantile(columns, _WINSORISED, axis=0))
    matrix: Floats = StandardScaler().fit_transform(columns)
    groups = [feature.group for feature in features]
    return matrix / np.sqrt([groups.count(group) for group in groups])


def _slowest(table: StepTable, features: list[Feature], labels: Ints) -> HighLatency:
    means = [float(np.mean(table.wall_seconds[labels == c])) for c in range(int(labels.max()) + 1)]
    slowest = int(np.argmax(means))
    members, rest = labels == slowest, (labels != slowest) & (labels >= 0)
    distances = []
    for feature in features:
        inside, outside = feature.values[members], feature.values[rest]
        apart = float(np.mean(inside) - np.mean(outside)) / max(float(np.std(feature.values)), 1e-30)
        distances.append((abs(apart), feature, float(np.mean(inside)), float(np.mean(outside))))
    distances.sort(key=lambda item: -item[0])
    named = []
    for apart, feature, *values in distances:
        inside, outside = (_shown(value, feature.unit) for value in values)
        if apart >= _DISTINCT and inside != outside:  # a difference that nobody can see is no reason
            named.append(f"{feature.name} {inside} against {outside}")
    telling = next((f.name for _, f, _, _ in distances if f.group in ("phases", "layers")), "")
    others = float(np.mean(table.wall_seconds[rest]))
    return HighLatency(slowest, table.step[members].tolist(), means[slowest], others, named[:_NAMED], telling)


def _shown(value: float, unit: str) -> str:
    return {"s": duration(value), "share": f"{value:.1%}", "B": size(value)}.get(unit, f"{value:.0f}")
