"""Reading traces: the format, what is broken or foreign in it, and Jaeger's HTTP API."""

from __future__ import annotations

import gzip
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from observability import schema
from observability.errors import TraceError
from observability.read import jaeger_reader
from observability.read.step_table import StepTable, step_table
from observability.read.trace_reader import newest_run, read_trace
from observability.report.command import main
from tests.helpers import made_traces as made


def spans_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = line["resourceSpans"][0]["scopeSpans"][0]["spans"]
    return spans


def as_lines(lines: list[dict[str, Any]]) -> bytes:
    """The run folder's trace file."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def as_jaeger(lines: list[dict[str, Any]]) -> bytes:
    """What Jaeger's API answers for spans that came in as OTLP."""
    kinds = {"stringValue": "string", "intValue": "int64", "doubleValue": "float64", "boolValue": "bool"}

    def tags(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"key": pair["key"], "type": kinds[kind], "value": value}
            for pair in pairs
            for kind, value in pair["value"].items()
        ]

    spans, processes = [], dict[str, Any]()
    for line in lines:
        resource = line["resourceSpans"][0]["resource"]["attributes"]
        process = f"p{sum(map(ord, json.dumps(resource)))}"
        processes[process] = {"serviceName": "entrenar-gpu", "tags": tags(resource)}
        for span in spans_of(line):
            start, end = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
            parent = span.get("parentSpanId")
            reference = {"refType": "CHILD_OF", "traceID": span["traceId"], "spanID": parent}
            spans.append(
                {
                    "traceID": span["traceId"],
                    "spanID": span["spanId"],
                    "operationName": span["name"],
                    "references": [reference] if parent else [],
                    "startTime": start // 1000,
                    "duration": (end - start) // 1000,
                    "tags": tags(span["attributes"]),
                    "processID": process,
                }
            )
    return json.dumps({"data": [{"traceID": "t", "spans": spans, "processes": processes}]}).encode()


def steps_of(path: Path | str) -> StepTable:
    return step_table(read_trace(path), str(path))


def test_columns_hold_what_the_spans_say(tmp_path: Path) -> None:
    steps = made.plain_steps(12)
    table = steps_of(made.write(tmp_path / "t.jsonl", steps))
    assert table.step.tolist() == list(range(1, 13))
    np.testing.assert_allclose(table.seconds, [sum(s.phases.values()) / 1e3 for s in steps], atol=1e-6)
    data = table.column("phase", "data")
    assert data is not None
    np.testing.assert_allclose(data, [s.phases["data"] / 1e3 for s in steps], atol=1e-6)
    labels = [kind.label for kind in table.kinds]
    assert "layer 1 (forward)" in labels
    assert "layer 1 (backward)" in labels
    layer = table.durations[:, labels.index("layer 1 (backward)")]
    np.testing.assert_allclose(layer, [s.layers["backward 1"] / 1e3 for s in steps], atol=1e-6)
    assert table.values["tokens"].tolist() == [1900] * 12
    assert table.facts[schema.RUN_MODEL] == "tiny-qwen3"
    assert table.notes == ()


def test_kernels_are_kinds_by_name_and_shape(tmp_path: Path) -> None:
    steps = made.plain_steps(3)
    for step in steps:
        step.kernels = 2
    labels = [kind.label for kind in steps_of(made.write(tmp_path / "t.jsonl", steps)).kinds]
    assert "matmul 0 512x64x64" in labels


@pytest.mark.parametrize("inside", [True, False])
def test_checkpoint_counts_apart_inside_its_step_or_beside_it(tmp_path: Path, inside: bool) -> None:
    steps = made.plain_steps(5)
    if inside:
        steps[2].phases["checkpoint"] = 290.0
    else:
        steps[2].checkpoint_beside = 290.0
    table = steps_of(made.write(tmp_path / "t.jsonl", steps))
    assert [(p.name, p.step, round(p.seconds, 6)) for p in table.pauses] == [("checkpoint", 3, 0.29)]
    assert table.seconds[2] < 0.12
    assert table.wall_seconds[2] == pytest.approx(table.seconds[2] + 0.29)


