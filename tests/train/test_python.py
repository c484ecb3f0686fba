"""The Trainer as a Python program uses it: data of its own, observers that ask, interrupts, threads."""

from __future__ import annotations

import itertools
import json
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.data import given as given_module
from entrenar_gpu.errors import UserError
from entrenar_gpu.files.safetensors_file import SafetensorsFile
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.tiny import make_data, make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    make_model(folder / "model", **TINY)
    make_data(folder / "train.jsonl", vocab=96)
    return folder


@pytest.fixture
def rows(folder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def trainer_on(folder: Path, output: Path, observers: Any = (), given: Any = None, held_out: Any = None, **options):
    shape = {"steps": 4, "batch": 2, "seq": 32, "rank": 4, "lr": 5e-3, "device": "numpy", "target": ["q", "v_proj"]}
    options = shape | {"model": str(folder / "model"), "output": str(output)} | options
    return Trainer(TrainConfig(**options), observers, data=given, eval_data=held_out)


def losses(trainer: Trainer) -> list[float]:
    with trainer:
        return [record.loss for record in trainer.steps()]


def test_a_folder_brings_its_own_evaluation_data(folder, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        (tmp_path / f"data/{name}.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    with trainer_on(folder, tmp_path / "run", given=tmp_path / "data", eval_every=1) as trainer:
        assert trainer.eval_samples is not None
        assert len(trainer.eval_samples) == 1


class Rows:
    """A data set as torch has them: a length and items."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def test_the_same_rows_however_they_come(folder, tmp_path, rows):
    datasets = pytest.importorskip("datasets")
    tokens = [np.array(row["input_ids"]) for row in rows]
    forms = {
        "config": None,
        "path": folder / "train.jsonl",
        "list": rows,
        "tuple of arrays": tuple(tokens),
        "lists of ids": [t.tolist() for t in tokens],
        "data set": datasets.Dataset.from_list(rows),
        "items": Rows(rows),
    }
    found = {}
    for form, data in forms.items():
        named = {"data": str(folder / "train.jsonl")} if data is None else {}
        found[form] = losses(trainer_on(folder, tmp_path / form, given=data, steps=2, **named))
    assert len(found["config"]) == 2
    assert all(each == found["config"] for each in found.values())


def test_a_generator_without_steps_is_read_to_its_end(folder, tmp_path, rows):
    whole = trainer_on(folder, tmp_path / "a", given=rows, steps=None, epochs=1)
    read = trainer_on(folder, tmp_path / "b", given=(row for row in rows), held_out=iter(rows), steps=None, epochs=1)
    assert read.train_samples.fingerprint == whole.train_samples.fingerprint == read.eval_samples.fingerprint
    assert read.total_steps == whole.total_steps


def test_data_without_an_end_need_steps(folder, tmp_path, rows, monkeypatch):
    monkeypatch.setattr(given_module, "MOST_ROWS", 100)
    with pytest.raises(UserError, match=r"^data: no end after 100 rows; say how many steps to take$"):
        trainer_on(folder, tmp_path / "run", given=itertools.cycle(rows), steps=None)


def test_an_endless_iterator_is_read_as_steps_need_it_and_goes_on_after_a_checkpoint(folder, tmp_path, rows):
    taken: list[int] = []

    def endless():
        for number, row in enumerate(itertools.cycle(rows)):
            taken.append(number)
            yield row

    assert len(losses(trainer_on(folder, tmp_path / "short", given=endless(), steps=2))) == 2
    assert len(taken) < 300
    whole = losses(trainer_on(folder, tmp_path / "whole", given=endless(), save_every=2))
    resumed = trainer_on(folder, tmp_path / "whole", given=endless(), resume=str(tmp_path / "whole/checkpoint-000002"))
    assert losses(resumed) == whole[2:]


def test_rows_that_can_be_begun_anew_are_and_others_end_the_run(folder, tmp_path, rows):
    class Anew:
        def __iter__(self):
            return iter(rows)

    assert len(losses(trainer_on(folder, tmp_path / "anew", given=Anew(), steps=30))) == 30
    with trainer_on(folder, tmp_path / "once", given=iter(rows), steps=30) as once:
        summary = once.run()
    assert summary.status == "finished"
    assert summary.steps < 30
    assert summary.stopped == f"the data ended at step {summary.steps} of 30"
    assert (tmp_path / "once/adapter_model.safetensors").exists()
    with pytest.raises(UserError, match=r"^data: holds no token to train"):
        trainer_on(folder, tmp_path / "none", given=iter([]), steps=3).run()


def test_one_array_of_tokens_is_cut_into_rows(folder, tmp_path):
    trainer = trainer_on(folder, tmp_path / "run", given=np.arange(100) % 96)
    assert trainer.train_samples.lengths.tolist() == [32, 32, 32, 4]


BAD_DATA = {
    "a mapping": ({"train": []}, "data: a mapping of 'train', not rows; give one of its values"),
    "a number": (3, "data: neither a path nor rows, but of type int"),
    "a missing file": ("nowhere.jsonl", r"data: nowhere\.jsonl not found"),
    "a bad row": ([{"input_ids": [1, 2]}, {"input_ids": [96]}], r"data\[1\]: input_ids: token id 96 is outside"),
    "nothing": ([], "data: holds no token to train"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_errors_name_the_argument(folder, tmp_path, case):
    data, message = BAD_DATA[case]
    with pytest.raises(UserError, match=f"^{message}"):
        trainer_on(folder, tmp_path / "run", given=data)


def test_options_are_called_as_python_calls_them(folder, tmp_path, rows):
    for options, message in (
        ({"save_total_limit": 0}, "^save_total_limit: 0 is below 1"),
        ({"target": ["q", "nose"]}, "^target: nose_proj; choose from"),
        ({"eval_every": 2}, "^eval_every: no evaluation data; give eval_data, or a valid file in a data folder"),
        ({"seq": 600}, "^seq: 600 exceeds"),
    ):
        with pytest.raises(UserError, match=message):
            trainer_on(folder, tmp_path / "run", given=rows, **options)
    with pytest.raises(UserError, match=r"^data: missing$"):
        trainer_on(folder, tmp_path / "run")


def test_a_loop_may_stop_and_the_result_is_that_of_its_last_step(folder, tmp_path, rows):
    with trainer_on(folder, tmp_path / "run", given=rows, held_out=rows[:4]) as trainer:
        for step in trainer.steps():
            if step.step == 2:
                trainer.stop("enough")
        state = trainer.state_dict()
    saved = SafetensorsFile(tmp_path / "run/adapter_model.safetensors")
    assert state.keys() == saved.tensors.keys()
    assert all(np.array_equal(state[name], saved[name]) for name in state)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "eval_loss" in line) for line in lines] == [(0, True), (1, False), (2, False), (2, True)]


class Asking:
    """An observer that asks at one step, and keeps what it was told."""

    def __init__(self, at: int, ask) -> None:
        self.at, self.ask, self.told = at, ask, []

    def attached(self, control) -> None:
        self.control = control

    def step_finished(self, record) -> None:
        self.told.append(("step", record.step, record.lr))
        if record.step == self.at:
            self.ask(self.control)

    def eval_finished(self, record) -> None:
        self.told.append(("eval", record.step))

    def checkpoint_saved(self, record) -> None:
        self.told.append(("save", record.step))


def ask_all(control) -> None:
    control.save()
    control.evaluate()
    control.learning_rate = 1e-5


def test_observers_may_ask(folder, tmp_path, rows):
    """In a run the step after the one that is told of is under way by then; in a loop none is."""
    for name, first in (("run", 3), ("loop", 2)):
        asking = Asking(2, ask_all)
        with trainer_on(folder, tmp_path / name, [asking], rows, rows[:4], steps=5, schedule="constant") as trainer:
            trainer.run() if name == "run" else list(trainer.steps())
        asked = [entry for entry in asking.told if entry[0] != "step"]
        assert asked == [("eval", 0), ("eval", first), ("save", first), ("eval", 5), ("save", 5)]
        rates = [entry[2] for entry in asking.told if entry[0] == "step"]
        assert rates == [5e-3] * first + [1e-5] * (5 - first)


def test_an_observer_may_stop_a_run(folder, tmp_path, rows):
    asking = Asking(2, lambda control: control.stop("good enough"))
    with trainer_on(folder, tmp_path / "run", [asking], rows, steps=9) as trainer:
        summary = trainer.run()
    assert (summary.status, summary.steps, summary.stopped) == ("finished", 3, "good enough")
    assert (tmp_path / "run/adapter_model.safetensors").exists()


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_a_bad_rate_is_refused(folder, tmp_path, rows, rate):
    with (
        trainer_on(folder, tmp_path / "run", given=rows) as trainer,
        pytest.raises(UserError, match=r"^learning_rate: "),
    ):
        trainer.learning_rate = rate


def test_an_interrupt_leaves_a_trainer_that_goes_on(folder, tmp_path, rows):
    whole = losses(trainer_on(folder, tmp_path / "whole", given=rows))

    class Interrupting:
        def step_finished(self, record) -> None:
            if record.step == 2:
                signal.raise_signal(signal.SIGINT)

    with trainer_on(folder, tmp_path / "loop", [Interrupting()], rows) as trainer:
        seen = []
        with pytest.raises(KeyboardInterrupt):
            seen.extend(record.loss for record in trainer.steps())
        assert trainer.state_dict()
        trainer.save()
        seen += [record.loss for record in trainer.steps()]
    assert seen == [*whole[:1], *whole[2:]]
    with trainer_on(folder, tmp_path / "run", [Interrupting()], rows) as trainer:
        assert trainer.run().status == "interrupted"
        assert trainer.run().status == "finished"
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == whole


def test_a_run_in_a_thread(folder, tmp_path, rows):
    summaries = []
    with trainer_on(folder, tmp_path / "run", given=rows) as trainer:
        thread = threading.Thread(target=lambda: summaries.append(trainer.run()))
        thread.start()
        thread.join()
    assert summaries[0].status == "finished"
    traces = {trace.name: trace for trace in summaries[0].plot().data}
    assert list(traces["loss"].x) == [1, 2, 3, 4]
    assert traces["loss"].y == trainer.plot().data[0].y


@pytest.fixture
def evaluations(monkeypatch):
    """Evaluation losses that fall twice and rise then."""
    told = itertools.chain([5.0, 4.0, 3.0], itertools.count(3.5, 0.5))
    monkeypatch.setattr("entrenar_gpu.train.trainer.evaluate", lambda session, samples: (next(told), 9))


def test_the_best_checkpoint_is_kept_and_is_the_result(folder, tmp_path, rows, evaluations):
    options = {"steps": 12, "eval_every": 2, "keep_best": True, "save_total_limit": 1, "schedule": "constant"}
    with trainer_on(folder, tmp_path / "run", (), rows, rows[:6], **options) as trainer:
        summary = trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert best == 4
    assert summary.result == f"the result is that of step {best}, with evaluation loss {losses[best]:.4f}"
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == [
        f"checkpoint-{best:06}",
        "checkpoint-000012",
    ]
    result, kept = (SafetensorsFile(tmp_path / f / "adapter_model.safetensors")
                    for f in ("run", f"run/checkpoint-{best:06}"))  # fmt: skip
    assert all(np.array_equal(result[name], kept[name]) for name in kept.tensors)


def test_patience_ends_a_run_that_gets_no_better(folder, tmp_path, rows, evaluations):
    options = {"steps": 40, "eval_every": 2, "patience": 2, "schedule": "constant"}
    with trainer_on(folder, tmp_path / "run", (), rows, rows[:6], **options) as trainer:
        summary = trainer.run()
    assert summary.stopped == "no better evaluation loss in 2 evaluations"
    assert summary.steps == 8


def test_evaluations_by_passes_over_the_data(folder, tmp_path, rows):
    trainer = trainer_on(folder, tmp_path / "run", given=rows, held_out=rows[:4], steps=None, epochs=2, eval_epochs=0.5)
    asking = Asking(99, None)
    trainer.observe(asking)
    half = trainer.batches.steps(0.5)
    with trainer:
        trainer.run()
    evaluated = [entry[1] for entry in asking.told if entry[0] == "eval"]
    assert evaluated[:3] == [0, half, 2 * half]


def test_what_is_no_observer_is_told(folder, tmp_path, rows):
    for observers, message in (
        (None, "^observers: a NoneType, not a list of observers"),
        (Asking, "^observers: a type, not a list"),
        ([Asking], "^observers: Asking is a class, not an object of it"),
        ([print], "^observers: a builtin_function_or_method has no method of StepObserver"),
        (rows, "^observers: a dict has no method of StepObserver; rows go in as data="),
    ):
        with pytest.raises(UserError, match=message):
            trainer_on(folder, tmp_path / "run", observers, given=rows)
    with pytest.raises(UserError, match=r"^config: expected a TrainConfig, not a dict"):
        Trainer({"model": str(folder / "model")})


def test_before_the_first_step_a_run_may_be_asked_but_not_saved(folder, tmp_path, rows):
    trainer = trainer_on(folder, tmp_path / "run", given=rows, held_out=rows[:4])
    before = trainer.evaluate().loss
    with pytest.raises(UserError, match=r"^save: no step has been taken yet"):
        trainer.save()
    with pytest.raises(UserError, match=r"^sample_prompts: none to answer"):
        trainer.sample()
    with trainer:
        trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["eval_loss"] for line in lines if line["step"] == 0] == [before]
    for ask in (trainer.evaluate, trainer.state_dict, trainer.steps):
        with pytest.raises(UserError, match="this Trainer is closed; make another"):
            ask()


def test_paths_are_names_and_a_rate_is_a_number(folder, tmp_path, rows):
    trainer = trainer_on(folder, tmp_path / "run", given=rows, model=folder / "model")
    with trainer, pytest.raises(UserError, match=r"^learning_rate: 'fast' is not a number"):
        trainer.learning_rate = "fast"
    assert trainer.config.model == str(folder / "model")
    with pytest.raises(UserError, match=r"^model: .*config\.json: a file, not the folder of a model"):
        trainer_on(folder, tmp_path / "run", given=rows, model=folder / "model/config.json")
