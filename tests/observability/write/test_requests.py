"""Requests of a server as spans of the trace format."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from entrenar_gpu.events import RequestRecord
from observability import schema, trace_requests
from observability.errors import TraceError

RECORD = RequestRecord(
    "cmpl-1", "/v1/completions", "base", 200, "stop", 7, 3, 12, 1_000_000_000, 1_500_000_000, 2 * 10**9
)


def spans(folder: Path) -> list[dict]:
    lines = (folder / schema.TRACE_FILE).read_text().splitlines()
    return [s for line in lines for s in json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"]]


def test_a_request_is_a_root_span_with_the_attributes_of_the_schema(tmp_path, monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    tracer = trace_requests(str(tmp_path), otlp=None, model="tiny", version="1")
    tracer.request_finished(RECORD)
    tracer.request_finished(replace(RECORD, status=499, first_token_ns=0))
    tracer.close()
    good, bad = spans(tmp_path)
    attributes = {a["key"]: a["value"] for a in good["attributes"]}
    assert set(attributes) == {n for n, row in schema.ATTRIBUTES.items() if row.on == "request"} | {schema.SPAN_LEVEL}
    kinds = {"stringValue": "string", "intValue": "int", "doubleValue": "double"}
    assert all(kinds[next(iter(value))] == schema.ATTRIBUTES[key].type for key, value in attributes.items())
    assert attributes[schema.REQUEST_FIRST] == {"doubleValue": 0.5}
    assert good["name"] == schema.REQUEST
    assert "parentSpanId" not in good
    assert (good["startTimeUnixNano"], good["endTimeUnixNano"]) == ("1000000000", "2000000000")
    assert (good["status"]["code"], bad["status"]["code"]) == (1, 2)
    assert good["traceId"] != bad["traceId"]
    assert schema.REQUEST_FIRST not in {a["key"] for a in bad["attributes"]}


def test_threads_write_whole_lines(tmp_path):
    tracer = trace_requests(str(tmp_path), otlp=None, model="tiny", version="1")
    threads = [threading.Thread(target=lambda: [tracer.request_finished(RECORD) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tracer.close()
    assert len(spans(tmp_path)) == 200


def test_nothing_asked_for_traces_nothing_and_a_wrong_address_is_told(monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert trace_requests(None, otlp=None, model="tiny", version="1") is None
    with pytest.raises(TraceError, match="--otlp"):
        trace_requests(None, otlp="nowhere", model="tiny", version="1")