def test_truncated_last_line_costs_that_line_alone(tmp_path: Path) -> None:
    path = made.write(tmp_path / "t.jsonl", made.plain_steps(10))
    text = path.read_text()
    path.write_text(text[: len(text) - 400])
    table = steps_of(path)
    assert len(table) == 9
    assert "1 last line cut short" in table.notes


def test_packed_files_are_read_and_broken_ones_as_far_as_they_go(tmp_path: Path) -> None:
    plain = made.write(tmp_path / "t.jsonl", made.plain_steps(300)).read_bytes()
    packed = tmp_path / "t.jsonl.gz"
    packed.write_bytes(gzip.compress(plain))
    assert len(steps_of(packed)) == 300
    packed.write_bytes(gzip.compress(plain)[:-2000])
    table = steps_of(packed)
    assert 0 < len(table) < 300
    assert "1 end of the compressed file cut short or broken" in table.notes
    packed.write_bytes(b"\x1f\x8b nonsense")
    assert main([str(packed)]) == 2


def test_one_object_over_many_lines(tmp_path: Path) -> None:
    lines = list(made.lines(made.plain_steps(5), "r"))
    path = tmp_path / "t.json"
    spans = [span for line in lines for span in spans_of(line)]
    for value in (lines, made.request(spans, {schema.RUN_ID: "r"})):
        for indent in (None, 1):
            path.write_text(json.dumps(value, indent=indent))
            assert len(steps_of(path)) == 5


