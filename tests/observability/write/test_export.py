"""Spans and metrics to a file and to real OTLP receivers, and what a collector that is dead, slow or unwell costs."""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from entrenar_gpu.cli import main
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.events import notify
from observability import observe, schema
from observability.errors import TraceError
from observability.read.trace_reader import read_trace
from observability.write import metrics
from observability.write.export import Sender, TraceFile, encode_line, line_head
from observability.write.observer import TraceObserver
from observability.write.otlp_settings import target
from observability.write.tracing import OwnSpans, SpanBuilder
from tests.helpers.otlp_server import Received, grpc_receiver, http_receiver, values
from tests.helpers.step_records import (
    KERNELS,
    START_NS,
    STEP_NS,
    checkpoint_record,
    eval_record,
    run_info,
    run_summary,
    skipped_step,
    step_record,
)

Receiver = Callable[..., AbstractContextManager[Received]]
RECEIVERS = pytest.mark.parametrize("receiver", [http_receiver, grpc_receiver], ids=["http", "grpc"])


@pytest.fixture(autouse=True)
def no_otel_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run(output: Path, steps: int, **options: Any) -> TraceObserver:
    observer = observe(output, **options)
    observer.run_started(run_info())
    for step in range(1, steps + 1):
        observer.step_finished(step_record(step, kernels=KERNELS))
    observer.run_finished(run_summary(steps))
    return observer


def run_spans(level: schema.Level = "kernel") -> tuple[list[ReadableSpan], str]:
    """Spans of every kind and value, with the head of their lines."""
    around = OwnSpans().begin("caller", 0, None)
    build = SpanBuilder(run_info(model='a"b\\c\n\u2028é'), level, around, OwnSpans())
    spans = [*build.step(step_record(1, kernels=KERNELS)), *build.step(skipped_step(2))]
    spans += [*build.checkpoint(checkpoint_record(2)), *build.evaluation(eval_record(2))]
    spans += build.finish(run_summary(2, "failed: a reason"))
    return spans, line_head(build.resource, schema.SCOPE_NAME, "0.1.0")


def test_a_line_of_the_file_says_what_the_sdk_would_send() -> None:
    """Through protobuf's own JSON parser; OTLP/JSON departs from it in ids alone, which are hex and not base64."""
    spans, head = run_spans()
    line = encode_line(spans, head)
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    tree = json.loads(line)
    for span in tree["resourceSpans"][0]["scopeSpans"][0]["spans"]:
        for key in {"traceId", "spanId", "parentSpanId"} & span.keys():
            assert span[key] == span[key].lower()
            span[key] = base64.b64encode(bytes.fromhex(span[key])).decode()
    ours = json_format.ParseDict(tree, TracesData())
    theirs = TracesData.FromString(encode_spans(spans).SerializeToString())
    assert repr(ours) == repr(theirs)  # by text, as NaN is not equal to itself


def test_integers_are_strings_and_enums_are_numbers_in_the_file() -> None:
    spans, head = run_spans()
    tree = json.loads(encode_line(spans, head))
    encoded = tree["resourceSpans"][0]["scopeSpans"][0]["spans"]
    step = {pair["key"]: pair["value"] for pair in encoded[0]["attributes"]}
    assert step[schema.TOKENS] == {"intValue": "1000"}
    assert (encoded[0]["kind"], encoded[-1]["status"]["code"]) == (1, 2)
    assert isinstance(encoded[0]["startTimeUnixNano"], str)
    skipped = next(span for span in encoded[1:] if span["name"] == "step")
    numbers = {pair["key"]: pair["value"] for pair in skipped["attributes"]}
    assert numbers[schema.LOSS] == {"doubleValue": "NaN"}
    assert numbers[schema.GRAD_NORM] == {"doubleValue": "Infinity"}


