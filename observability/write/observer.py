"""The observer of a run: takes the trainer's records and has a thread of its own do everything else.

What the training thread pays for a record is an append to a queue. The tracing thread looks there a few times a second,
so that it is not woken in the middle of a step's encoding, builds the spans, appends them to the run's file and passes
them on: to the sender, to span processors (such as the live detector), to the metrics.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.trace import SpanContext

from observability import schema
from observability.errors import TraceError
from observability.write import otlp_settings, sampling
from observability.write.export import Sender, TraceFile, line_head
from observability.write.metrics import RunMetrics, run_metrics
from observability.write.sampling import StepSample
from observability.write.tracing import OwnSpans, SpanBuilder, SpanSource, span_source

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.1
_BACKLOG_SPANS = 100_000  # in records that wait for the tracing thread; only a disk that hangs gets there
_QUEUE_SPANS = 16_384  # spans that wait for the collector: some minutes of steps, about 25 MB
_BATCH_SPANS = 512
_SEND_MILLIS = 1_000
_FILE_SECONDS = 30.0  # for the file at the end of a run; a backlog takes a second or two, a disk that hangs all of it
FLUSH_SECONDS = 5.0


@dataclass(frozen=True)
class TraceSummary:
    """What became of a run's spans."""

    written: int  # to the file
    sent: int  # to the collector
    dropped: int  # not sent, as the collector was dead or slow
    lost: int  # never built or not written: the disk was full, or tracing fell behind
    left_out: int = 0  # not sent, of steps that are not in the sample

    def __str__(self) -> str:
        text = f"{self.written} spans written"
        if self.sent or self.dropped:
            text += f", {self.sent} sent to the collector"
        if self.left_out:
            text += f", {self.left_out} of other steps not (--otlp-sample)"
        if self.dropped:
            text += f", {self.dropped} dropped as it was down or slow"
        if self.lost:
            text += f", {self.lost} lost as the disk was full or tracing fell behind"
        return text


def observe(
    output_dir: str | Path,
    *,
    level: schema.Level = schema.DEFAULT_LEVEL,
    otlp: str | None = None,
    processors: Sequence[SpanProcessor] = (),
    flush_seconds: float = FLUSH_SECONDS,
    kernels_every: int | None = None,
    otlp_sample: int | None = None,
) -> TraceObserver:
    """Make an observer that traces a run into `output_dir`/trace.jsonl, and to a collector where one is named.

    level: the deepest spans kept: step, phase, layer or kernel.
    otlp: the collector's base URL, http://HOST:4318 or grpc://HOST:4317. Without it, the OTEL_EXPORTER_OTLP_* variables
        say; where the calling program has set a tracer provider, they are that provider's business.
    processors: get every finished span through `on_end`, on the tracing thread, and `shutdown` at the end.
    flush_seconds: how long the end of the run may wait for the collector.
    kernels_every: at level kernel, steps from one whose kernels are kept to the next; by default 1,000 steps have them.
    otlp_sample: steps from one that the collector gets to the next; by default it gets some 50,000 spans of a run.
    Raises TraceError for an unusable level or address, before anything is started.
    """
    if level not in schema.LEVELS:
        raise TraceError(f"--trace-level: expected {', '.join(schema.LEVELS)}, not {level!r}")
    if not otlp_settings.sdk_disabled():  # complains now, before a model is loaded
        otlp_settings.target("traces", otlp)
        otlp_settings.target("metrics", otlp)
    for flag, every in (("--trace-kernels-every", kernels_every), ("--otlp-sample", otlp_sample)):
        if every is not None and every < 1:
            raise TraceError(f"{flag}: expected 1 and more, not {every}")
    return TraceObserver(Path(output_dir), level, otlp, tuple(processors), flush_seconds, kernels_every, otlp_sample)