def test_numbers_beyond_all_sense_are_none(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    steps = made.plain_steps(40)
    for step in steps:
        step.attributes[schema.LOSS] = 1e308
    path = made.write(tmp_path / "t.jsonl", steps)
    assert main([str(path), "--html", str(tmp_path / "r.html")]) == 0
    path.write_text(re.sub(r'"endTimeUnixNano": "\d+"', f'"endTimeUnixNano": "{made.START_NS}"', path.read_text()))
    path.write_text(re.sub(r'"startTimeUnixNano": "\d+"', f'"startTimeUnixNano": "{made.START_NS}"', path.read_text()))
    assert main([str(path), "--html", str(tmp_path / "r.html")]) == 0
    assert not recwarn.list


def test_spans_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    broken = [
        made.span("forward", 20, 10, 900, 1, "run-1"),
        made.span("forward", 10**9, 2 * 10**9, 901, 999999, "run-1"),
        {"name": "no times"},
        made.span("data", made.START_NS, made.START_NS + 1, 902, 999999, "run-1", STEP_NUMBER=77),
        "not a span",
    ]
    tail = json.dumps(made.request(broken, {schema.RUN_ID: "run-1"})) + "\nnot json\n[]\n" + '{"resourceLogs": []}\n'  # type: ignore[arg-type]
    table = steps_of(made.write(tmp_path / "t.jsonl", made.plain_steps(10), tail=tail))
    assert len(table) == 10
    for note in (
        "1 spans that end before they start",
        "1 spans without a parent or step number",
        "1 spans without usable times",
        "1 spans whose step is not in the trace",
        "1 malformed spans",
        "1 lines that are not JSON",
        "2 lines without spans",
    ):
        assert note in table.notes


def test_clock_that_goes_backwards_is_said_and_survived(tmp_path: Path) -> None:
    lines = list(made.lines(made.plain_steps(10), "run-1"))
    for spans in lines[5]["resourceSpans"][0]["scopeSpans"]:
        for span in spans["spans"]:
            for key in ("startTimeUnixNano", "endTimeUnixNano"):
                span[key] = str(int(span[key]) - 3600 * 10**9)
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = steps_of(path)
    assert len(table) == 10
    assert table.seconds.max() < 0.2
    assert any("clock went backwards" in note for note in table.notes)


def test_the_newest_of_several_runs_is_taken(tmp_path: Path) -> None:
    path = made.write(tmp_path / "t.jsonl", made.plain_steps(10), run="first")
    second = made.write(tmp_path / "u.jsonl", made.plain_steps(4), run="second").read_text()
    shift = str(made.START_NS)[:6], str(made.START_NS + 10**15)[:6]
    path.write_text(path.read_text() + second.replace(*shift))
    table = steps_of(path)
    assert len(table) == 4
    assert any("1 earlier run(s)" in note for note in table.notes)


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("written", [as_lines, as_jaeger])
def test_facts_are_those_of_the_newest_run(tmp_path: Path, newest_first: bool, written: Callable[..., bytes]) -> None:
    steps = made.plain_steps(4)
    old = made.lines(steps, "old", start=made.START_NS - 3600 * 10**9, of_run={schema.RUN_MODEL: "an earlier model"})
    lines = [*made.lines(steps, "new"), *old] if newest_first else [*old, *made.lines(steps, "new")]
    path = tmp_path / "t.jsonl"
    path.write_bytes(written(lines))
    facts = steps_of(path).facts
    assert (facts[schema.RUN_ID], facts[schema.RUN_MODEL]) == ("new", "tiny-qwen3")


@pytest.mark.parametrize("written", [as_lines, as_jaeger])
def test_spans_of_a_callers_provider_have_their_run_from_their_step(
    tmp_path: Path, written: Callable[..., bytes]
) -> None:
    lines = list(made.lines(made.plain_steps(4), "r"))
    for line in lines:
        line["resourceSpans"][0]["resource"]["attributes"] = made.pairs({schema.SERVICE_NAME: "nightly"})
    path = tmp_path / "t.jsonl"
    path.write_bytes(written(lines))
    assert {kind.level for kind in steps_of(path).kinds} == {"phase", "layer"}


def _parts(folder: Path, *parts: tuple[str, str, list[made.Step]]) -> Path:
    """A trace of runs one after the other: (run, the run that it goes on from, its steps)."""
    path = folder / "t.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for hour, (run, resumes, steps) in enumerate(parts):
            for line in made.lines(steps, run, resumes, made.START_NS + hour * 3600 * 10**9):
                stream.write(json.dumps(line) + "\n")
    return path


def test_a_resumed_run_is_read_from_its_beginning(tmp_path: Path) -> None:
    steps, again = made.plain_steps(30), made.plain_steps(30, seed=1)
    parts = ("a", "", steps[:14]), ("b", "a", again[10:20]), ("c", "b", steps[20:])
    table = steps_of(_parts(tmp_path, *parts))
    assert table.step.tolist() == list(range(1, 31))
    assert table.restarts == (10, 20)
    assert table.notes == ("resumed at step 11, 21",)
    loss = [step.attributes[schema.LOSS] for step in (*steps[:10], *again[10:20], *steps[20:])]
    assert table.values["loss"].tolist() == loss  # of steps taken twice, the later
    assert np.count_nonzero(table.durations[:, 0]) == 30


def test_a_run_that_goes_on_from_nothing_in_the_trace_or_from_itself_stands_alone(tmp_path: Path) -> None:
    steps = made.plain_steps(30)
    for parts in (
        [("a", "", steps[:10]), ("b", "elsewhere", steps[10:])],
        [("a", "b", steps[:10]), ("b", "b", steps[10:])],
    ):
        table = steps_of(_parts(tmp_path, *parts))
        assert (table.step[0], len(table), table.restarts) == (11, 20, ())
        assert table.notes == ("1 earlier run(s) in the same trace (this is the newest)",)
    table = steps_of(_parts(tmp_path, ("a", "b", steps[5:15]), ("b", "a", steps[15:])))  # each from the other
    assert (table.step[0], len(table), table.restarts) == (6, 25, (10,))


def test_text_that_steers_a_terminal_does_not_get_through(tmp_path: Path) -> None:
    steps = made.plain_steps(3)
    steps[0].phases["evil\x1b[2J\u202e\ud800"] = 1.0
    labels = [kind.label for kind in steps_of(made.write(tmp_path / "t.jsonl", steps)).kinds]
    assert "evil\ufffd[2J\ufffd\ufffd" in labels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no spans in it"),
        (b"\x00\xff\xfe garbage\n", "1 lines that are not JSON"),
        (b'{"resourceSpans": [{"scopeSpans": [{"spans": [{}]}]}]}\n', "1 spans without usable times"),
        (b'{"resourceSpans": 7}\n', "1 lines without spans"),
        (b"[" * 100_000 + b"\n", "1 lines that are not JSON"),
        (b'{"resourceSpans": [{"resource": [], "scopeSpans": {"a": 1}}]}\n', "no spans in it"),
    ],
)
def test_files_without_spans_are_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_trace_of_another_program_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    span = made.span("GET /cart", made.START_NS, made.START_NS + 5, 1, 0, "x")
    line = made.request([span])
    line["resourceSpans"][0]["resource"]["attributes"] = made.pairs({"service.name": "web shop"})
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(TraceError, match=r"no training steps among its 1 spans: a trace of 'web shop'.*'GET /cart'"):
        steps_of(path)


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file or folder"):
        read_trace(tmp_path / "nowhere")
    with pytest.raises(TraceError, match=r"no trace\.jsonl in this folder"):
        read_trace(tmp_path)
    with pytest.raises(TraceError, match=r"no trace\.jsonl at or below it"):
        newest_run(tmp_path)


