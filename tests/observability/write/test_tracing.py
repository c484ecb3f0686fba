"""Records become the tree of spans that observability/schema.py describes: parents, times, attributes, levels."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from entrenar_gpu.events import HostStats, Span
from observability import observe, schema
from observability.detect import Finding
from observability.errors import TraceError
from observability.write import otlp_settings
from observability.write.logs import TraceIdFilter
from observability.write.sampling import exported
from observability.write.tracing import OwnSpans, SpanBuilder, clean
from tests.helpers.step_records import (
    KERNELS,
    START_NS,
    STEP_NS,
    checkpoint_record,
    eval_record,
    run_info,
    run_summary,
    sample_record,
    skipped_step,
    step_record,
)


@pytest.fixture(autouse=True)
def no_otel_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def builder(level: schema.Level = "layer", parent: Any = None) -> SpanBuilder:
    return SpanBuilder(run_info(), level, parent, OwnSpans())


def path_names(spans: list[ReadableSpan], root: Any) -> list[tuple[str, ...]]:
    """Each span's names from below the `train` span down; fails for a parent that is not there."""
    by_id = {span.context.span_id: span for span in spans}
    paths = []
    for span in spans:
        names: list[str] = []
        at: ReadableSpan | None = span
        while at is not None:
            names.insert(0, at.name)
            assert at.parent is not None
            at = None if at.parent.span_id == root.span_id else by_id[at.parent.span_id]
        paths.append(tuple(names))
    return paths


EXPECTED = {
    "step": {("step",)},
    "phase": {("step",), *(("step", phase) for phase in ("data", "forward", "backward", "optimizer"))},
}
EXPECTED["layer"] = EXPECTED["phase"] | {
    ("step", phase, f"layer {index}") for phase in ("forward", "backward") for index in (0, 1)
}
EXPECTED["kernel"] = EXPECTED["layer"] | {
    (*path, kernel) for path in EXPECTED["layer"] if len(path) == 3 for kernel in ("rope", "matmul")
}


@pytest.mark.parametrize("level", schema.LEVELS)
def test_each_level_keeps_its_spans_and_parents(level: schema.Level) -> None:
    build = builder(level)
    spans = build.step(step_record(1, kernels=("rope", "matmul")))
    assert set(path_names(spans, build.train)) == EXPECTED[level]
    assert len(spans) == len(EXPECTED[level])
    assert spans[0].name == "step"
    assert len({span.context.span_id for span in spans}) == len(spans)
    assert {span.context.trace_id for span in spans} == {build.train.trace_id}


def test_a_kernel_hangs_on_the_phase_when_it_belongs_to_no_layer_and_layers_are_left_out() -> None:
    spans = (
        Span("forward", "phase", START_NS, START_NS + 10),
        Span("layer 0", "layer", START_NS, START_NS + 5, 0, True),
        Span("rope", "kernel", START_NS, START_NS + 2, 1, True),
        Span("cross_entropy", "kernel", START_NS + 6, START_NS + 9, 0, True),
    )
    build = builder("kernel")
    assert path_names(build.step(step_record(1, spans=spans)), build.train)[-2:] == [
        ("step", "forward", "layer 0", "rope"),
        ("step", "forward", "cross_entropy"),
    ]


def test_times_are_the_records_own_and_never_negative() -> None:
    record = step_record(3, kernels=KERNELS)
    spans = builder("kernel").step(record)
    assert [(s.start_time, s.end_time) for s in spans[1:]] == [(s.start_ns, s.end_ns) for s in record.spans]
    assert (spans[0].start_time, spans[0].end_time) == (START_NS + 2 * STEP_NS, START_NS + 3 * STEP_NS)
    backwards = step_record(4, spans=(Span("data", "phase", START_NS + 9, START_NS + 2),))
    assert builder().step(backwards)[1].end_time == START_NS + 9


