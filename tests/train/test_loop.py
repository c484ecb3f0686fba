"""The loop as its caller sees it: what its body finds, how often it goes on, what it counts, by which clock."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu.errors import UserError
from entrenar_gpu.files.safetensors_file import SafetensorsFile
from entrenar_gpu.train import run_checkpoint
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import config_of, train
from tests.helpers.tiny import make_data, make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("loop")
    make_model(path / "model", **TINY)
    make_data(path / "train.jsonl", vocab=96)
    return path


def on_numpy(folder: Path, output: Path, **options: Any) -> Trainer:
    return Trainer(config_of(folder, str(output), **({"device": "numpy", "steps": 4} | options)))


def weights_in(checkpoint: Path) -> dict[str, np.ndarray]:
    file = SafetensorsFile(checkpoint / "adapter_model.safetensors")
    return {name: file[name].copy() for name in file.tensors}


@pytest.mark.gpu
def test_the_body_of_the_loop_finds_the_state_after_its_step(folder, tmp_path, kernels):
    """What is read, saved and evaluated in it is what a run of that many steps ends with; and it changes nothing."""
    data = str(folder / "train.jsonl")
    options = {"eval_data": data, "schedule": "constant", "steps": 4}
    trainer = Trainer(config_of(folder, str(tmp_path / "run"), **options), kernels=kernels)
    losses, evaluated, read = [], 0.0, {}
    for record in trainer.steps():
        losses.append(record.loss)
        if record.step == 2:
            read = trainer.session.adapter_values()
            evaluated = trainer.evaluate().loss
            saved = trainer.save(record.step)
    trainer.session.close()
    two = tmp_path / "two"
    train(folder, str(two), kernels, **(options | {"steps": 2}))
    assert saved.name == "checkpoint-000002"
    for name, values in weights_in(saved).items():
        np.testing.assert_array_equal(values, weights_in(two)[name], err_msg=name)
    assert len(read) == len(weights_in(two))
    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert evaluated == [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    assert losses == train(folder, str(tmp_path / "whole"), kernels, **options)
    resumed = train(folder, str(tmp_path / "resumed"), kernels, resume=str(saved), **options)
    assert resumed == losses[2:]  # its place in the data too is the one after that step


@pytest.mark.gpu
def test_a_run_and_a_loop_train_the_same(folder, tmp_path, kernels):
    trainer = Trainer(config_of(folder, str(tmp_path / "run"), save_every=3, steps=8), kernels=kernels)
    trainer.run()
    trainer.session.close()
    looped = train(folder, str(tmp_path / "loop"), kernels, save_every=3, steps=8)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == looped


def test_nobody_saves_a_run_while_its_next_step_is_under_way(folder, tmp_path):
    """An observer hears of a step when the next one has begun: what it saved would be neither."""

    class Saver:
        def step_finished(self, record: Any) -> None:
            trainer.save()

    trainer = on_numpy(folder, tmp_path / "run")
    trainer.observe(Saver())
    with pytest.raises(RuntimeError, match="step 2 is under way: save and evaluate in the body of `for step in"):
        trainer.run()


def test_another_step_than_the_last_is_not_saved(folder, tmp_path):
    trainer = on_numpy(folder, tmp_path / "run")
    next(trainer.steps())
    with pytest.raises(ValueError, match="step 3: the run stands after step 1"):
        trainer.save(3)


def steps_in(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_run_once(folder, tmp_path):
    trainer = on_numpy(folder, tmp_path / "run")
    trainer.run()
    with pytest.raises(UserError, match="this Trainer has run; make another to go on"):
        trainer.run()
    with pytest.raises(UserError, match="this Trainer is at its last step, 4"):
        trainer.steps()
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4]


def test_a_loop_that_was_left_goes_on(folder, tmp_path):
    """In another loop or a run, behind the last step, with the batches that come next."""
    whole = on_numpy(folder, tmp_path / "whole", steps=6)
    losses = [record.loss for record in whole.steps()]
    trainer, got = on_numpy(folder, tmp_path / "run", steps=6), []
    for _ in range(2):
        for record in trainer.steps():
            got.append(record.loss)
            if record.step % 2 == 0:
                break
    summary = trainer.run()
    assert got == losses[:4]
    assert (summary.steps, summary.final_loss) == (2, losses[-1])
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


def test_a_run_that_broke_off_is_not_gone_on_with(folder, tmp_path):
    """Of the step that was under way nobody knows how far it got."""

    class Breaking:
        def step_finished(self, record: Any) -> None:
            raise OSError("disk full")

    trainer = on_numpy(folder, tmp_path / "run")
    trainer.observe(Breaking())
    with pytest.raises(OSError, match="disk full"):
        trainer.run()
    with pytest.raises(UserError, match='step 2 was broken off; make another Trainer, with resume="latest"'):
        trainer.steps()


def test_tokens_per_second_are_those_that_went_through_the_model(folder, tmp_path):
    """Prompts too, which have no target; padding not. Those trained on are told beside them."""
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"input_ids": list(range(1, 21)), "labels": [-100] * 15 + list(range(16, 21))}) + "\n")
    trainer = on_numpy(folder, tmp_path / "run", data=str(data), accumulate=2, pack=False)
    records = list(trainer.steps())
    for record in records:
        assert (record.positions, record.tokens, record.row_tokens) == (4 * 20, 4 * 5, 4 * 32)
        assert record.tokens_per_second * record.step_seconds == pytest.approx(4 * 20)
        assert record.trained_tokens_per_second * record.step_seconds == pytest.approx(4 * 5)
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert (line["positions"], line["tokens"]) == (4 * 20, 4 * 5)
    assert line["tokens_per_second"] == pytest.approx(4 * line["trained_tokens_per_second"])


def test_a_clock_that_is_set_back_makes_no_step_shorter(folder, tmp_path, monkeypatch):
    real = time.time_ns
    shift = [0]

    class Setter:
        def step_finished(self, record: Any) -> None:
            shift[0] -= 3600 * 10**9

    monkeypatch.setattr(time, "time_ns", lambda: real() + shift[0])
    trainer = on_numpy(folder, tmp_path / "run", eval_data=str(folder / "train.jsonl"), eval_every=2)
    trainer.observe(Setter())
    for record in trainer.steps():
        assert 1e-5 < record.step_seconds < 60
        assert record.end_ns - record.start_ns == pytest.approx(record.step_seconds * 1e9)
        assert abs(record.end_ns - (real() + shift[0] + 3600 * 10**9)) < 60e9  # the date of the moment it was told
        for span in record.spans:
            assert record.start_ns <= span.start_ns <= span.end_ns <= record.end_ns


def test_the_body_of_the_loop_is_nobodys_time(folder, tmp_path):
    seconds = []
    for record in on_numpy(folder, tmp_path / "run").steps():
        seconds.append(record.step_seconds)
        time.sleep(0.5)
    assert max(seconds[1:]) < 0.5


def test_observers_write_what_they_hold_back_before_a_checkpoint_counts(folder, tmp_path):
    """Or a process that is killed leaves a checkpoint whose trace ends before it."""
    told: list[Any] = []

    class Observer:
        def step_finished(self, record: Any) -> None:
            told.append(record.step)

        def flush(self) -> None:
            told.append([path.name for path in run_checkpoint.find_checkpoints(tmp_path / "run")])

        def checkpoint_saved(self, record: Any) -> None:
            told.append(Path(record.path).name)

    trainer = on_numpy(folder, tmp_path / "run", save_every=2)
    trainer.observe(Observer())
    trainer.run()
    first, last = "checkpoint-000002", "checkpoint-000004"
    assert told == [1, 2, [], first, 3, 4, [first], last]
