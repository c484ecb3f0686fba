"""Log records that name the span they belong to, so that a line of a log is found in the trace and the other way."""

from __future__ import annotations

import logging
from typing import Protocol

from opentelemetry.trace import SpanContext, format_span_id, format_trace_id

_NO_TRACE = format_trace_id(0)
_NO_SPAN = format_span_id(0)


class HasSpan(Protocol):
    """Something that knows the span that is open now, such as `TraceObserver`."""

    @property
    def current_span(self) -> SpanContext | None: ...


class TraceIdFilter(logging.Filter):
    """Gives every record of a handler or logger `trace_id` and `span_id`: hex, as in the trace, zeros outside a run.

    Use: `handler.addFilter(TraceIdFilter(observer))`, with `%(trace_id)s` and `%(span_id)s` in its format.
    """

    def __init__(self, source: HasSpan) -> None:
        super().__init__()
        self._source = source

    def filter(self, record: logging.LogRecord) -> bool:
        span = self._source.current_span
        record.trace_id = format_trace_id(span.trace_id) if span is not None else _NO_TRACE
        record.span_id = format_span_id(span.span_id) if span is not None else _NO_SPAN
        return True
