"""The package's face: what it exports, the page that lists it, the functions, and how soon it is there."""

import json
import subprocess
import sys

import numpy as np
import pytest

import entrenar_gpu
from entrenar_gpu.errors import UserError
from entrenar_gpu.model.hf_checkpoint import HFCheckpoint
from entrenar_gpu.quant.nf4 import Nf4Weight
from scripts import api_reference
from tests import ROOT
from tests.helpers.runs import train
from tests.helpers.tiny import make_data, make_model
from tests.helpers.word_tokenizer import word_tokenizer

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    make_model(folder / "model", dtype="bfloat16", **TINY)
    make_data(folder / "train.jsonl", vocab=96)
    train(folder, "adapter", device="numpy", steps=2, method="lora")
    return folder


def test_every_public_name_is_there_and_documented():
    for name in entrenar_gpu.__all__:
        found = getattr(entrenar_gpu, name)
        assert name == "__version__" or found.__doc__
        assert name in dir(entrenar_gpu)
    assert (ROOT / "entrenar_gpu/py.typed").exists()


def test_the_reference_is_what_the_docstrings_say(capsys):
    api_reference.main()
    assert (ROOT / "docs/api.md").read_text(encoding="utf-8") == capsys.readouterr().out


def quickest(code: str, since: str = "time.process_time()") -> float:
    """Seconds of processor time that code takes in a fresh interpreter, whatever else the machine does."""
    timed = f"import sys, time; since = {since}; {code}; print(time.process_time() - since, file=sys.stderr)"
    command = [sys.executable, "-c", timed]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT) for _ in range(3)]
    return min(float(run.stderr) for run in runs)


def test_the_package_is_there_at_once():
    assert quickest("import entrenar_gpu") < 0.15


def test_help_is_there_at_once():
    """Python's own start included."""
    assert quickest("from entrenar_gpu.cli import run; assert run(['--help']) == 0", since="0") < 0.3


def test_importing_the_package_loads_nothing_heavy():
    heavy = "numpy", "wgpu", "tokenizers", "opentelemetry", "sklearn", "typer", "rich"
    code = f"import sys, entrenar_gpu; print([m for m in {heavy!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_help_loads_only_what_it_prints_with():
    heavy = "numpy", "wgpu", "yaml", "tokenizers", "opentelemetry", "importlib.metadata"
    code = f"import sys; from entrenar_gpu.cli import main; print([m for m in {heavy!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_evaluate_takes_rows_and_names_arguments(folder):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    options = {"device": "numpy", "seq": 32}
    model = str(folder / "model")
    base = entrenar_gpu.evaluate(model, rows, **options)
    assert base == entrenar_gpu.evaluate(model, folder / "train.jsonl", **options)
    assert entrenar_gpu.evaluate(model, rows, folder / "adapter", **options)["loss"] < base["loss"]
    with pytest.raises(UserError, match=r"^seq: 1 is below 2"):
        entrenar_gpu.evaluate(model, rows, device="numpy", seq=1)


def test_plan_counts_bytes(folder):
    found = entrenar_gpu.plan(str(folder / "model"), seq=32)
    assert found["peak_bytes"] == sum(n for k, n in found.items() if k.endswith("_bytes") and k not in
                                      ("peak_bytes", "budget_bytes"))  # fmt: skip
    with pytest.raises(UserError, match=r"^profile: 'x' is not one of webgpu"):
        entrenar_gpu.plan(str(folder / "model"), profile="x")


def test_merge_says_what_it_folded(folder, tmp_path):
    entrenar_gpu.merge(str(folder / "model"), folder / "adapter", tmp_path / "merged")
    assert HFCheckpoint.open(tmp_path / "merged").config.vocab_size == 96
    with pytest.raises(UserError, match=r"^output: .* already holds a model"):
        entrenar_gpu.merge(str(folder / "model"), folder / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("double", [True, False])
def test_a_quantised_model_is_read_as_it_was_made(folder, tmp_path, double):
    entrenar_gpu.quantize(str(folder / "model"), tmp_path / "nf4", double_quant=double)
    stored, made = HFCheckpoint.open(folder / "model"), HFCheckpoint.open(tmp_path / "nf4")
    assert made.is_quantised
    for spec in stored.config.weights:
        expected = stored.f32(spec.name)
        if spec.kind == "projection":
            expected = Nf4Weight.from_dense(expected, double, "bfloat16").dequantize()
        np.testing.assert_array_equal(made.f32(spec.name), expected)
    with pytest.raises(UserError, match="its weights are quantised already"):
        entrenar_gpu.quantize(str(tmp_path / "nf4"), tmp_path / "again")


def test_paths_are_taken_and_what_is_none_is_named(folder, tmp_path):
    model, adapter = folder / "model", folder / "adapter"
    word_tokenizer(model, 96)
    with entrenar_gpu.load(model, adapter, context=np.int64(16), device="numpy") as opened:
        assert opened.adapter == str(adapter)
    assert entrenar_gpu.plan(model, seq=32) == entrenar_gpu.plan(str(model), seq=32)
    for call, message in (
        (lambda: entrenar_gpu.load(3), "^model: 3 is neither text nor a path"),
        (lambda: entrenar_gpu.load(model, adapters=[adapter]), "^adapters: a list, not a mapping of names to folders"),
        (lambda: entrenar_gpu.load(model, context="16"), "^context: '16' is not a whole number"),
        (lambda: entrenar_gpu.load(model, slots=None), "^slots: None is not a whole number"),
        (lambda: entrenar_gpu.merge(model, None, tmp_path / "m"), "^adapter: None is neither text nor a path"),
        (lambda: entrenar_gpu.quantize(model, None), "^output: None is neither text nor a path"),
        (lambda: entrenar_gpu.export_model(model, tmp_path / "x.gguf", adapter=5), "^adapter: 5 is neither text nor"),
        (lambda: entrenar_gpu.evaluate(model, [], window="8"), "^window: '8' is not a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert not list(tmp_path.iterdir())