def test_whatever_an_error_quotes_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a\nb\x1b[2J", "x" * 5000):
        assert main([name]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.rstrip("\n").isprintable()
        assert len(error) < 700


class Jaeger(HTTPServer):
    """Serves one answer and keeps the paths asked for."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status, self.body, self.asked = status, body, list[str]()
        super().__init__(("127.0.0.1", 0), JaegerHandler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class JaegerHandler(BaseHTTPRequestHandler):
    server: Jaeger

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def jaeger() -> Iterator[Any]:
    servers: list[Jaeger] = []

    def start(status: int, body: bytes) -> Jaeger:
        servers.append(Jaeger(status, body))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_jaeger_gives_the_same_steps_as_the_file(tmp_path: Path, jaeger: Any) -> None:
    steps = made.plain_steps(12)
    steps[5].checkpoint_beside = 30
    from_file = steps_of(made.write(tmp_path / "t.jsonl", steps))
    server = jaeger(200, as_jaeger(list(made.lines(steps, "run-1"))))
    table = steps_of(server.address)
    assert server.asked == ["/api/traces?service=entrenar-gpu&limit=20"]
    np.testing.assert_allclose(table.seconds, from_file.seconds, atol=2e-6)
    assert {kind.label for kind in table.kinds} == {kind.label for kind in from_file.kinds} > {"layer 1 (backward)"}
    assert [(pause.name, pause.step) for pause in table.pauses] == [("checkpoint", 6)]
    np.testing.assert_allclose(table.values["loss"], from_file.values["loss"])


def test_the_page_of_one_trace_is_asked_for_by_its_id(jaeger: Any) -> None:
    server = jaeger(200, as_jaeger(list(made.lines(made.plain_steps(3), "run-1"))))
    steps_of(server.address + "/trace/abc123")
    assert server.asked == ["/api/traces/abc123"]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b"", "Jaeger answered 404"),
        (200, b"<html>", "not an answer of Jaeger's"),
        (200, b'{"data": []}', "no such trace"),
        (200, b'{"data": [{"spans": [{"references": [7]}]}]}', "1 malformed spans"),
    ],
)
def test_jaeger_that_answers_nonsense(jaeger: Any, status: int, body: bytes, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(jaeger(status, body).address)


def test_jaeger_whose_answer_trickles_in_is_given_up(jaeger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaeger_reader, "_PATIENCE_SECONDS", -1)
    with pytest.raises(TraceError, match="cannot be reached: timed out"):
        read_trace(jaeger(200, b'{"data": []}').address)


def test_jaeger_that_sends_control_characters_is_quoted_in_one_line(
    jaeger: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server = jaeger(302, b"")  # no address to go to
    assert main([server.address + "/\x1b[2J"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.rstrip("\n").isprintable()


def test_jaeger_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["http://127.0.0.1:9/"]) == 2
    error = capsys.readouterr().err
    assert "cannot be reached" in error
    assert error.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_that_nobody_writes_to_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / schema.TRACE_FILE).write_bytes(as_lines(made.lines(made.plain_steps(4), "run-1")))
    for name in ("pipe", f"run/{'trace.00001.jsonl'}"):
        os.mkfifo(tmp_path / name)
        assert main([str((tmp_path / name) if name == "pipe" else tmp_path / "run")]) == 2
        assert capsys.readouterr().err == f"error: {tmp_path / name}: cannot be read: it is no file\n"


def test_of_a_folder_of_runs_traces_alone_count(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / schema.TRACE_FILE).write_bytes(b"")
    (tmp_path / "b" / schema.TRACE_FILE).symlink_to(tmp_path / "gone")
    assert newest_run(tmp_path) == tmp_path / "a"