def test_attributes_are_those_of_the_schema_with_its_types() -> None:
    build = SpanBuilder(run_info(resumes="run-12c0"), "kernel", None, OwnSpans())
    host = HostStats(0.5, 0.1, 0.0, 0.2, 3, 40, 5, 1 << 20, 1980.0, 61.0, 120.0, "power cap")
    record = step_record(1, kernels=("rope",), host=host)
    spans = [*build.step(record), *build.checkpoint(checkpoint_record(1)), *build.evaluation(eval_record(1))]
    spans += build.samples(sample_record(1))
    spans += build.anomaly(Finding("spike", 1, 1, 1, "step", 0.2, 0.1, 9.0, "high", "twice as long"), START_NS)
    spans += build.finish(run_summary(1))
    types = {"string": str, "int": int, "double": float, "bool": bool}
    seen = set()
    for span in spans:
        for name, value in (span.attributes or {}).items():
            assert type(value) is types[schema.ATTRIBUTES[name].type], name
            seen.add(name)
    resource = {name for name, row in schema.ATTRIBUTES.items() if row.on in ("resource", "exported spans", "request")}
    assert seen == set(schema.ATTRIBUTES) - resource
    assert schema.RUN_RESUMES not in (builder().finish(run_summary(1))[-1].attributes or {})
    step = spans[0].attributes or {}
    assert (step[schema.STEP_NUMBER], step[schema.LOSS], step[schema.TOKENS]) == (1, 2.5, 1000)
    assert step[schema.RUN_ID] == "run-7f3a"
    kernel = next(span for span in spans if span.name == "rope").attributes or {}
    assert (kernel[schema.KERNEL_SHAPE], kernel[schema.WORK_FLOPS], kernel[schema.CLOCK]) == (
        "512x64x64",
        4_194_304,
        "gpu",
    )
    assert build.resource.attributes[schema.GPU_ADAPTER] == "llvmpipe"
    assert build.resource.attributes[schema.SERVICE_NAME] == "entrenar-gpu"


def test_names_in_the_schema_follow_opentelemetry() -> None:
    names = set(schema.ATTRIBUTES)
    for name in names:
        assert name == name.lower()
        assert not any(other.startswith(name + ".") for other in names), f"{name} is also a namespace"


def test_a_skipped_step_keeps_its_numbers() -> None:
    attributes = builder().step(skipped_step(1))[0].attributes or {}
    assert attributes[schema.SKIPPED] is True
    assert math.isnan(float(str(attributes[schema.LOSS])))
    assert attributes[schema.GRAD_NORM] == math.inf


@pytest.mark.parametrize("before", [True, False], ids=["before its step", "after its step"])
def test_a_checkpoint_record_becomes_a_phase_of_its_step(before: bool) -> None:
    build = builder()
    spans = build.checkpoint(checkpoint_record(1)) if before else []
    spans += build.step(step_record(1))
    spans += [] if before else build.checkpoint(checkpoint_record(1))
    paths = path_names(spans, build.train)
    assert paths.count(("step", "checkpoint")) == 1
    attributes = spans[paths.index(("step", "checkpoint"))].attributes or {}
    assert (attributes[schema.CHECKPOINT_BYTES], attributes[schema.STEP_NUMBER]) == (12345, 1)


def test_a_phase_that_has_a_record_too_is_one_span() -> None:
    record = step_record(1, spans=(Span("eval", "phase", START_NS + 5, START_NS + 9),))
    build = builder()
    assert build.evaluation(eval_record(1)) == []
    first = build.step(record)
    assert [span.name for span in first] == ["step", "eval"]
    assert (first[1].attributes or {})[schema.EVAL_LOSS] == 1.5
    build = builder()
    assert [span.name for span in build.step(record)] == ["step", "eval"]
    assert build.evaluation(eval_record(1)) == []


def test_an_evaluation_before_the_first_step_hangs_on_the_run() -> None:
    build = builder()
    assert path_names(build.evaluation(eval_record(0)), build.train) == [("eval",)]


def test_samples_are_spans_of_their_own_without_their_texts() -> None:
    build = builder()
    spans = [*build.samples(sample_record(0)), *build.step(step_record(1)), *build.samples(sample_record(1))]
    paths = path_names(spans, build.train)
    assert (paths[0], paths[-1]) == (("sample",), ("step", "sample"))
    after = spans[-1]
    assert dict(after.attributes or {}) == {
        schema.SPAN_LEVEL: "phase",
        schema.STEP_NUMBER: 1,
        schema.SAMPLE_PROMPTS: 2,
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("plain", "plain"),
        ("a\udcffb", "a?b"),
        (2**63, float(2**63)),
        (True, True),
        ((512, 64), "(512, 64)"),
        (None, "None"),
    ],
)
def test_values_that_otlp_cannot_carry_are_made_so_that_it_can(given: Any, expected: Any) -> None:
    assert clean(given) == expected
    assert type(clean(given)) is type(expected)


def run(tmp_path: Path, steps: int = 2, **options: Any) -> list[dict[str, Any]]:
    """Trace a run of `steps` steps; the spans of its file."""
    observer = observe(tmp_path, **options)
    observer.run_started(run_info())
    for step in range(1, steps + 1):
        observer.step_finished(step_record(step))
    observer.run_finished(run_summary(steps))
    return file_spans(tmp_path / schema.TRACE_FILE)