class TraceObserver:
    """A run's observer; `observe` makes it. The trainer calls all its methods from one thread."""

    def __init__(
        self,
        output_dir: Path,
        level: schema.Level,
        otlp: str | None,
        processors: tuple[SpanProcessor, ...],
        flush: float,
        every: int | None = None,
        sample: int | None = None,
    ) -> None:
        self._output_dir = output_dir
        self._level = level
        self._otlp = otlp
        self._processors = processors
        self._flush_seconds = flush
        self._kernels_every = every
        self._otlp_sample = sample
        self._disabled = otlp_settings.sdk_disabled()
        self._pipeline: _Pipeline | None = None
        self._promised: SpanContext | None = None
        self._summary: TraceSummary | None = None

    @property
    def current_span(self) -> SpanContext | None:
        """The span of the step that is being computed, None outside a run. With a caller's provider: the run's span."""
        if self._pipeline is None:
            return None
        return self._promised or self._pipeline.builder.train

    def run_started(self, info: Any) -> None:
        """Open the run's span under the span that is open here, the way to the collector, and the run's file.

        Raises TraceError, and leaves no file behind, where one of them cannot be had.
        """
        source: SpanSource = OwnSpans() if self._disabled else span_source()
        around = trace.get_current_span().get_span_context()
        every = sampling.kernels_every(self._kernels_every, info.total_steps)
        builder = SpanBuilder(info, self._level, around if around.is_valid else None, source, every)
        ours = isinstance(source, OwnSpans)
        if ours:
            otlp_settings.quiet_exporters()
        sends = not self._disabled and (ours or self._otlp is not None)
        spans_to = otlp_settings.target("traces", self._otlp) if sends else None
        metrics_to = otlp_settings.target("metrics", self._otlp) if not self._disabled else None
        head = line_head(builder.resource, schema.SCOPE_NAME, info.project_version)
        with ExitStack() as undo:
            sender = sender_to(spans_to)
            if sender is not None:
                undo.callback(sender.close, 0.0)
            metrics_exporter = otlp_settings.metric_exporter(metrics_to) if metrics_to else None
            metrics = None if self._disabled else run_metrics(builder.resource, metrics_exporter)
            if metrics is not None:
                undo.callback(metrics.close, 0.0)
            file = TraceFile(self._output_dir / schema.TRACE_FILE, head)
            undo.pop_all()
        sample = sampling.StepSample(self._otlp_sample, info.total_steps - info.first_step + 1, builder.train)
        self._pipeline = _Pipeline(builder, file, sender, sample, metrics, self._processors)
        self._promise(source)
        atexit.register(self.close)

    def step_finished(self, record: Any) -> None:
        if self._pipeline is not None:
            self._pipeline.put("step", record, 1 + len(record.spans), self._promised)
            self._promise(self._pipeline.builder.source)

    def eval_finished(self, record: Any) -> None:
        if self._pipeline is not None:
            self._pipeline.put("evaluation", record, 1)

    def checkpoint_saved(self, record: Any) -> None:
        if self._pipeline is not None:
            self._pipeline.put("checkpoint", record, 1)

    def samples_drawn(self, record: Any) -> None:
        if self._pipeline is not None:
            self._pipeline.put("samples", record, 1)

    def run_finished(self, summary: Any) -> None:
        if self._pipeline is not None:
            self._pipeline.put("finish", summary, 1)
            self.close()

    def flush(self) -> None:
        """Have all that was told so far on disk before this returns, or give up after the time that the end gets."""
        if self._pipeline is not None:
            self._pipeline.flush()

    def anomaly(self, cause: str, severity: str) -> None:
        """Count an anomaly in the metrics; what the live detector calls."""
        if self._pipeline is not None and self._pipeline.metrics is not None:
            self._pipeline.metrics.anomaly(cause, severity)

    def told(self, finding: Any) -> None:
        """Keep an anomaly that the live detector tells of, so that the report can confirm or withdraw it; count it."""
        if self._pipeline is not None:
            self._pipeline.put("anomaly", (finding, time.time_ns()), 1)
            self.anomaly(finding.cause, finding.severity or "noticed")

    def close(self) -> TraceSummary:
        """End the run's span if `run_finished` has not, flush within bounded time, and say what became of it all.

        Can be called again: the first summary stands.
        """
        if self._summary is None:
            atexit.unregister(self.close)
            pipeline, self._pipeline = self._pipeline, None
            self._summary = TraceSummary(0, 0, 0, 0) if pipeline is None else pipeline.close(self._flush_seconds)
            if self._summary.dropped or self._summary.lost:
                _log.warning("trace: %s", self._summary)
        return self._summary

    def _promise(self, source: SpanSource) -> None:
        """Give the next step its identity before it starts, so that logs can name it."""
        if isinstance(source, OwnSpans):
            assert self._pipeline is not None
            self._promised = source.begin(schema.STEP, 0, self._pipeline.builder.train)


def sender_to(to: otlp_settings.Target | None) -> Sender | None:
    if to is None:
        return None
    limit = otlp_settings.environ_int("OTEL_BSP_MAX_QUEUE_SIZE", _QUEUE_SPANS)
    batch = otlp_settings.environ_int("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", _BATCH_SPANS)
    period = otlp_settings.environ_int("OTEL_BSP_SCHEDULE_DELAY", _SEND_MILLIS) / 1e3
    return Sender(otlp_settings.span_exporter(to), to.name, limit, batch, period)


