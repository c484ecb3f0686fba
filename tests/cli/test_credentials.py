"""Credentials in the address of a collector reach the collector, and nobody else."""

from __future__ import annotations

import pytest

from entrenar_gpu.cli import main
from entrenar_gpu.config.options import without_credentials
from tests.helpers.otlp_server import http_receiver
from tests.helpers.tiny import make_data, make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}


def test_no_file_and_no_line_of_a_run_holds_them(tmp_path, capfd):
    make_model(tmp_path / "model", **TINY)
    make_data(tmp_path / "train.jsonl", vocab=96)
    paths = {"model": "model", "data": "train.jsonl", "output": "run"}
    flags = [word for name, path in paths.items() for word in (f"--{name}", str(tmp_path / path))]
    shape = ["--batch", "2", "--seq", "32", "--rank", "4", "--steps", "2", "--device", "numpy"]
    with http_receiver() as received:
        address = received.url.replace("://", "://user:hunter2@") + "/?token=hunter3#hunter4"
        assert main.run(["train", *flags, *shape, "--otlp", address]) == 0
    assert received.spans
    out, err = capfd.readouterr()
    assert "hunter" not in out + err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"run.json", "trace.jsonl", "metrics.jsonl", "trainer_state.json"} <= {path.name for path in files}
    assert not [path for path in files if b"hunter" in path.read_bytes()]


@pytest.mark.parametrize("address", ["user:hunter2@host:4318", "//user:hunter2@host", "http:/user:hunter2@host"])
def test_an_address_without_a_scheme_is_not_shown(tmp_path, capfd, address):
    make_model(tmp_path / "model", **TINY)
    make_data(tmp_path / "train.jsonl", vocab=96)
    paths = ["--model", tmp_path / "model", "--data", tmp_path / "train.jsonl", "--output", tmp_path / "run"]
    assert main.run(["train", *map(str, paths), "--seq", "32", "--device", "numpy", "--quiet", "--otlp", address]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: --otlp: expected http://HOST:4318")
    assert "hunter" not in err


@pytest.mark.parametrize("value", ["{headers: {authorization: hunter2}}", '["http://user:hunter2@host"]'])
def test_what_a_file_says_in_place_of_an_address_is_not_shown(tmp_path, capfd, value):
    (tmp_path / "run.yaml").write_text(f"otlp: {value}\n")
    assert main.run(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: --otlp: a ")
    assert "hunter" not in err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("http://user:a/b@c@host:4318/v1?token=x", "http://host:4318/v1?..."),
        ("http://host:4318/v1#x", "http://host:4318/v1"),
        ("http://host:4318?a=1#x?y", "http://host:4318?..."),
        ("grpc://host:4317", "grpc://host:4317"),
        ("http://host/?mail@hunter2", "http://..."),
        ("http://user:hun?ter2@host/", "http://..."),
        ("user@host", "user@host"),
        ("/data/a@b?c", "/data/a@b?c"),
    ],
)
def test_what_is_kept_of_an_address(text, told):
    assert without_credentials(text) == told
