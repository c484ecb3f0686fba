"""The run's metrics, declared once and recorded from the trainer's records.

They go through the caller's meter provider where one is set, else over OTLP to the collector that the spans go to
(Prometheus takes them from there); with neither, nothing is recorded. Prometheus spells the names its own way, such as
`entrenar_step_duration_seconds`; the dashboard in deploy/ uses those.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any, Final, Literal

from opentelemetry import metrics
from opentelemetry.metrics import Counter, Histogram, Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from observability import schema
from observability.write.otlp_settings import environ_int

_EXPORT_MILLIS = 5_000  # the SDK's default of a minute would show nothing of a short run


@dataclass(frozen=True)
class Metric:
    """One row of the table. Units are UCUM's; a unit in braces is an annotation, which Prometheus leaves out."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    meaning: str


STEP_DURATION: Final = Metric("entrenar.step.duration", "histogram", "s", "wall time of an optimizer step")
LOSS: Final = Metric("entrenar.step.loss", "gauge", "{nat}", "mean loss over the step's trained tokens")
THROUGHPUT: Final = Metric("entrenar.step.throughput", "gauge", "{token}/s", "positions, less padding, per second")
LEARNING_RATE: Final = Metric("entrenar.step.learning_rate", "gauge", "{ratio}", "learning rate")
GRAD_NORM: Final = Metric("entrenar.step.grad_norm", "gauge", "{norm}", "gradient norm before clipping")
GPU_MEMORY: Final = Metric("entrenar.gpu.memory", "gauge", "By", "GPU memory that the run holds")
TOKENS: Final = Metric("entrenar.tokens", "counter", "{token}", "trained tokens")
SKIPPED_STEPS: Final = Metric("entrenar.skipped_steps", "counter", "{step}", "steps without an update")
EVAL_LOSS: Final = Metric("entrenar.eval.loss", "gauge", "{nat}", "mean loss over the evaluation data")
ANOMALIES: Final = Metric("entrenar.anomalies", "counter", "{anomaly}", "anomalies, by cause and severity")
METRICS: Final = (
    STEP_DURATION,
    LOSS,
    THROUGHPUT,
    LEARNING_RATE,
    GRAD_NORM,
    GPU_MEMORY,
    TOKENS,
    SKIPPED_STEPS,
    EVAL_LOSS,
    ANOMALIES,
)

# Seconds; from a small model's step on a fast card to a large one's on a slow one, about three to a decade.
STEP_SECONDS_BOUNDS: Final = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)


class RunMetrics:
    """Records a run's metrics. Thread-safe, as the SDK's instruments are."""

    def __init__(self, meter: Meter, provider: MeterProvider | None = None) -> None:
        self._provider = provider  # to shut down at the end; None where it is the caller's
        self._loss, self._throughput, self._lr, self._grad_norm, self._memory, self._eval_loss = (
            meter.create_gauge(metric.name, metric.unit, metric.meaning)
            for metric in (LOSS, THROUGHPUT, LEARNING_RATE, GRAD_NORM, GPU_MEMORY, EVAL_LOSS)
        )
        self._tokens, self._skipped, self._anomalies = (_counter(meter, m) for m in (TOKENS, SKIPPED_STEPS, ANOMALIES))
        self._duration = _histogram(meter, STEP_DURATION)

    def step(self, record: Any) -> None:
        """Record a `StepRecord`. A gauge keeps its last finite value through skipped steps."""
        self._duration.record(record.step_seconds)
        self._tokens.add(record.tokens)
        self._skipped.add(int(record.skipped))  # zeros too: a counter that never was is no zero to Prometheus
        self._memory.set(record.allocated_bytes)
        self._lr.set(record.lr)
        self._throughput.set(record.tokens_per_second)
        if math.isfinite(record.loss):
            self._loss.set(record.loss)
        if math.isfinite(record.grad_norm):
            self._grad_norm.set(record.grad_norm)

    def evaluation(self, record: Any) -> None:
        if math.isfinite(record.loss):
            self._eval_loss.set(record.loss)

    def anomaly(self, cause: str, severity: str) -> None:
        self._anomalies.add(1, {"cause": cause, "severity": severity})

    def close(self, timeout_seconds: float) -> None:
        """Export what is left; a collector that does not answer is left alone when the timeout is over."""
        if self._provider is None:
            return
        # The reader's last export goes on for as long as the exporter's own timeout, so it gets a thread to itself.
        last = threading.Thread(target=self._provider.shutdown, name="otlp-metrics-close", daemon=True)
        last.start()
        last.join(timeout_seconds)


def run_metrics(resource: Resource, exporter: MetricExporter | None) -> RunMetrics | None:
    """Metrics to `exporter`, or through the caller's global provider, or None where nobody would get them.

    Raises TraceError for an interval of exports that cannot be used.
    """
    if exporter is not None:
        interval = environ_int("OTEL_METRIC_EXPORT_INTERVAL", _EXPORT_MILLIS)
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=interval)
        provider = MeterProvider([reader], resource, shutdown_on_exit=False)
        return RunMetrics(provider.get_meter(schema.SCOPE_NAME), provider)
    caller = metrics.get_meter_provider()
    if isinstance(caller, MeterProvider):
        return RunMetrics(caller.get_meter(schema.SCOPE_NAME))
    return None


def _counter(meter: Meter, metric: Metric) -> Counter:
    return meter.create_counter(metric.name, metric.unit, metric.meaning)


def _histogram(meter: Meter, metric: Metric) -> Histogram:
    bounds = list(STEP_SECONDS_BOUNDS)
    return meter.create_histogram(metric.name, metric.unit, metric.meaning, explicit_bucket_boundaries_advisory=bounds)
