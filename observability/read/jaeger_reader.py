"""Traces from Jaeger's HTTP API (`/api/traces`, which Jaeger v1 and v2 serve on the port of their user interface).

Jaeger's JSON has times in microseconds, references instead of a parent id, and tags instead of attributes.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, Final

from observability import schema
from observability.errors import TraceError
from observability.read.span_table import SpanCollector, as_text, as_truth

_TIMEOUT_SECONDS: Final = 30  # for the next byte
_PATIENCE_SECONDS: Final = 120  # for the last
_MAX_ANSWER: Final = 1 << 30  # bytes
_TRACES_ASKED: Final = 20


def read_address(address: str, collector: SpanCollector) -> None:
    """Adds the traces that a Jaeger address means: one trace's page, or the newest of the service there."""
    url = _api_url(address)
    try:
        # The scheme is http or https: read_trace has looked.
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
            body = _read(answer)
    except urllib.error.HTTPError as error:
        raise TraceError(f"{address}: Jaeger answered {error.code} {error.reason} to {url}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise TraceError(f"{address}: cannot be reached: {getattr(error, 'reason', None) or error}") from None
    if len(body) > _MAX_ANSWER:
        raise TraceError(f"{address}: the answer is longer than {_MAX_ANSWER >> 20} MiB; ask for one trace")
    try:
        data = json.loads(body)["data"]
        if not isinstance(data, list):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TraceError(f"{address}: not an answer of Jaeger's; is {url} its user interface's port?") from None
    if not data:
        raise TraceError(f"{address}: Jaeger has no such trace (asked {url})")
    add_traces(data, collector)


def _read(answer: http.client.HTTPResponse) -> bytes:
    """The body, or the first part of one that is too long; TimeoutError where it trickles in."""
    body, deadline = bytearray(), time.monotonic() + _PATIENCE_SECONDS
    while len(body) <= _MAX_ANSWER and (part := answer.read1(1 << 20)):
        body += part
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    return bytes(body)


def _api_url(address: str) -> str:
    """http://host:16686/trace/ID or .../api/traces/ID for one trace; http://host:16686[/?service=S] for the newest."""
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError as error:
        raise TraceError(f"{address}: not an address: {error}") from None
    if not parts.netloc:
        raise TraceError(f"{address}: not an address: it names no host")
    head, _, identity = parts.path.rpartition("/")
    if identity and (head.endswith(("/trace", "/traces"))):
        prefix = head.removesuffix("/trace").removesuffix("/traces").removesuffix("/api")
        path, query = f"{prefix}/api/traces/{identity}", ""
    else:
        path = parts.path.rstrip("/").removesuffix("/search").removesuffix("/api/traces") + "/api/traces"
        given = dict(urllib.parse.parse_qsl(parts.query))
        query = urllib.parse.urlencode({"service": schema.SERVICE_NAME_DEFAULT, "limit": _TRACES_ASKED} | given)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, query, ""))


def add_traces(traces: list[Any], collector: SpanCollector) -> None:
    """Adds every span of Jaeger's `data` list; what is malformed is counted."""
    for trace in traces:
        if not isinstance(trace, dict) or not isinstance(trace.get("spans"), list):
            collector.skipped["malformed traces"] += 1
            continue
        processes = trace.get("processes")
        resources: dict[str, dict[str, Any]] = {}
        for key, process in processes.items() if isinstance(processes, dict) else ():
            if isinstance(process, dict):
                resources[key] = _tags(process.get("tags")) | {schema.SERVICE_NAME: as_text(process.get("serviceName"))}
                collector.describe(resources[key])
        for span in trace["spans"]:
            try:
                start = int(span["startTime"]) * 1000
                end = start + int(span["duration"]) * 1000
                trace_id, span_id, name = str(span["traceID"]), str(span["spanID"]), str(span["operationName"])
                parent = _parent(span)
            except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
                collector.skipped["malformed spans"] += 1
                continue
            resource = resources.get(str(span.get("processID")), {})
            collector.add(trace_id, span_id, parent, name, start, end, _tags(span.get("tags")), resource)


def _parent(span: dict[str, Any]) -> str:
    for reference in span.get("references") or ():
        if reference.get("refType") == "CHILD_OF":
            return str(reference["spanID"])
    return ""


def _tags(tags: Any) -> dict[str, Any]:
    """Jaeger's tags as a dict, numbers and booleans by their stated type (it sends some as text)."""
    result: dict[str, Any] = {}
    for tag in tags if isinstance(tags, list) else ():
        try:
            convert: Callable[[Any], Any] = _CONVERTERS.get(tag["type"], as_text)
            result[tag["key"]] = convert(tag["value"])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    return result


_CONVERTERS: Final[dict[str, Callable[[Any], Any]]] = {"int64": int, "float64": float, "bool": as_truth}