def file_spans(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        span
        for line in lines
        for resource_spans in line["resourceSpans"]
        for scope_spans in resource_spans["scopeSpans"]
        for span in scope_spans["spans"]
    ]


def test_a_run_is_one_trace_with_one_root_and_every_step(tmp_path: Path) -> None:
    spans = run(tmp_path, steps=25)
    assert len({span["traceId"] for span in spans}) == 1
    assert [span["name"] for span in spans if "parentSpanId" not in span] == ["train"]
    assert spans[-1]["name"] == "train"
    steps = [span for span in spans if span["name"] == "step"]
    assert [int(step["startTimeUnixNano"]) for step in steps] == [START_NS + i * STEP_NS for i in range(25)]


def test_spans_are_children_of_the_span_that_the_caller_has_open(tmp_path: Path) -> None:
    around = trace.SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(around)):
        spans = run(tmp_path)
    train = spans[-1]
    assert (train["name"], train["parentSpanId"], train["flags"]) == ("train", f"{0xDEF:016x}", 0x300)
    assert {span["traceId"] for span in spans} == {f"{0xABC:032x}"}


@pytest.mark.parametrize("sampled", [True, False])
def test_a_callers_tracer_provider_gets_the_same_spans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(**({} if sampled else {"sampler": ALWAYS_OFF}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    spans = run(tmp_path)
    assert trace.get_tracer_provider() is provider
    assert len(spans) == 2 * 9 + 1
    told = {
        (span.context.span_id, span.parent and span.parent.span_id, span.name, span.start_time, span.end_time)
        for span in exporter.get_finished_spans()
        if span.context is not None
    }
    ours = {
        (
            int(span["spanId"], 16),
            int(span["parentSpanId"], 16) if "parentSpanId" in span else None,
            span["name"],
            int(span["startTimeUnixNano"]),
            int(span["endTimeUnixNano"]),
        )
        for span in spans
    }
    assert told == (ours if sampled else set())


def test_a_callers_provider_that_is_switched_off_costs_nothing_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Off(trace.TracerProvider):
        def get_tracer(self, *arguments: Any, **options: Any) -> trace.Tracer:
            return trace.NoOpTracer()

    monkeypatch.setattr(trace, "get_tracer_provider", Off)
    spans = run(tmp_path)
    assert len({span["spanId"] for span in spans}) == 2 * 9 + 1
    assert len({span["traceId"] for span in spans}) == 1


def test_processors_get_every_span_and_the_end(tmp_path: Path) -> None:
    class Collect(SpanProcessor):
        def __init__(self) -> None:
            self.names: list[str] = []

        def on_end(self, span: ReadableSpan) -> None:
            self.names.append(span.name)

        def shutdown(self) -> None:
            self.names.append("shutdown")

    collect = Collect()
    spans = run(tmp_path, processors=[collect])
    assert collect.names == [*(span["name"] for span in spans), "shutdown"]


def test_a_processor_that_fails_stops_neither_the_run_nor_the_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            raise RuntimeError("detector broke")

    assert len(run(tmp_path, processors=[Fails()])) == 2 * 9 + 1
    assert "detector broke" in caplog.text


def test_a_run_that_ends_without_a_word_is_closed_as_interrupted(tmp_path: Path) -> None:
    observer = observe(tmp_path)
    observer.run_started(run_info())
    observer.step_finished(step_record(1))
    observer.close()
    train = file_spans(tmp_path / schema.TRACE_FILE)[-1]
    assert train["status"] == {"code": 2, "message": "interrupted"}
    assert train["endTimeUnixNano"] == str(START_NS + STEP_NS)


def test_logs_carry_the_ids_of_the_step_being_computed(tmp_path: Path) -> None:
    observer = observe(tmp_path)
    record = logging.LogRecord("trainer", logging.INFO, "", 0, "hello", None, None)
    assert TraceIdFilter(observer).filter(record)
    assert (record.trace_id, record.span_id) == ("0" * 32, "0" * 16)  # type: ignore[attr-defined]
    observer.run_started(run_info())
    ids = []
    for step in (1, 2):
        TraceIdFilter(observer).filter(record)
        ids.append((record.trace_id, record.span_id))  # type: ignore[attr-defined]
        observer.step_finished(step_record(step))
    observer.run_finished(run_summary(2))
    steps = [span for span in file_spans(tmp_path / schema.TRACE_FILE) if span["name"] == "step"]
    assert ids == [(span["traceId"], span["spanId"]) for span in steps]
    assert len(set(ids)) == 2


def test_otel_sdk_disabled_stops_export_and_not_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    observer = observe(tmp_path, otlp="http://127.0.0.1:9")
    observer.run_started(run_info())
    observer.step_finished(step_record(1))
    observer.run_finished(run_summary(1))
    summary = observer.close()
    assert (tmp_path / schema.TRACE_FILE).exists()
    assert summary.written > 0
    assert summary.sent == summary.dropped == 0


def test_a_flush_has_what_was_told_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(fd) or real(fd))  # type: ignore[func-returns-value]
    observer = observe(tmp_path)
    observer.run_started(run_info())
    observer.step_finished(step_record(1))
    observer.flush()
    assert file_spans(tmp_path / schema.TRACE_FILE)[0]["name"] == "step"
    assert synced
    observer.close()
    observer.flush()  # after the end there is nothing to write


def test_what_is_not_finite_stays_out_of_exported_spans_and_is_counted(tmp_path: Path) -> None:
    span = builder().step(skipped_step(3))[0]
    sent = exported(span)
    assert math.isnan((span.attributes or {})[schema.LOSS])
    assert schema.LOSS not in (sent.attributes or {})
    assert (sent.attributes or {})[schema.NON_FINITE] == 2
    assert sent.context == span.context
    fine = builder().step(step_record(3))[0]
    assert exported(fine) is fine


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@host:4318",
        "http://user:hunter2/@host:4318",
        "http://host:4318/?token=hunter2",
        "ftp://host/?token=hunter2",
        "http://host:4318/?hunter2",
        "ftp://host/?hunter2",
        "http://host:4318/#hunter2",
        "http://host:4318/?mail@hunter2",
        "http://user:hunter2?x@host",
    ],
)
def test_credentials_of_an_address_are_told_to_nobody(url: str, tmp_path: Path) -> None:
    try:
        told = str(otlp_settings.target("traces", url).name)  # type: ignore[union-attr]
    except TraceError as error:
        told = str(error)
    assert "hunter2" not in told
    builder_ = SpanBuilder(run_info(config={"otlp": url}), "step", None, OwnSpans())
    assert "hunter2" not in str(builder_.finish(run_summary(1))[-1].attributes)


