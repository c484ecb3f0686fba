"""A model in training, to talk to: samples during a run, and the model afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu import load
from entrenar_gpu.errors import UserError
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import config_of
from tests.helpers.tiny import make_model
from tests.helpers.word_tokenizer import text, word_tokenizer

TINY = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 32, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trained")
    make_model(path / "model", **TINY)
    word_tokenizer(path / "model")
    rows = [{"text": text([1 + (start + i) % 30 for i in range(14)])} for start in range(30)]
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": "w4 w5 w6", "id": 1}, {"messages": [{"role": "user", "content": "w9"}]}]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return path


class Samples(list[Any]):
    def samples_drawn(self, record: Any) -> None:
        self.append(record)


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {"sample_prompts": str(folder / "prompts.jsonl"), "sample_every": 2, "sample_tokens": 5, "steps": 5} | more


RUNS: dict[str, dict[str, Any]] = {
    "qlora": {},
    "lora": {},
    "full": {},
    "qlora of tokens": {"target": "q", "trainable_token_indices": "4,9", "lr": 0.05},
    "lora of tables": {"target": "q,embed_tokens,lm_head", "lr": 0.05},
    "lora beside a head": {"target": "q", "modules_to_save": "lm_head", "lr": 0.05},
}


@pytest.mark.parametrize("run", RUNS)
def test_samples_are_what_the_weights_say_and_change_no_loss(folder, run):
    told, method, more = Samples(), run.partition(" ")[0], RUNS[run]
    trainer = Trainer(config_of(folder, run, device="numpy", method=method, **options(folder, **more)), [told])
    losses = [record.loss for record in trainer.steps()]
    plain = Trainer(config_of(folder, f"{run}-plain", device="numpy", method=method, steps=5, **more))
    assert [record.loss for record in plain.steps()] == losses
    assert [record.step for record in told] == [0, 2, 4, 5]
    lines = [json.loads(line) for line in (folder / run / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 2, 2, 4, 4, 5, 5]
    assert lines[0]["id"] == 1
    adapter = {} if method == "full" else {"adapter": str(folder / run)}
    model = str(folder / run) if method == "full" else str(folder / "model")
    stored = {"method": "lora" if method == "full" else method}
    with load(model, device="numpy", context=32, **adapter, **stored) as saved:
        assert saved.chat("w4 w5 w6", max_tokens=5) == lines[-2]["text"]
        assert saved.chat("w9", max_tokens=5) == lines[-1]["text"]
        want = saved.logits([4, 5, 6])
    with trainer.model as trained:
        np.testing.assert_allclose(trained.logits([4, 5, 6]), want, rtol=0, atol=1e-5 * np.abs(want).max())
        if method != "full":
            trained.adapter = None
            assert np.abs(trained.logits([4, 5, 6]) - want).max() > 1e-3


@pytest.mark.gpu
def test_on_a_gpu_samples_share_the_runs_weights(folder, kernels):
    """Without a step: what trains there is tested elsewhere, and kernels take long to compile."""
    before = kernels.device.allocated_bytes
    more = options(folder, sample_tokens=3)
    (folder / "gpu").mkdir()
    trainer = Trainer(config_of(folder, "gpu", seq=9, **more), kernels=kernels)
    assert kernels.device.allocated_bytes - before == trainer.session.plan.peak_bytes
    numpy = Trainer(config_of(folder, "gpu", seq=9, device="numpy", **more))
    assert trainer.sample().texts == numpy.sample().texts
    model = trainer.model
    trainer.session.close()
    want = numpy.model.logits([4, 5, 6])
    np.testing.assert_allclose(model.logits([4, 5, 6]), want, rtol=0, atol=1e-5 * np.abs(want).max())
    model.close()
    assert kernels.device.allocated_bytes == before


def test_a_run_that_goes_on_takes_its_samples_again(folder):
    shape = {"device": "numpy", "save_every": 2}
    trainer = Trainer(config_of(folder, "again", **shape, **options(folder)))
    for record in trainer.steps():
        if record.step == 3:
            break
    path = folder / "again/samples.jsonl"
    before = path.read_text().splitlines()
    Trainer(config_of(folder, "again", **shape, **options(folder, resume="latest"))).run()
    after = path.read_text().splitlines()
    assert after[:4] == before[:4]
    assert [json.loads(line)["step"] for line in after] == [0, 0, 2, 2, 4, 4, 5, 5]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": 1}', "prompts-bad.jsonl:1: expected an object"),
        (json.dumps({"prompt": "w1 " * 40}), "prompt 1: 43 tokens leave no room for an answer within seq 32"),
    ],
)
def test_prompts_that_cannot_be_answered_are_told_before_the_run(folder, lines, message):
    path = folder / "prompts-bad.jsonl"
    path.write_text(lines)
    with pytest.raises(UserError, match=message):
        Trainer(config_of(folder, "bad", device="numpy", **options(folder, sample_prompts=str(path))))
    assert not (folder / "bad").exists()