class _Pipeline:
    """The queue of records and the thread that empties it."""

    def __init__(
        self,
        builder: SpanBuilder,
        file: TraceFile,
        sender: Sender | None,
        sample: StepSample,
        metrics: RunMetrics | None,
        processors: tuple[SpanProcessor, ...],
    ) -> None:
        self.builder = builder
        self.metrics = metrics
        self._finished = False
        self._file = file
        self._sender = sender
        self._sample = sample
        self._processors = processors
        self._queue: deque[tuple[str, Any, int, SpanContext | None]] = deque()
        self._put_spans = 0  # written by the training thread only, as _taken_spans by the tracing thread only
        self._taken_spans = 0
        self._lost = 0
        self._stop = threading.Event()
        self._look = threading.Event()  # there is something that cannot wait for the next look
        self._thread = threading.Thread(target=self._run, name="tracing", daemon=True)
        self._thread.start()

    def put(self, kind: str, record: Any, spans: int, promised: SpanContext | None = None) -> None:
        """Queue a record that makes about `spans` spans, or drop it where too many wait."""
        if self._put_spans - self._taken_spans > _BACKLOG_SPANS and kind not in ("finish", "flush"):
            self._lost += spans
            return
        self._finished = self._finished or kind == "finish"
        self._put_spans += spans
        self._queue.append((kind, record, spans, promised))

    def flush(self) -> None:
        """Write what is queued, and have the file on disk, not only handed to the operating system."""
        done = threading.Event()
        self.put("flush", done, 0)
        self._look.set()
        if not done.wait(_FILE_SECONDS):
            _log.warning("trace: the disk did not take what was queued within %.0f s", _FILE_SECONDS)

    def close(self, timeout_seconds: float) -> TraceSummary:
        """Write what is queued, then wait for the collector, `timeout_seconds` at most."""
        if not self._finished:
            self.put("finish", None, 1)
        self._stop.set()
        self._look.set()
        self._thread.join(_FILE_SECONDS)
        deadline = time.monotonic() + timeout_seconds
        if self._sender is not None:
            self._sender.close(max(deadline - time.monotonic(), 0.0))
        if self.metrics is not None:
            self.metrics.close(max(deadline - time.monotonic(), 0.0))
        sent, dropped = (self._sender.sent, self._sender.dropped) if self._sender is not None else (0, 0)
        waiting = self._put_spans - self._taken_spans
        left_out = self._sample.left_out if self._sender is not None else 0
        return TraceSummary(self._file.written, sent, dropped, self._lost + self._file.lost + waiting, left_out)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._look.wait(_LOOK_SECONDS)
            self._look.clear()
            self._drain()
        self._drain()
        self._file.close()

    def _drain(self) -> None:
        while self._queue:
            kind, record, spans, promised = self._queue.popleft()
            try:
                self._take(kind, record, promised)
            except Exception:
                # A fault of ours or of a processor must not end the run that is being watched.
                _log.exception("tracing failed on a %s record", kind)
                self._lost += spans
            self._taken_spans += spans

    def _take(self, kind: str, record: Any, promised: SpanContext | None) -> None:
        if kind == "step":
            spans = self.builder.step(record, promised)
            self._give(spans, self._sample.of_step(record.step, spans) if self._sender is not None else None)
            if self.metrics is not None:
                self.metrics.step(record)
        elif kind == "evaluation":
            self._give(self.builder.evaluation(record))
            if self.metrics is not None:
                self.metrics.evaluation(record)
        elif kind == "checkpoint":
            self._give(self.builder.checkpoint(record))
        elif kind == "samples":
            self._give(self.builder.samples(record))
        elif kind == "anomaly":
            self._sample.expect(record[0].first_step, record[0].last_step)
            self._give(self.builder.anomaly(*record))
        elif kind == "flush":
            self._file.sync()
            record.set()
        else:
            self._give(self.builder.finish(record))
            for processor in self._processors:
                processor.shutdown()

    def _give(self, spans: list[ReadableSpan], sent: list[ReadableSpan] | None = None) -> None:
        """Hand spans on; `sent` is what a collector gets of them where that is not all."""
        if not spans:
            return
        self._file.write(spans)
        if self._sender is not None:
            self._sender.put(self._sample.others(spans) if sent is None else sent)
        for processor in self._processors:
            for span in spans:
                processor.on_end(span)
