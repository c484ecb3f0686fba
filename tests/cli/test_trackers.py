"""Trackers: what a run told is in their files or was handed to their libraries."""

import sys
from types import SimpleNamespace

import pytest

from entrenar_gpu import cli
from entrenar_gpu.cli.trackers import trackers
from entrenar_gpu.errors import UserError
from tests.helpers.tiny import make_data, make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}


def run(folder, *options: str) -> int:
    make_model(folder / "model", **TINY)
    make_data(folder / "train.jsonl", vocab=96)
    paths = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--output", str(folder / "run")]
    shape = ["--steps", "2", "--batch", "2", "--seq", "32", "--rank", "4", "--device", "numpy", "--quiet"]
    return cli.run(["train", *paths, *shape, "--eval-data", str(folder / "train.jsonl"), *options])


def test_tensorboards_event_files_hold_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    assert run(tmp_path, "--report-to", "tensorboard") == 0
    (path,) = (tmp_path / "run/tensorboard").iterdir()
    told = [(v.tag, event.step) for event in EventFileLoader(str(path)).Load() for v in event.summary.value]
    assert [step for tag, step in told if tag == "train/loss"] == [1, 2]
    assert [step for tag, step in told if tag == "eval/loss"] == [0, 2]
    assert ("config", 0) in told


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_libraries_are_told_and_ended(tmp_path, monkeypatch, name):
    told: list[tuple] = []

    def teller(what):
        return lambda *given, **named: told.append((what, given, named))

    calls = ("init", "log", "finish", "start_run", "log_params", "log_metrics", "end_run")
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{call: teller(call) for call in calls}))
    assert run(tmp_path, "--report-to", name) == 0
    logged = [(sorted(given[0]), named["step"]) for what, given, named in told if what in ("log", "log_metrics")]
    assert [step for names, step in logged if "train/loss" in names] == [1, 2]
    assert told[0][0] == ("start_run" if name == "mlflow" else "init")
    assert told[-1][0] == ("end_run" if name == "mlflow" else "finish")


def test_what_is_unknown_or_missing_is_said(monkeypatch):
    with pytest.raises(UserError, match="--report-to: 'comet' is not one of tensorboard, wandb, mlflow, trackio"):
        trackers("tensorboard,comet", "run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--report-to: wandb is not installed: pip install 'entrenar-gpu\[wandb\]'"):
        trackers("wandb", "run")
    assert trackers("none", "run") == trackers(None, "run") == []
