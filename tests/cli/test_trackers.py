"""Trackers: what a run told is in their files or was handed to their libraries."""

import sys
from types import SimpleNamespace

import pytest

from entrenar_gpu import cli
from entrenar_gpu.cli.trackers import trackers
from entrenar_gpu.errors import UserError
from tests.data.test_chat import model_folder
from tests.helpers.tiny import make_data, make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 320, "num_hidden_layers": 1}


def run(folder, *options: str) -> int:
    make_model(folder / "model", **TINY)
    model_folder(folder / "model", {"bos_token": "<s>", "eos_token": "</s>"}, bos=True)
    make_data(folder / "train.jsonl", vocab=96)
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "<b>"}\n')
    paths = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--output", str(folder / "run")]
    shape = ["--steps", "2", "--batch", "2", "--seq", "32", "--rank", "4", "--device", "numpy", "--quiet"]
    shape += ["--sample-prompts", str(folder / "prompts.jsonl"), "--sample-tokens", "2"]
    return cli.run(["train", *paths, *shape, "--eval-data", str(folder / "train.jsonl"), *options])


def test_tensorboards_event_files_hold_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    assert run(tmp_path, "--report-to", "tensorboard") == 0
    (path,) = (tmp_path / "run/tensorboard").iterdir()
    told = [(v.tag, event.step) for event in EventFileLoader(str(path)).Load() for v in event.summary.value]
    assert [step for tag, step in told if tag == "train/loss"] == [1, 2]
    assert [step for tag, step in told if tag == "eval/loss"] == [0, 2]
    assert {("config", 0), ("samples/1", 0), ("samples/2", 2)} <= set(told)
    values = {v.tag: v for event in EventFileLoader(str(path)).Load() for v in event.summary.value}
    norms = [event.step for event in EventFileLoader(str(path)).Load() for v in event.summary.value
             if v.tag == "train/grad_norms"]  # fmt: skip
    assert norms == [2]
    assert values["samples/2"].tensor.string_val[0].startswith(b"    <b>\n\n---\n\n    ")
    parts = {name: values[f"_hparams_/session_{name}_info"].metadata.plugin_data for name in ("start", "end")}
    start = HParamsPluginData.FromString(parts["start"].content).session_start_info
    assert (start.hparams["rank"].number_value, start.hparams["method"].string_value) == (4, "qlora")
    assert start.hparams["pack"].bool_value
    assert HParamsPluginData.FromString(parts["end"].content).session_end_info.status == 1  # STATUS_SUCCESS


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_libraries_are_told_and_ended(tmp_path, monkeypatch, name):
    told: list[tuple] = []

    def teller(what):
        return lambda *given, **named: told.append((what, given, named))

    calls = ("init", "log", "finish", "start_run", "log_params", "log_metrics", "log_dict", "end_run")
    calls += ("Table", "Histogram")
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{call: teller(call) for call in calls}))
    assert run(tmp_path, "--report-to", name) == 0
    shown = [(given, named) for what, given, named in told if what == ("log_dict" if name == "mlflow" else "Table")]
    assert all("<b>" in str(part) for part in (shown[0], shown[-1]))
    logged = [(sorted(given[0]), named["step"]) for what, given, named in told if what in ("log", "log_metrics")]
    assert [step for names, step in logged if "train/loss" in names] == [1, 2]
    assert told[0][0] == ("start_run" if name == "mlflow" else "init")
    assert told[-1][0] == ("end_run" if name == "mlflow" else "finish")


@pytest.mark.parametrize("call", ["init", "log"])
def test_what_a_library_cannot_do_is_one_line(tmp_path, monkeypatch, capsys, call):
    def refuse(*given, **named):
        raise RuntimeError("no\nnetwork")

    calls = ("init", "log", "finish", "Table", "Histogram")
    module = {name: refuse if name == call else lambda *given, **named: None for name in calls}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**module))
    assert run(tmp_path, "--report-to", "wandb") == (2 if call == "init" else 0)
    said = (
        "error: --report-to: wandb: no network" if call == "init" else "--report-to: wandb is told no more: no network"
    )
    assert capsys.readouterr().err.splitlines() == [said]


def test_what_is_unknown_or_missing_is_said(monkeypatch):
    with pytest.raises(UserError, match="--report-to: 'comet' is not one of tensorboard, wandb, mlflow, trackio"):
        trackers("tensorboard,comet", "run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--report-to: wandb is not installed: pip install 'entrenar-gpu\[wandb\]'"):
        trackers("wandb", "run")
    assert trackers("none", "run") == trackers(None, "run") == []
