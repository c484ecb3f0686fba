"""From a table of steps to findings, each with its cause and the evidence for it: afterwards, and live."""

from __future__ import annotations

from typing import Any

from observability.detect.analysis import Analysis, analyse, by_cause, lost_in, time_lost, verdict
from observability.detect.baseline import MAD_TO_SIGMA, moving_median
from observability.detect.clusters import step_features
from observability.detect.findings import (
    CAUSES,
    HIGH,
    LOSS_SPIKE,
    LOW,
    MEDIUM,
    PERIODIC,
    SKIPPED_STEP,
    Finding,
    duration,
    in_a_row,
    number_of_steps,
    size,
)
from observability.detect.live import LiveDetector
from observability.detect.told import CONFIRMED, Judged

__all__ = [
    "CAUSES",
    "CONFIRMED",
    "HIGH",
    "LOSS_SPIKE",
    "LOW",
    "MAD_TO_SIGMA",
    "MEDIUM",
    "PERIODIC",
    "SKIPPED_STEP",
    "Analysis",
    "AnomalyProcessor",
    "Finding",
    "Judged",
    "LiveDetector",
    "analyse",
    "by_cause",
    "duration",
    "in_a_row",
    "lost_in",
    "moving_median",
    "number_of_steps",
    "size",
    "step_features",
    "time_lost",
    "verdict",
]


def __getattr__(name: str) -> Any:
    """`AnomalyProcessor` when it is asked for: it alone needs OpenTelemetry, which takes its time to import."""
    if name == "AnomalyProcessor":
        from observability.detect.live_spans import AnomalyProcessor

        return AnomalyProcessor
    raise AttributeError(name)
