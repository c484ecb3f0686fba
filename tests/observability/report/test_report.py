"""The report as files and in the terminal: complete, escaped, small, and without the trainer."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from entrenar_gpu.cli.main import run
from observability import schema
from observability.errors import TraceError
from observability.report.command import main, report
from observability.report.html import script_json
from tests import ROOT
from tests.helpers import made_traces as made

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>[red]\u2028${7*7}"


def faulty_steps(count: int = 300) -> list[made.Step]:
    """A run with one of most things: compilation, a stall, a checkpoint, a slow layer, a loss spike."""
    steps = made.plain_steps(count)
    steps[0].phases["forward"] += 800
    steps[100].phases["data"] += 60
    steps[150].checkpoint_beside = 290
    made.slow_layer(steps[200], "backward 1", 50)
    steps[220].attributes[schema.LOSS] = 9.0
    return steps


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write(tmp_path_factory.mktemp("run") / "trace.jsonl", faulty_steps())


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_terminal_has_verdict_table_and_evidence(trace: Path) -> None:
    console = quiet()
    report(str(trace.parent), console=console)
    text = text_of(console)
    assert re.match(r"\S+: tiny-qwen3 · qlora · llvmpipe · 2023-11-1\d .*\n300 steps of typically ", text)
    for part in ("data-stall", "checkpoint write took 290 ms", "layer 1 (backward)", "loss 9 where", "compile"):
        assert part in text


def test_a_terminal_without_sigma_gets_the_report_too(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    assert main([str(trace)]) == 0
    sys.stdout.flush()
    assert b"data-stall" in written.getvalue()


def test_html_tells_the_story_and_loads_nothing(trace: Path, tmp_path: Path) -> None:
    report(str(trace), html=str(tmp_path / "r.html"), console=quiet())
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    visible = page.split('<script type="application/json"')[0]
    for part in ("tiny-qwen3", "What happened", "waiting for data", "Kinds of steps", "high-latency"):
        assert part in visible
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", visible)


def test_steps_that_are_much_alike_have_no_slow_kind(tmp_path: Path) -> None:
    path, console = made.write(tmp_path / "trace.jsonl", made.plain_steps(100, noise=0.05)), quiet()
    report(str(path), html=str(tmp_path / "r.html"), console=console)
    alike = "there are no distinct kinds of steps: all are much alike"
    assert re.search(rf"2 kinds of steps \(silhouette 0\.2\d: {alike}\)\n", text_of(console))
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert re.search(rf"Sorted into 2 kinds; {alike} \(silhouette 0\.2\d\)\.</p>", page)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    steps = faulty_steps()
    for step in steps:
        step.phases[HOSTILE] = 30.0
    steps[130].phases[HOSTILE] = 400.0
    path = made.write(tmp_path / "trace.jsonl", steps)
    path.write_text(path.read_text().replace("tiny-qwen3", json.dumps(HOSTILE)[1:-1]).replace("llvmpipe", "[bold]x"))
    console = quiet()
    outputs = {"html": str(tmp_path / "r.html"), "json_out": str(tmp_path / "r.json")}
    report(str(path), **outputs, perfetto=str(tmp_path / "p.json"), console=console)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    ours = page.split("<script>")[0]  # before the embedded library
    assert "alert(1)</script>" not in ours
    assert "\u2028" not in ours
    assert "&lt;/script&gt;" in ours
    json.loads((tmp_path / "r.json").read_text())
    json.loads((tmp_path / "p.json").read_text())
    data = re.search(r'id="plots">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    json.loads(data.group(1))


def test_script_json_cannot_leave_its_element() -> None:
    text = script_json({"a": "</script><!--\u2028&"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!--\u2028&"}


def test_markup_in_names_is_not_read_by_the_terminal(tmp_path: Path) -> None:
    steps = made.plain_steps(100)
    for step in steps:
        step.layers["forward [red]"] = 0.0
    made.slow_layer(steps[60], "forward [red]", 90)
    console = quiet()
    report(str(made.write(tmp_path / "trace.jsonl", steps)), console=console)
    assert "layer [red]" in text_of(console)


def test_ten_thousand_steps_stay_small(tmp_path: Path) -> None:
    steps = faulty_steps(10_000)
    for step in steps:
        step.layers.clear()
    for step in steps[300::20]:
        step.phases["data"] += 40
    path = made.write(tmp_path / "trace.jsonl", steps)
    report(str(path), html=str(tmp_path / "r.html"), console=quiet())
    assert (tmp_path / "r.html").stat().st_size < 10e6


def test_against_another_run(trace: Path, tmp_path: Path) -> None:
    steps = made.plain_steps(250, seed=5)
    for step in steps:
        made.slow_layer(step, "backward 2", 6)
    other = made.write(tmp_path / "trace.jsonl", steps)
    console = quiet()
    report(str(trace), against=str(other), html=str(tmp_path / "r.html"), console=console)
    text = text_of(console)
    assert "over 250 common steps this run is 1.06x as fast as" in text
    assert re.search(r"layer 2 \(backward\): 2\d\.?\d* ms to (19|20)\.?\d* ms \(-2\d", text)
    assert "layer 1 (backward):" not in text
    assert "Against the other run" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["p.json", "p.json.gz"])
def test_perfetto_has_host_and_gpu_apart_and_nothing_overlaps(trace: Path, tmp_path: Path, name: str) -> None:
    report(str(trace), perfetto=str(tmp_path / name), console=quiet())
    raw = (tmp_path / name).read_bytes()
    events: list[dict[str, Any]] = json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)["traceEvents"]
    names = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert set(names) == {"host", "GPU"}
    slices = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in slices if e["name"].startswith("layer")} == {names["GPU"]}
    assert {e["pid"] for e in slices if e["name"].startswith("step ")} == {names["host"]}
    ends: dict[tuple[int, int], float] = {}
    for event in sorted(slices, key=lambda e: e["ts"]):
        track = (event["pid"], event["tid"])
        assert event["ts"] >= ends.get(track, 0.0) - 1e-3
        ends[track] = event["ts"] + event["dur"]
    assert any(e["ph"] == "C" and e["name"] == "loss" for e in events)
    assert any(e["ph"] == "i" and e["name"].startswith("data-stall") for e in events)


def test_perfetto_marks_the_steps_of_the_run_that_is_reported(tmp_path: Path) -> None:
    steps = made.plain_steps(30)
    hour = 3600 * 10**9
    newest = made.lines(steps[10:], "b", "a", made.START_NS + 2 * hour)
    another = made.lines(steps, "x", start=made.START_NS + hour)
    lines = [*newest, *another, *made.lines(steps[:15], "a")]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report(str(path), perfetto=str(tmp_path / "p.json"), console=quiet())
    events = json.loads((tmp_path / "p.json").read_text())["traceEvents"]
    told = [event["ts"] for event in events if event["name"] == "loss"]
    hours = [round(at / 3600e6) for at in told]
    assert hours == [0] * 10 + [2] * 20
    slices = {event["ts"] for event in events if event["ph"] == "X" and event["name"].startswith("step ")}
    assert all(min(abs(at - begin) for begin in slices) < 0.01 for at in told)  # microseconds


@pytest.mark.parametrize("value", [{"stringValue": "lots"}, {"intValue": "9" * 400}, {"doubleValue": "NaN"}])
def test_a_fact_that_is_no_count_is_shown_as_it_is(tmp_path: Path, value: dict[str, str]) -> None:
    path = made.write(tmp_path / "t.jsonl", made.plain_steps(3))
    planned = json.dumps({"intValue": str(4 << 30)})
    path.write_text(path.read_text().replace(planned, json.dumps(value)))
    report(str(path), html=str(tmp_path / "r.html"), console=quiet())
    shown = next(iter(value.values()))
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"<dt>Planned memory</dt><dd>{shown.replace('NaN', 'nan')}</dd>" in page


def test_names_that_are_not_utf_8(trace: Path, tmp_path: Path) -> None:
    name = tmp_path / os.fsdecode(b"tr\xff.jsonl")
    try:
        name.write_bytes(trace.read_bytes())
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    report(str(name), html=str(tmp_path / "r.html"), against=str(name), console=quiet())
    assert "tr\ufffd.jsonl." in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_json_on_standard_output_is_nothing_but_json(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trace), "--json", "-", "--clusters", "3"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["clusters"]["k"] == 3
    assert {a["cause"] for a in value["anomalies"]} >= {"compile", "data-stall", "checkpoint-stall", "slow-kernel"}


def test_the_trainer_need_not_be_importable(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "entrenar_gpu.py").write_text("raise ImportError('the trainer is not here')")
    (tmp_path / "observability").symlink_to(ROOT / "observability")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "observability.report", str(trace), "--html", "r.html"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").exists()


@pytest.mark.parametrize("option", ["--html", "--json", "--perfetto"])
def test_an_output_that_cannot_be_written_is_one_line(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # as a device: writing beside it and putting that in its place would end it
    before = sorted(tmp_path.iterdir())
    for name in ("missing/out", "folder", "pipe", "t.jsonl/out", "x" * 300):
        assert main([str(trace), option, str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path / name}: cannot be written: ")
        assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["--html", "run/trace.jsonl"], "--html: run/trace.jsonl is the trace that is read"),
        (["--json", "link.jsonl"], "--json: link.jsonl is the trace that is read"),
        (["--against", "other.jsonl", "--perfetto", "./other.jsonl"], "--perfetto: ./other.jsonl is the trace that"),
        (["--html", "new", "--perfetto", "run/../new"], "--perfetto: run/../new is what --html writes"),
    ],
)
def test_an_output_replaces_neither_a_trace_that_is_read_nor_another_output(
    trace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outputs: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for name in ("run/trace.jsonl", "other.jsonl"):
        Path(name).write_bytes(trace.read_bytes())
    Path("link.jsonl").symlink_to("run/trace.jsonl")
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", *outputs]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("run/trace.jsonl").read_bytes() == Path("other.jsonl").read_bytes() == trace.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN|TRACE"),
        (["run", "--json"], "argument --json: expected one argument"),
        (["run", "--clusters", "many"], "argument --clusters: invalid int value: 'many'"),
        (["run", "--h\ntml=x"], "unrecognized arguments: --h tml=x"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_help_is_the_callers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        run(["report", "--help"])
    assert capsys.readouterr().out.startswith("usage: entrenar-gpu report [-h]")


def test_cluster_number_out_of_range(trace: Path) -> None:
    with pytest.raises(TraceError, match="--clusters: 0"):
        report(str(trace), clusters=0)


def test_analyze_training_takes_the_last_run(tmp_path: Path) -> None:
    for age, name in ((100, "new"), (200, "old")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        path = made.write(tmp_path / "runs" / name / "trace.jsonl", made.plain_steps(20 if name == "new" else 30))
        os.utime(path, (1_700_000_000 - age,) * 2)
    script = [str(ROOT / "scripts" / "analyze_training")]
    environment = os.environ | {"PYTHON": sys.executable}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done: Any = subprocess.run([*script, "--json", "-"], **run)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 20
    done = subprocess.run([*script, "runs/old", "--json", "-"], **run)  # type: ignore[call-overload]
    assert json.loads(done.stdout)["steps"] == 30
    done = subprocess.run([*script, "nowhere"], **run)  # type: ignore[call-overload]
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere: no such folder")


@pytest.mark.slow
def test_a_hundred_thousand_spans_in_bounded_time_and_memory(tmp_path: Path) -> None:
    steps = made.plain_steps(2900)
    for step in steps:
        step.kernels = 4
    path = made.write(tmp_path / "trace.jsonl", steps)
    code = (
        "import time; began = time.process_time()\n"
        "from observability.report import report\n"
        f"found = report({str(path)!r}, html={str(tmp_path / 'r.html')!r}, json_out={str(tmp_path / 'r.json')!r})\n"
        # ru_maxrss would count the pytest process that this one was forked from
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(found.span_count, time.process_time() - began, int(peak) / 2**20)"
    )
    # One thread, so that the processor time used is no less than the time a user waits on an idle machine.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spans, seconds, gibibytes = map(float, done.stdout.splitlines()[-1].split())
    assert spans > 100_000
    assert seconds < 20
    assert gibibytes < 1
