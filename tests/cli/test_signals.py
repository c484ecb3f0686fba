"""Signals that ask a program to end, and standard streams that are full, closed or steered."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from entrenar_gpu.cli import main
from tests import ROOT
from tests.helpers.runs import train
from tests.helpers.tiny import make_data, make_model

ENDING = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("signals")
    tiny = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}
    make_model(path / "model", **tiny)
    make_data(path / "train.jsonl", vocab=96)
    return path


def command(folder: Path, output: Path, *more: str) -> list[str]:
    paths = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--output", str(output)]
    shape = ["--batch", "2", "--seq", "32", "--rank", "4", "--lr", "5e-3", "--device", "numpy"]
    return [sys.executable, "-m", "entrenar_gpu.cli", "train", *paths, *shape, *more]


def start(arguments: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """A process that minds SIGHUP, which `nohup` has its children ignore: as training does what it is told there, tests
    run under it would wait for nothing."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    minding = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)} if len(ENDING) > 2 else {}
    return subprocess.Popen(arguments, cwd=ROOT, **(pipes | minding | options))


def until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_the_first_signal_ends_a_step_saves_and_says_which(folder, tmp_path, number):
    """And the run that goes on from there is the one that never stopped."""
    output = tmp_path / "run"
    steps = ["--steps", "4000", "--schedule", "constant", "--warmup", "0"]
    process = start(command(folder, output, *steps))
    until(lambda: (output / "metrics.jsonl").exists())
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"Traceback" not in err
    assert b"interrupted: " in out
    done = len((output / "metrics.jsonl").read_text().splitlines())
    assert (output / f"checkpoint-{done:06}").is_dir()
    options = {"device": "numpy", "steps": done + 2, "schedule": "constant", "warmup": 0}
    resumed = train(folder, str(output), resume="latest", **options)
    assert resumed == train(folder, str(tmp_path / "whole"), **options)[done:]


# Runs the command line, and says when it begins to load what is not needed to take signals.
READY = """
import sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "entrenar_gpu.cli.main":
            print("ready", flush=True)
sys.meta_path.insert(0, Finder())
from entrenar_gpu.cli import __main__
__main__.main()
"""


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_a_signal_at_any_time_of_the_start_is_a_clean_exit(folder, tmp_path, number):
    """While modules are loaded too, which is most of the first second: never a traceback, never another status."""
    rng = random.Random(number)
    for i, delay in enumerate([0.0, rng.uniform(0, 0.3), rng.uniform(0, 1.5)]):
        arguments = command(folder, tmp_path / str(i), "--steps", "1", "--quiet")[3:]
        process = start([sys.executable, "-c", READY, *arguments])
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (128 + number, 0)
        assert err.strip() == b""
        assert delay or process.returncode