def test_what_a_crash_left_of_a_line_is_cut_before_a_resumed_run_appends(tmp_path: Path) -> None:
    path = tmp_path / schema.TRACE_FILE
    run(tmp_path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"resourceSpans":[' + b"x" * 200_000)
    run(tmp_path, 2)
    content = path.read_bytes()
    assert content.startswith(whole)
    traces = {
        json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["traceId"] for line in content.splitlines()
    }
    assert len(traces) == 2


def test_a_killed_run_leaves_whole_lines_but_for_its_last(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from observability import observe\n"
        "from tests.helpers.step_records import *\n"
        "observer = observe(sys.argv[1])\n"
        "observer.run_started(run_info())\n"
        "for step in range(1, 1_000_000):\n"
        "    observer.step_finished(step_record(step, layers=36))\n"
        "    time.sleep(0.001)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    path = tmp_path / schema.TRACE_FILE
    deadline = time.monotonic() + 30
    while not (path.exists() and path.stat().st_size > 1_000_000):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    *lines, rest = path.read_bytes().split(b"\n")  # Linux may stop a write of several pages at any of them
    for line in lines:
        json.loads(line)
    assert len(lines) > 10
    assert len(read_trace(path)) >= 77 * len(lines)
    run(tmp_path, 1)
    appended = path.read_bytes().split(b"\n")
    assert appended[: len(lines)] == lines
    assert rest == b"" or appended[len(lines)] != rest
    for line in appended[:-1]:
        json.loads(line)


def test_a_full_disk_loses_spans_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spans, head = run_spans()
    file = TraceFile(tmp_path / schema.TRACE_FILE, head)
    file.write(spans)

    class Full:
        def __init__(self, real: Any) -> None:
            self.real = real

        def write(self, line: bytes) -> int:
            return int(self.real.write(line[: len(line) // 2]))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    file._file = Full(file._file)  # type: ignore[assignment]
    file.write(spans)
    file.write(spans)
    assert (file.written, file.lost) == (len(spans), 2 * len(spans))
    assert file.path.read_bytes().count(b"\n") == 1
    assert file.path.read_bytes().endswith(b"\n")
    assert caplog.text.count("training goes on") == 1


@RECEIVERS
@pytest.mark.parametrize("level", schema.LEVELS)
def test_a_receiver_gets_what_the_file_holds(tmp_path: Path, receiver: Receiver, level: schema.Level) -> None:
    with receiver() as received:
        summary = run(tmp_path, 20, level=level, otlp=received.url).close()
        sent = {
            (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.name,
             span.start_time_unix_nano, span.end_time_unix_nano, len(span.attributes))
            for span in received.spans
        }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / schema.TRACE_FILE).read_text().splitlines()]
    held = {
        (span["traceId"], span["spanId"], span.get("parentSpanId", ""), span["name"],
         int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"]), len(span["attributes"]))
        for line in lines
        for span in line["resourceSpans"][0]["scopeSpans"][0]["spans"]
    }  # fmt: skip
    assert sent == held
    assert len(held) == len(received.spans) == summary.sent == summary.written
    assert (summary.dropped, summary.lost) == (0, 0)
    steps = sorted(values(span.attributes)[schema.STEP_NUMBER] for span in received.spans if span.name == "step")
    assert steps == list(range(1, 21))
    assert received.resources[0][schema.RUN_ID] == "run-7f3a"


@RECEIVERS
def test_metrics_arrive_with_their_names_units_and_values(tmp_path: Path, receiver: Receiver) -> None:
    with receiver() as received:
        observer = observe(tmp_path, otlp=received.url)
        observer.run_started(run_info())
        for record in (step_record(1), step_record(2), skipped_step(3)):
            observer.step_finished(record)
        observer.eval_finished(eval_record(3))
        observer.anomaly("data-stall", "high")
        observer.run_finished(run_summary(3))
    assert set(received.metrics) == {metric.name for metric in metrics.METRICS}
    for metric in metrics.METRICS:
        assert received.metrics[metric.name].unit == metric.unit
    duration = received.metrics[metrics.STEP_DURATION.name].histogram.data_points[0]
    assert (duration.count, tuple(duration.explicit_bounds)) == (3, metrics.STEP_SECONDS_BOUNDS)
    assert math.isclose(duration.sum, 0.6)
    assert received.metrics[metrics.LOSS.name].gauge.data_points[0].as_double == 1.25  # of the last step not skipped
    assert received.metrics[metrics.TOKENS.name].sum.data_points[0].as_int == 3000
    assert received.metrics[metrics.SKIPPED_STEPS.name].sum.data_points[0].as_int == 1
    anomaly = received.metrics[metrics.ANOMALIES.name].sum.data_points[0]
    assert (anomaly.as_int, values(anomaly.attributes)) == (1, {"cause": "data-stall", "severity": "high"})


def test_anomalies_found_at_the_end_of_the_run_reach_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr("opentelemetry.metrics.get_meter_provider", lambda: provider)
    config = TrainConfig(model="m", data="d", output=str(tmp_path), trace_level="step")
    said: list[str] = []
    _, observers = main._tracing(config, SimpleNamespace(say=lambda line, style: said.append(line)))
    notify(observers, "run_started", run_info())
    noise = np.random.default_rng(0).normal(1, 0.01, 190)
    for step in range(1, 191):
        taken = round(STEP_NS * noise[step - 1] * (1.6 if step > 120 else 1))
        notify(observers, "step_finished", step_record(step, end_ns=START_NS + (step - 1) * STEP_NS + taken, spans=()))
    notify(observers, "run_finished", run_summary(190))
    assert any("for 70 steps" in line for line in said)
    data = reader.get_metrics_data()
    assert data is not None
    told = [
        point.attributes["cause"]
        for metric in data.resource_metrics[0].scope_metrics[0].metrics
        if metric.name == metrics.ANOMALIES.name
        for point in metric.data.data_points
    ]
    assert "throttle" in told


@RECEIVERS
def test_standard_variables_choose_the_collector(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiver() as received:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url.replace("grpc:", "http:"))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=speech")
        if receiver is grpc_receiver:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        assert run(tmp_path, 3).close().sent == len(received.spans) > 0
    assert received.headers[0]["x-team"] == "speech"
    assert received.metrics


def test_variables_of_a_signal_win_over_the_general_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with http_receiver() as general, http_receiver() as traces:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", general.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", traces.url + "/v1/traces")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        run(tmp_path, 3)
    assert traces.spans
    assert not general.spans
    assert general.metrics
    assert traces.headers[0]["content-encoding"] == "gzip"


def test_nothing_is_sent_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert target("traces", None) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert target("traces", None) is None
    assert target("metrics", None) is not None
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    assert target("traces", None) is not None


def test_a_signal_can_be_sent_alone_and_over_its_own_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://localhost:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
    traces = target("traces", None)
    assert traces is not None
    assert traces.protocol == "grpc"
    assert target("metrics", None) is None


@pytest.mark.parametrize(
    ("url", "protocol", "endpoint"),
    [
        ("http://host:4318", "http", "http://host:4318/v1/traces"),
        ("http://host:4318/", "http", "http://host:4318/v1/traces"),
        ("http://host:4318/v1/traces", "http", "http://host:4318/v1/traces"),
        ("https://host/otlp", "http", "https://host/otlp/v1/traces"),
        ("grpc://host:4317", "grpc", "http://host:4317"),
        ("grpcs://host:4317", "grpc", "https://host:4317"),
    ],
)
def test_the_flag_names_protocol_and_address(url: str, protocol: str, endpoint: str) -> None:
    to = target("traces", url)
    assert to is not None
    assert (to.protocol, to.endpoint) == (protocol, endpoint)


@pytest.mark.parametrize("url", ["localhost:4318", "ftp://host", "http://", "http://host:port", "http://[::1", ""])
def test_an_unusable_address_is_one_line_before_the_run(tmp_path: Path, url: str) -> None:
    with pytest.raises(TraceError, match=r"^--otlp: [^\n]*$"):
        observe(tmp_path, otlp=url)


@pytest.mark.parametrize("address", ["collector:4318", "nonsense", "ftp://collector"])
def test_an_address_in_the_environment_that_is_none_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    with pytest.raises(TraceError, match=f"OTEL_EXPORTER_OTLP_ENDPOINT: expected http://HOST:4318 .* not '{address}'"):
        target("traces", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")  # whose addresses need no scheme
    assert target("traces", None) is not None


@pytest.mark.parametrize("address", ["me:hunter2@collector:4318", "collector?token=hunter2", "collector#hunter2"])
def test_what_may_be_a_password_in_it_is_not(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    with pytest.raises(TraceError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT: [^\n]*, not '\.\.\.'$"):
        target("traces", None)


def test_an_unknown_protocol_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(
        TraceError, match="OTEL_EXPORTER_OTLP_PROTOCOL: expected http/protobuf or grpc, not 'http/json'"
    ):
        target("traces", "http://localhost:4318")


def timed_steps(observer: TraceObserver, count: int) -> float:
    """Seconds that the training thread spends on handing over `count` step records."""
    records = [step_record(step) for step in range(1, count + 1)]
    start = time.perf_counter()
    for record in records:
        observer.step_finished(record)
    return time.perf_counter() - start


@RECEIVERS
def test_a_slow_collector_does_not_hold_up_training(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9,000 spans in batches of 512 keep a server that takes 1 s a batch busy for 18 s."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with receiver(delay=1.0) as received:
        observer = observe(tmp_path, otlp=received.url, flush_seconds=0.5)
        observer.run_started(run_info())
        assert timed_steps(observer, 1000) < 8.0
        start = time.perf_counter()
        observer.run_finished(run_summary(1000))
        assert time.perf_counter() - start < 8.0
    summary = observer.close()
    assert summary.written == 9001
    assert summary.dropped > 0
    assert summary.sent + summary.dropped == 9001


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_dead_collector_costs_spans_and_no_time(
    tmp_path: Path, closed_port: int, scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    observer = observe(tmp_path, otlp=f"{scheme}://127.0.0.1:{closed_port}", flush_seconds=0.5)
    observer.run_started(run_info())
    with caplog.at_level(logging.WARNING):
        assert timed_steps(observer, 1000) < 8.0
        start = time.perf_counter()
        observer.run_finished(run_summary(1000))
        assert time.perf_counter() - start < 8.0
    summary = observer.close()
    assert (summary.written, summary.sent, summary.dropped) == (9001, 0, 9001)
    said = [record.getMessage() for record in caplog.records if record.name == "observability.write.observer"]
    assert said == ["trace: 9001 spans written, 0 sent to the collector, 9001 dropped as it was down or slow"]


@RECEIVERS
def test_a_collector_that_recovers_gets_everything(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with receiver(failures=1) as received:
        observer = observe(tmp_path, otlp=received.url, flush_seconds=30)
        observer.run_started(run_info())
        timed_steps(observer, 20)
        observer.run_finished(run_summary(20))
    summary = observer.close()
    assert received.requests > 1
    assert (summary.sent, summary.dropped) == (20 * 9 + 1, 0)
    assert len(received.spans) == summary.sent


def test_a_tracing_thread_that_falls_behind_loses_steps_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that hangs: records wait up to the bound, the rest is counted."""
    monkeypatch.setattr("observability.write.observer._BACKLOG_SPANS", 90)
    go_on = threading.Event()

    class Hangs(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            go_on.wait()

    observer = observe(tmp_path, processors=[Hangs()])
    observer.run_started(run_info())
    timed_steps(observer, 100)
    go_on.set()
    observer.run_finished(run_summary(100))
    summary = observer.close()
    assert summary.written + summary.lost == 100 * 9 + 1
    assert summary.lost >= 900 - 2 * 99
    last = (tmp_path / schema.TRACE_FILE).read_text().splitlines()[-1]
    assert json.loads(last)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["name"] == "train"


class Held(SpanExporter):
    """An exporter that takes no batch before it is released."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.names: list[str] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.released.wait()
        self.names += [span.name for span in spans]
        return SpanExportResult.SUCCESS


def test_the_queue_keeps_its_bound_and_counts_what_it_refuses() -> None:
    spans, _ = run_spans()
    exporter = Held()
    sender = Sender(exporter, "test", limit=100, batch=10, period_seconds=0.001)
    offered = 0
    while sender.dropped < 1000:
        sender.put(spans)
        offered += len(spans)
        assert len(sender._queue) <= 100
    exporter.released.set()
    sender.close(10.0)
    # What came through is what was queued, and the one batch that was being exported when the queue filled up.
    assert sender.sent == len(exporter.names) == offered - sender.dropped
    assert 100 <= sender.sent <= 110


def test_an_exporter_that_raises_does_not_end_the_sender() -> None:
    class Fails(Held):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            if not self.names:
                self.names.append("raised")
                raise ValueError("cannot encode")
            return super().export(spans)

    exporter = Fails()
    exporter.released.set()
    spans, _ = run_spans()
    sender = Sender(exporter, "test", limit=10_000, batch=len(spans), period_seconds=0.001)
    sender.put(spans)
    sender.put(spans)
    sender.close(10.0)
    assert (sender.sent, sender.dropped) == (len(spans), len(spans))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many", "OTEL_BSP_MAX_QUEUE_SIZE: expected a positive whole number, not 'many'"),
        ("OTEL_BSP_SCHEDULE_DELAY", "many", "OTEL_BSP_SCHEDULE_DELAY: expected a positive whole number, not 'many'"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0", "OTEL_METRIC_EXPORT_INTERVAL: expected a positive whole number, not '0'"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s", r"OTEL_EXPORTER_OTLP_\*: .*'10s'"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", r"OTEL_EXPORTER_OTLP_\*: .*zstd.*"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "mail", "OTEL_EXPORTER_OTLP_PROTOCOL: expected .* not 'mail'"),
    ],
)
def test_a_bad_variable_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv(name, value)
    threads = threading.active_count()
    with pytest.raises(TraceError, match=f"^{message}$"):
        observe(tmp_path / "run").run_started(run_info())
    assert not (tmp_path / "run").exists()
    _await(lambda: threading.active_count() <= threads)


def test_a_trace_that_cannot_be_written_is_one_line_and_leaves_no_thread(tmp_path: Path, closed_port: int) -> None:
    (tmp_path / schema.TRACE_FILE).mkdir()
    threads = threading.active_count()
    observer = observe(tmp_path, otlp=f"http://127.0.0.1:{closed_port}")
    with pytest.raises(TraceError, match=r"trace\.jsonl: cannot be written: Is a directory$"):
        observer.run_started(run_info())
    _await(lambda: threading.active_count() <= threads)


def _await(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)
