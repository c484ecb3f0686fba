"""The demo, shortened, and the checkpoint that it begins with."""

from __future__ import annotations

import importlib.util
import io
import json
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from entrenar_gpu.cli import demo, docstrings
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.events import StepRecord
from entrenar_gpu.model.hf_checkpoint import HFCheckpoint
from tests import ROOT

SCRIPT = ROOT / "scripts" / "make_demo_model.py"


@pytest.fixture(scope="module")
def make_demo_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found() -> docstrings.Corpus:
    """What the running Python's documentation gives."""
    return docstrings.collect()


def few(found: docstrings.Corpus) -> docstrings.Corpus:
    """Enough pairs for a few steps; the first held-out one tries to write in colour."""
    tricky = docstrings.Pair("What is [bold]this[/bold]?", "It ends [/red] what never began.")
    return docstrings.Corpus(found.train[:60], (tricky, *found.valid[:8]))


def test_the_shipped_model_is_a_small_qwen3():
    assert sum(file.stat().st_size for file in demo.MODEL.iterdir()) < 4_000_000
    checkpoint = HFCheckpoint.open(demo.MODEL)
    config = checkpoint.config
    attention = config.layers[0].attention
    assert (config.architecture, config.tie_word_embeddings) == ("qwen3", True)
    assert attention.qk_norm is not None
    assert attention.num_kv_heads < attention.num_heads
    for spec in config.weights:
        assert checkpoint.info(spec.name).dtype == "BF16"
        assert np.isfinite(checkpoint.f32(spec.name)).all()
    tokenizer = Tokenizer.load(demo.MODEL)
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.has_chat_template


def test_pretraining_never_sees_what_the_demo_holds_out(found, make_demo_model, tmp_path):
    make_demo_model.write_texts(tmp_path, found)
    texts = make_demo_model.read_texts(tmp_path / "train.jsonl")
    assert len(texts) == len(found.train)
    seen = " ".join(" ".join(texts).split())
    assert [pair.completion for pair in found.valid if " ".join(pair.completion.split()) in seen] == []


@pytest.mark.gpu
def test_a_short_demo(found, kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 4)
    steps: list[int] = []

    class Observer:
        def step_finished(self, record: StepRecord) -> None:
            steps.append(record.step)

    printed = io.StringIO()
    console = Console(file=printed, width=80)
    output = tmp_path / "run"
    result = demo.run_demo(output, 4, [Observer()], console=console, found=few(found), kernels=kernels)
    assert steps == [1, 2, 3, 4]
    assert result.after.loss < result.before.loss - 0.1
    assert result.after.tokens == result.before.tokens > 0
    assert result.answer_before != result.answer_after

    assert (output / "adapter_model.safetensors").is_file()
    assert len((output / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()) == 60
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [r["eval_loss"] for r in records if "eval_loss" in r] == [result.before.loss, result.after.loss]

    shown = printed.getvalue()
    for text in (
        "60 questions",
        "9 more",
        "What is [bold]this[/bold]?",
        "It ends [/red] what never began.",
        f"loss {result.before.loss:.3f} -> {result.after.loss:.3f}",
        result.answer_before,
        result.answer_after,
        f"--adapter {output}",
    ):
        assert text in shown


def test_a_folder_in_use_is_left_alone(found, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"--output: {tmp_path} is in use"):
        demo.run_demo(tmp_path, device="numpy", found=found)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_demo_that_cannot_begin_leaves_nothing(found, tmp_path):
    nothing = docstrings.Corpus((), found.valid)
    with pytest.raises(UserError, match="holds no token to train"):
        demo.run_demo(tmp_path / "run", device="numpy", found=nothing)
    assert not (tmp_path / "run").exists()


def test_the_model_is_made_by_full_training(found, make_demo_model, tmp_path, monkeypatch):
    """The script from end to end, with a few documents, two steps and no GPU."""
    (tmp_path / "texts").mkdir()
    make_demo_model.write_texts(tmp_path / "texts", few(found))
    small = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    monkeypatch.setattr(make_demo_model, "CONFIG", make_demo_model.CONFIG | small)
    monkeypatch.setattr(make_demo_model, "TRAINING", make_demo_model.TRAINING | {"steps": 2, "batch": 1, "seq": 64})
    folders = {"--work": tmp_path / "work", "--texts": tmp_path / "texts", "--output": tmp_path / "model"}
    arguments = [str(word) for pair in folders.items() for word in pair]
    monkeypatch.setattr("sys.argv", ["make_demo_model.py", *arguments, "--device", "numpy"])
    make_demo_model.main()
    random, trained, stored = (HFCheckpoint.open(tmp_path / name) for name in ("work/random", "work/run", "model"))
    for name in (spec.name for spec in random.config.weights):
        assert 0 < np.abs(trained.f32(name) - random.f32(name)).max() < 0.01, name
        assert stored.info(name).dtype == "BF16"
        np.testing.assert_array_equal(stored.raw(name), trained.f32(name).astype(ml_dtypes.bfloat16))
    assert Tokenizer.load(tmp_path / "model").vocab_size == 400