@pytest.mark.parametrize("url", ["ftp://user:hunter2'x@host", "ftp://user:hunter2 x@host", "user:hunter2@host:4318"])
def test_an_address_that_is_refused_shows_no_password(url: str) -> None:
    with pytest.raises(TraceError) as caught:
        otlp_settings.target("traces", url)
    assert "hunter2" not in str(caught.value)


def test_what_libraries_say_of_an_address_shows_no_query() -> None:
    said = "host='host', port=4318: Max retries exceeded with url: /v1/traces?{} (Caused by a refusal)"
    for query in ("hunter2", "token=hunter2", "a=1&hunter2"):
        assert otlp_settings.without_secrets(said.format(query)) == said.format("...")


def test_a_token_in_the_query_reaches_the_collector() -> None:
    to = otlp_settings.target("metrics", "http://host:4318/?token=hunter2")
    assert to is not None
    assert to.endpoint == "http://host:4318/v1/metrics?token=hunter2"


@pytest.mark.parametrize("value", ["zipkin", "otlp,console"])
def test_an_exporter_that_there_is_not_is_told_at_once(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", value)
    with pytest.raises(TraceError, match="OTEL_TRACES_EXPORTER: expected otlp or none"):
        observe(tmp_path)


def test_service_name_and_resource_attributes_of_the_environment_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "nightly")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=speech,service.version=9")
    run(tmp_path)
    line = json.loads((tmp_path / schema.TRACE_FILE).read_text().splitlines()[0])
    pairs = line["resourceSpans"][0]["resource"]["attributes"]
    resource = {pair["key"]: pair["value"]["stringValue"] for pair in pairs if "stringValue" in pair["value"]}
    assert (resource["service.name"], resource["team"], resource["service.version"]) == ("nightly", "speech", "9")
    assert resource[schema.RUN_ID] == "run-7f3a"


def test_an_unknown_level_is_one_line() -> None:
    with pytest.raises(TraceError, match="--trace-level: expected step, phase, layer, kernel, not 'all'"):
        observe("runs/x", level="all")


def test_importing_the_package_imports_neither_opentelemetry_nor_the_trainer() -> None:
    code = (
        "import sys, observability; print([m for m in sys.modules if m.split('.')[0] in ('opentelemetry', 'sklearn')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    listed = "[m for m in sys.modules if m.startswith('entrenar') or m == 'grpc']"
    code = f"import sys, observability.write.observer; print({listed})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
