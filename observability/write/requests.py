"""The requests of a server as spans, in the trace format of training runs: schema.py has their attributes."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path
from typing import Any

from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Status, StatusCode

from observability import schema
from observability.write import otlp_settings
from observability.write.export import Sender, TraceFile, line_head
from observability.write.observer import sender_to
from observability.write.sampling import exported
from observability.write.tracing import clean, span_source

FLUSH_SECONDS = 5.0


def trace_requests(output_dir: str | None, *, otlp: str | None, model: str, version: str) -> RequestTracer | None:
    """What traces requests into `output_dir`/trace.jsonl, to a collector, or both; None where neither is asked for.

    `otlp` and OpenTelemetry's environment variables say which collector, as for a run. Raises TraceError where the file
    or the collector cannot be had.
    """
    target = None if otlp_settings.sdk_disabled() else otlp_settings.target("traces", otlp)
    if output_dir is None and target is None:
        return None
    ours = {
        schema.SERVICE_NAME: schema.SERVICE_NAME_DEFAULT,
        schema.SERVICE_VERSION: version,
        schema.SERVICE_INSTANCE: uuid.uuid4().hex,
        schema.RUN_MODEL: clean(model),
    }
    resource = Resource.create(ours).merge(OTELResourceDetector().detect())
    head = line_head(resource, schema.SCOPE_NAME, version)
    file = None if output_dir is None else TraceFile(Path(output_dir) / schema.TRACE_FILE, head)
    if target is not None:
        otlp_settings.quiet_exporters()
    return RequestTracer(resource, version, file, sender_to(target))


class RequestTracer:
    """Takes the server's records, from any thread; a span is in the file before `request_finished` returns."""

    def __init__(self, resource: Resource, version: str, file: TraceFile | None, sender: Sender | None) -> None:
        self._resource = resource
        self._scope = InstrumentationScope(schema.SCOPE_NAME, version)
        self._source = span_source()
        self._file = file
        self._sender = sender
        self._lock = threading.Lock()

    def request_finished(self, record: Any) -> None:
        """Write the span of a `RequestRecord`."""
        attributes = {
            schema.SPAN_LEVEL: schema.REQUEST,
            schema.REQUEST_ID: record.request_id,
            schema.REQUEST_ROUTE: clean(record.route),
            schema.REQUEST_MODEL: clean(record.model),
            schema.REQUEST_STATUS: record.status,
            schema.REQUEST_FINISH: record.finish,
            schema.REQUEST_PROMPT: record.prompt_tokens,
            schema.REQUEST_CACHED: record.cached_tokens,
            schema.REQUEST_DRAWN: record.completion_tokens,
        }
        if record.first_token_ns:
            attributes[schema.REQUEST_FIRST] = (record.first_token_ns - record.start_ns) / 1e9
        good = record.status < 400
        status = Status(StatusCode.OK) if good else Status(StatusCode.ERROR, f"HTTP status {record.status}")
        with self._lock:
            context = self._source.begin(schema.REQUEST, record.start_ns, None)
            self._source.finish(context, record.end_ns, attributes, status)
            span = ReadableSpan(
                schema.REQUEST,
                context,
                None,
                self._resource,
                attributes,
                status=status,
                start_time=record.start_ns,
                end_time=max(record.start_ns, record.end_ns),
                instrumentation_scope=self._scope,
            )
            if self._file is not None:
                self._file.write([span])
            if self._sender is not None:
                self._sender.put([exported(span)])

    def close(self) -> None:
        """Send what is queued, within bounded time, and close the file."""
        if self._sender is not None:
            self._sender.close(FLUSH_SECONDS)
        if self._file is not None:
            self._file.close()
