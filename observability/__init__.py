"""Watching a training run: OpenTelemetry spans and metrics out, anomalies and reports from them.

This package imports nothing of the trainer: it takes the trainer's records by their attributes, and reads traces from
files or Jaeger. Importing it is cheap; OpenTelemetry is imported by `observe` and `AnomalyProcessor`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from observability.detect.live import LiveDetector
    from observability.detect.live_spans import AnomalyProcessor
    from observability.write import TraceObserver
    from observability.write.requests import RequestTracer

__all__ = ["AnomalyProcessor", "LiveDetector", "observe", "trace_requests"]


def observe(output_dir: str | Path, **options: Any) -> TraceObserver:
    """Make the observer that traces a run into `output_dir`; see `write.observer.observe` for the options."""
    from observability.write.observer import observe as make

    return make(output_dir, **options)


def trace_requests(output_dir: str | None, **options: Any) -> RequestTracer | None:
    """Make what traces the requests of a server; see `write.requests.trace_requests` for the options."""
    from observability.write.requests import trace_requests as make

    return make(output_dir, **options)


def __getattr__(name: str) -> Any:
    """The detector for live runs, when it is asked for."""
    if name in ("AnomalyProcessor", "LiveDetector"):
        from observability import detect

        return getattr(detect, name)
    raise AttributeError(name)