def test_what_is_ignored_stays_ignored(folder, tmp_path):
    """`nohup` has SIGHUP ignored: the terminal may go."""
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("no SIGHUP")
    process = start(
        command(folder, tmp_path / "run", "--steps", "30"),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    until(lambda: (tmp_path / "run/metrics.jsonl").exists())
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_second_signal_ends_at_once(folder, tmp_path):
    """While the step under way would take for ever."""
    code = """
import sys, time
from pathlib import Path
from entrenar_gpu import signals
from entrenar_gpu.cli import main
from entrenar_gpu.train import trainer
real = trainer.Trainer._land
def land(self, flying):
    record = real(self, flying)
    print("landed", flush=True)
    time.sleep(600)
    return record
trainer.Trainer._land = land
main.main()
"""
    process = start([sys.executable, "-c", code, *command(folder, tmp_path / "run", "--steps", "9", "--quiet")[3:]])
    assert process.stdout is not None
    assert process.stdout.readline() == b"landed\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert b"Traceback" not in err


class _Closed:
    """How a shell starts a program with `>&-`."""

    @staticmethod
    def stdout() -> None:
        os.close(1)

    @staticmethod
    def all() -> None:
        for descriptor in (0, 1, 2):
            os.close(descriptor)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("how", ["full", "closed", "all closed", "nobody reads"])
def test_standard_output_never_ends_a_training(folder, tmp_path, how):
    arguments = command(folder, tmp_path / "run", "--steps", "6", "--save-every", "2")
    if how == "full":
        with open("/dev/full", "w") as full:
            process = start(arguments, stdout=full)
    elif how == "nobody reads":
        process = start(arguments)
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
    else:
        process = start(arguments, stdout=None, preexec_fn=_Closed.stdout if how == "closed" else _Closed.all)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    expected = b"standard output: No space left on device; training goes on without it\n" if how == "full" else b""
    assert err == expected
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    for path in (tmp_path / "run").rglob("*"):  # nothing printed has gone into a file that took the stream's place
        assert path.is_dir() or b"saved" not in path.read_bytes()[:200]


def test_quiet_prints_errors_only(folder, tmp_path):
    process = start(command(folder, tmp_path / "run", "--steps", "2", "--quiet", "--save-every", "1"))
    assert process.communicate(timeout=60) == (b"", b"")
    process = start(command(folder, tmp_path / "run", "--steps", "2", "--quiet"))
    out, err = process.communicate(timeout=60)
    assert (out, err.count(b"\n"), process.returncode) == (b"", 1, 2)


@pytest.fixture(scope="module")
def hostile() -> str:
    return "a\x1b[2J\x07\u202eb\x9b31m"


def _outputs(folder: Path, hostile: str) -> Iterator[list[str]]:
    """Commands that print what the input holds: a path, a key, a value, an architecture, a line of data."""
    yield ["train", "--model", f"{folder}/{hostile}", "--data", "x", "--output", "y"]
    yield [
        "train",
        "--model",
        str(folder / "m"),
        "--data",
        str(folder / "train.jsonl"),
        "--output",
        str(folder / hostile),
    ]
    yield ["generate", "--model", f"{folder}/{hostile}", "--prompt", "x"]
    yield ["merge", "--model", str(folder / "m"), "--adapter", f"{folder}/{hostile}", "--output", str(folder / "o")]
    yield ["report", f"{folder}/{hostile}"]
    yield ["plan", "--model", hostile]
    yield ["train", f"--{hostile}", "1"]


def test_what_would_steer_a_terminal_is_made_visible(tmp_path, hostile, capfd):
    from entrenar_gpu import cli

    config = json.loads((make_model(tmp_path / "m") / "config.json").read_text())
    config["architectures"] = ["Evil\x1b]0;title\x07" + "x" * 5000]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    (tmp_path / "train.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    for arguments in _outputs(tmp_path, hostile):
        assert cli.run(arguments) == 2
        captured = capfd.readouterr()
        text = captured.out + captured.err
        assert text.count("\n") == 1, arguments
        assert text.rstrip("\n").isprintable(), arguments
        assert len(text) < 1200, arguments


def test_what_libraries_log_does_not_steer_a_terminal(hostile):
    """As the reason that a collector gives for what it does not take."""
    said = (
        "import logging, sys; from entrenar_gpu.cli import main; main.run(['--version'])\n"
        "logging.getLogger('exporter').warning('not taken (%s)', sys.argv[1] + chr(10) + 'error: b')"
    )
    done = subprocess.run([sys.executable, "-c", said, hostile], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "not taken (a\\x1b[2J\\x07\\u202eb\\x9b31m\\nerror: b)\n"


def test_visible_text_keeps_what_people_write():
    from entrenar_gpu.cli.text import printable

    for text in ("naïve café — 日本語", "👨‍👩‍👧 \u00a0 می‌خواهم", "x" * 1000):
        assert printable(text) == text
    assert printable("a\nb\tc\rd", keep="\n\t") == "a\nb\tc\\rd"
    assert printable("\x1b[31m\u202e\ud800") == "\\x1b[31m\\u202e\\ud800"
    cut = printable("start" + "x" * 5000 + "end")
    assert (len(cut), cut[:5], cut[-3:]) == (1003, "start", "end")


INTERRUPTED_TEXT = """
from types import SimpleNamespace
from entrenar_gpu.cli import main
def interrupted(**_):
    exec("import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)")
main.typer.main.get_command = lambda _: SimpleNamespace(main=interrupted)
main.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process there")
def test_an_interrupt_while_text_is_run_has_its_own_status(tmp_path):
    """Dataclasses run text while modules are loaded; `python -m` then ends by SIGINT of itself."""
    (tmp_path / "interrupted_text.py").write_text(INTERRUPTED_TEXT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "interrupted_text"], cwd=tmp_path, env=environment, capture_output=True
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, b"")


def test_an_interrupt_while_a_class_is_made_is_one(monkeypatch):
    """Python 3.11 raises a RuntimeError from what a descriptor's __set_name__ raises."""

    class Interrupted:
        def __set_name__(self, owner: type, name: str) -> None:
            raise KeyboardInterrupt

    def meet(**_: Any) -> None:
        try:
            type("Made", (), {"name": Interrupted()})
        except KeyboardInterrupt as error:  # from 3.12 on as it is
            raise RuntimeError from error

    monkeypatch.setattr(main.typer.main, "get_command", lambda _: SimpleNamespace(main=meet))
    assert main.run([]) == 130
