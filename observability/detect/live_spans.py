"""Anomalies from spans as they end: the live detector behind OpenTelemetry's interface for span processors.

For a program that has a run's spans go through its own tracer provider. The spans are put together again to the records
that they were made from (tracing.py; schema.py has their order), so the detector says the same of either.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Final

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

from observability import schema
from observability.detect.live import LiveDetector
from observability.read import NO_STEP, PAUSES, number, whole

_log = logging.getLogger(__name__)
_MOST_SPANS: Final = 20_000  # kept of one step; a step of 36 layers has some thousand kernels
_BELOW_STEP: Final = frozenset(schema.LEVELS) - {"step"}
_TRAINER_KEYS: Final = {name: key for key, name in schema.SPAN_KEYS.items()}
_OWN_RECORD: Final = frozenset(
    {schema.CHECKPOINT_BYTES, schema.EVAL_LOSS, schema.SAMPLE_PROMPTS}
)  # no phase of a step has them


class AnomalyProcessor(SpanProcessor):
    """Span processor that tells `detector` of the first run whose spans it sees; all other spans are ignored.

    A step is judged when the next span after its own ends: the next step's, a checkpoint's, an evaluation's or the
    run's; or at `force_flush`, after which the rest of a step still under way is not taken in. Never raises.
    """

    def __init__(self, detector: LiveDetector) -> None:
        self._detector = detector
        self._lock = threading.RLock()  # a provider may be flushed from any thread, and by what the detector calls
        self._run: int | None = None  # id of the `train` span, known as a parent until the run ends
        self._finished = False
        self._step: SimpleNamespace | None = None  # not yet judged
        self._places: dict[int, int | None] = {}  # by span id: the index in the step's spans, None for the step itself

    def on_end(self, span: ReadableSpan) -> None:
        scope = span.instrumentation_scope
        if scope is not None and scope.name == schema.SCOPE_NAME:
            self._guarded(lambda: self._take(span))

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        self._guarded(self._judge_step)
        return True

    def shutdown(self) -> None:
        self._guarded(self._finish)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            with self._lock:
                action()
        except Exception:  # a fault of the detector must not end what it watches
            _log.exception("anomaly detection failed on a span")

    def _take(self, span: ReadableSpan) -> None:
        start, end, attributes = span.start_time, span.end_time, span.attributes or {}
        if span.context is None or start is None or end is None or end < start:
            return
        if span.context.span_id == self._run:
            self._finish()
            return
        if span.parent is None or span.context.span_id in self._places:  # told twice: by observer and provider
            return
        parent, level = span.parent.span_id, attributes.get(schema.SPAN_LEVEL)
        is_pause = level == "phase" and span.name in PAUSES and not _OWN_RECORD.isdisjoint(attributes)
        if self._run is None and (level == "step" or is_pause):
            self._run = parent
        if level == "step" and parent == self._run:
            self._begin(span.context.span_id, start, end, attributes)
        elif parent == self._run or parent in self._places:
            step = self._step
            inside = step is not None and step.start_ns <= start and end <= step.end_ns  # else it lies beside the step
            if is_pause:
                self._judge_pause(span.name, start, end, attributes, inside)
            if level in _BELOW_STEP and parent in self._places and (inside or not is_pause):
                self._add(span.context.span_id, parent, span.name, start, end, attributes)

    def _begin(self, identity: int, start: int, end: int, attributes: Mapping[str, Any]) -> None:
        step = whole(attributes.get(schema.STEP_NUMBER), NO_STEP)
        if step == NO_STEP:
            return
        before, self._places = self._step, {identity: None}
        self._step = SimpleNamespace(
            step=step,
            start_ns=start,
            end_ns=end,
            step_seconds=max((end - start) / 1e9, 1e-9),
            loss=number(attributes.get(schema.LOSS)),
            grad_norm=number(attributes.get(schema.GRAD_NORM)),
            tokens=number(attributes.get(schema.TOKENS)),
            row_tokens=number(attributes.get(schema.ROW_TOKENS)),
            allocated_bytes=number(attributes.get(schema.ALLOCATED_BYTES)),
            skipped=bool(attributes.get(schema.SKIPPED)),
            host=_host(attributes),
            spans=[],
        )
        if before is not None:
            self._detector.step_finished(before)

    def _add(self, identity: int, parent: int, name: str, start: int, end: int, attributes: Mapping[str, Any]) -> None:
        if self._step is None or len(self._step.spans) >= _MOST_SPANS:
            return
        told = {_TRAINER_KEYS[key]: value for key, value in attributes.items() if key in _TRAINER_KEYS}
        kind, above = attributes[schema.SPAN_LEVEL], self._places[parent]
        span = SimpleNamespace(name=name, kind=kind, start_ns=start, end_ns=end, parent=above, attributes=told)
        self._places[identity] = len(self._step.spans)
        self._step.spans.append(span)

    def _judge_pause(self, name: str, start: int, end: int, attributes: Mapping[str, Any], inside: bool) -> None:
        if not inside:
            self._judge_step()
        step, size = (whole(attributes.get(key), 0) for key in (schema.STEP_NUMBER, schema.CHECKPOINT_BYTES))
        record = SimpleNamespace(step=step, bytes=size, start_ns=start, end_ns=end)
        if name == schema.CHECKPOINT:
            self._detector.checkpoint_saved(record)
        elif name == schema.EVAL:
            self._detector.eval_finished(record)  # samples take what their answers take

    def _judge_step(self) -> None:
        step, self._step = self._step, None
        if step is not None:
            self._detector.step_finished(step)

    def _finish(self) -> None:
        if not self._finished:
            self._finished = True
            self._judge_step()
            self._detector.run_finished(None)


def _host(attributes: Mapping[str, Any]) -> SimpleNamespace | None:
    """What the host did in the step, where the span tells."""
    told = {key: attributes[name] for key, name in schema.HOST_KEYS.items() if name in attributes}
    return SimpleNamespace(**told) if told else None
