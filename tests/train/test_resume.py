"""Runs that stop and go on: bit-equal to those that never stopped; checkpoints that are whole or absent."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import observability
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.files.safetensors_file import SafetensorsFile
from entrenar_gpu.files.tensor_source import save_safetensors
from entrenar_gpu.gpu.clock import GpuClock, step_spans
from entrenar_gpu.ops.optimizer import STATE_FIELDS
from entrenar_gpu.session.graphs import MARGIN
from entrenar_gpu.session.session import Budget
from entrenar_gpu.train import run_checkpoint
from entrenar_gpu.train.metrics_file import MetricsFile
from entrenar_gpu.train.trainer import Trainer
from observability.read.step_table import step_table
from observability.read.trace_reader import read_trace
from tests import ROOT
from tests.helpers.runs import config_of, reseal, train
from tests.helpers.tiny import make_data, make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    make_model(path / "model", **TINY)
    make_data(path / "train.jsonl", vocab=96)
    return path


RUNS: dict[str, dict[str, Any]] = {
    "qlora, dropout": {"dropout": 0.2, "accumulate": 2},
    "noisy, B faster": {"neftune": 5.0, "lr_ratio_b": 4.0},
    "lora, sgd": {"method": "lora", "optimizer": "sgd", "lr": 0.1, "pack": False},
    "full": {"method": "full", "lr": 2e-3},
}


@pytest.mark.gpu
@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_one_that_never_stopped(folder, tmp_path, kernels, run):
    """To the bit, over the end of an epoch; and so are two runs of the same."""
    options = {"steps": 9, "schedule": "cosine", "save_every": 4} | RUNS[run]
    whole = train(folder, str(tmp_path / "whole"), kernels, **options)
    assert whole == train(folder, str(tmp_path / "again"), kernels, **options)
    resumed = train(
        folder, str(tmp_path / "whole2"), kernels, resume=str(tmp_path / "whole/checkpoint-000004"), **options
    )
    assert resumed == whole[4:]
    result = "model.safetensors" if run == "full" else "adapter_model.safetensors"
    assert (tmp_path / "whole" / result).read_bytes() == (tmp_path / "whole2" / result).read_bytes()
    assert len(set(whole)) == len(whole)


@pytest.mark.gpu
def test_a_resumed_run_plans_for_the_memory_it_began_with(folder, tmp_path, kernels, monkeypatch):
    """What is free changes from day to day on some systems, and what a plan keeps in half precision would with it."""
    monkeypatch.setattr("entrenar_gpu.session.session.memory_budget", lambda config, caps: Budget(64 << 20, "now"))
    train(folder, str(tmp_path / "run"), kernels, steps=1, save_every=1)
    monkeypatch.undo()
    for given, planned in [(None, 64 << 20), (0.25, 1 << 28)]:
        options = {"resume": str(tmp_path / "run"), "steps": 2, "memory_budget": given}
        trainer = Trainer(config_of(folder, str(tmp_path / f"on {given}"), **options), kernels=kernels)
        trainer.session.close()
        assert trainer.session.budget.nbytes == planned


@pytest.mark.gpu
def test_a_resumed_run_is_reported_as_one(folder, tmp_path, kernels):
    """Interrupted twice, the first time a step after its checkpoint."""
    output = str(tmp_path / "run")
    for steps, resume in [(5, None), (6, "run/checkpoint-000004"), (8, "run")]:
        config = config_of(folder, output, steps=steps, save_every=4, resume=resume and str(tmp_path / resume))
        trainer = Trainer(config, kernels=kernels)
        trainer.observe(observability.observe(output))
        trainer.run()
        trainer.session.close()
    table = step_table(read_trace(output), output)
    assert table.step.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert table.restarts == (4, 6)


@pytest.mark.gpu
def test_a_run_resumed_on_a_smaller_adapter_plans_for_that_one(folder, tmp_path, kernels, monkeypatch):
    def planned(memory: int, name: str, **options: Any) -> int:
        monkeypatch.setattr(kernels.device, "caps", replace(kernels.device.caps, memory_bytes=memory))
        trainer = Trainer(config_of(folder, str(tmp_path / name), save_every=1, **options), kernels=kernels)
        trainer.run()
        trainer.session.close()
        return trainer.session.budget.nbytes

    began = planned(1 << 30, "run", steps=1)
    assert planned((1 << 30) - (50 << 20), "same", steps=2, resume=str(tmp_path / "run")) == began
    assert planned(1 << 29, "smaller", steps=2, resume=str(tmp_path / "run")) == int((1 << 29) * MARGIN)


@pytest.mark.gpu
def test_the_newest_checkpoint_is_resumed_and_metrics_go_on(folder, tmp_path, kernels):
    """An interrupted run: `--resume` without a folder takes up where it was, and metrics hold each step once."""
    output = str(tmp_path / "run")
    trainer = Trainer(config_of(folder, output, save_every=3), kernels=kernels)
    losses = {}
    for record in trainer.steps():
        losses[record.step] = record.loss
        if record.step == 5:
            break
    trainer.session.close()
    for loss in train(folder, output, kernels, resume="latest", save_every=3):
        losses[len([s for s in losses if s <= 3]) + 1 if 4 not in losses else max(losses)] = loss
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))


@pytest.mark.gpu
def test_an_interrupt_saves_what_was_done(folder, tmp_path, kernels):
    whole = train(folder, str(tmp_path / "whole"), kernels)
    summary = None

    class Interrupter:
        def step_finished(self, record: Any) -> None:
            if record.step == 4:
                os.kill(os.getpid(), signal.SIGINT)

    trainer = Trainer(config_of(folder, str(tmp_path / "run")), [Interrupter()], kernels)
    summary = trainer.run()
    trainer.session.close()
    assert summary.status == "interrupted"
    assert summary.steps in (4, 5)  # the device may have been at the next one already
    resumed = train(folder, str(tmp_path / "run"), kernels, resume="latest")
    assert resumed == whole[summary.steps :]


def numpy_run(folder: Path, output: Path, **options: Any) -> list[float]:
    return train(folder, str(output), device="numpy", **({"steps": 4} | options))


def test_only_the_newest_checkpoints_are_kept(folder, tmp_path):
    numpy_run(folder, tmp_path / "run", steps=6, save_every=1, save_total_limit=2)
    assert sorted(p.name for p in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-000005", "checkpoint-000006"]


def test_going_on_from_an_older_checkpoint_abandons_the_later_ones(folder, tmp_path):
    """Only once the run goes on, and in its own folder: one that is refused, or made and not started, loses nothing."""
    run = tmp_path / "run"
    numpy_run(folder, run, steps=6, save_every=2)

    def held() -> tuple[list[int], list[int]]:
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [int(path.name[-6:]) for path in run_checkpoint.find_checkpoints(run)], steps

    options = {"resume": str(run / "checkpoint-000002"), "steps": 6, "save_every": 1, "save_total_limit": 1}
    with pytest.raises(UserError, match="made with seed 0"):
        numpy_run(folder, run, seed=3, **options)
    numpy_run(folder, tmp_path / "elsewhere", **options)
    trainer = Trainer(config_of(folder, str(run), device="numpy", **options))

    class Refusing:
        def run_started(self, info: Any) -> None:
            raise UserError("no tracing")

    with pytest.raises(UserError, match="no tracing"):
        Trainer(trainer.config, [Refusing()]).run()
    assert held() == ([2, 4, 6], [1, 2, 3, 4, 5, 6])
    next(trainer.steps())  # and then it was killed
    assert held() == ([2], [1, 2, 3])
    numpy_run(folder, run, **options)
    assert held() == ([6], [1, 2, 3, 4, 5, 6])


def test_a_checkpoint_on_another_disk_is_of_the_run_that_links_to_it(folder, tmp_path):
    run, kept = tmp_path / "run", tmp_path / "disk"
    numpy_run(folder, run, steps=4, save_every=2)
    kept.mkdir()
    for name in ("checkpoint-000002", "checkpoint-000004"):
        (run / name).rename(kept / name)
        (run / name).symlink_to(kept / name)
    numpy_run(folder, run, steps=6, resume="latest")
    numpy_run(folder, run, steps=6, resume=str(run / "checkpoint-000002"))
    assert sorted(p.name for p in run.glob("*checkpoint*")) == ["checkpoint-000002", "checkpoint-000006"]
    assert (kept / "checkpoint-000004/adapter_model.safetensors").exists()


def test_a_run_without_a_checkpoint_is_not_said_to_have_one(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"already holds a run or a model; use another folder$"):
        numpy_run(folder, run)


def test_an_evaluation_that_is_missing_at_the_end_is_made(folder, tmp_path):
    numpy_run(folder, tmp_path / "run", steps=3)
    options = {"steps": 3, "resume": "latest", "eval_data": str(folder / "train.jsonl")}
    for _ in range(2):
        numpy_run(folder, tmp_path / "run", **options)
        lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "eval_loss" in line] == [3]


def test_a_step_on_the_host_ends_when_it_is_done(folder, tmp_path):
    """Not when it is asked after, a step later: a slow observer of one step would make the next look long."""
    trainer = Trainer(config_of(folder, str(tmp_path / "run"), device="numpy", steps=2))
    trainer.session.write_batch(next(trainer.batches).micro_batches[0])
    report = trainer.executor.run("update")
    done = time.monotonic_ns()
    time.sleep(0.05)
    _, end = step_spans(report, trainer.session.fitted.plan.groups, 0, GpuClock(), 0)
    assert end == report.done_ns <= done


@pytest.mark.parametrize(("at", "status"), [(0, "interrupted"), (4, "finished")])
def test_evaluations_are_made_once_and_a_run_interrupted_in_its_last_is_finished(folder, tmp_path, at, status):
    class Interrupter:
        def eval_finished(self, record: Any) -> None:
            if record.step == at:
                os.kill(os.getpid(), signal.SIGINT)

    options = {"steps": 4, "device": "numpy", "eval_data": str(folder / "train.jsonl")}
    assert Trainer(config_of(folder, str(tmp_path / "run"), **options), [Interrupter()]).run().status == status
    resumed = Trainer(config_of(folder, str(tmp_path / "run"), resume="latest", **options)).run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "eval_loss" in line) for line in lines] == [
        *[(0, True), (1, False), (2, False), (3, False), (4, False), (4, True)]
    ]
    assert (resumed.status, resumed.final_loss) == ("finished", lines[-2]["loss"])


KILLED = """
import os, signal, sys
from entrenar_gpu.train import run_checkpoint
from tests.helpers.runs import train
from pathlib import Path
saved, real = [], run_checkpoint.save_safetensors
def save(path, *rest):
    saved.append(path)
    real(path, *rest)
    if len(saved) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
run_checkpoint.save_safetensors = save
train(Path(sys.argv[1]), sys.argv[2], device="numpy", steps=5, save_every=1)
"""


def test_a_run_killed_while_saving_leaves_the_checkpoints_before(folder, tmp_path):
    """Killed with the optimizer's moments of step 3 on the disk, but not its state."""
    root = ROOT
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(tmp_path / "run")], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in run_checkpoint.find_checkpoints(tmp_path / "run")] == [
        "checkpoint-000001",
        "checkpoint-000002",
    ]
    assert list((tmp_path / "run").glob(".checkpoint-000003.*.tmp"))
    resumed = numpy_run(folder, tmp_path / "run", resume="latest", steps=5)
    assert resumed == numpy_run(folder, tmp_path / "whole", steps=5)[2:]
    assert not list((tmp_path / "run").glob(".*"))


STARTED = """
import os, signal, sys
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import config_of
from pathlib import Path
for record in Trainer(config_of(Path(sys.argv[1]), sys.argv[2], device="numpy", steps=4)).steps():
    if record.step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_killed_before_its_first_checkpoint_is_started_again(folder, tmp_path):
    command = [sys.executable, "-c", STARTED, str(folder), str(tmp_path / "run")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) >= 2
    assert numpy_run(folder, tmp_path / "run") == numpy_run(folder, tmp_path / "whole")
    lines = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4]


def test_a_checkpoint_is_deleted_under_another_name(folder, tmp_path, monkeypatch):
    """Else a run killed while deleting one would leave half a checkpoint to resume from."""
    numpy_run(folder, tmp_path / "run", save_every=2)
    monkeypatch.setattr(run_checkpoint, "remove", lambda path: None)
    run_checkpoint._remove(tmp_path / "run/checkpoint-000002")
    assert [p.name for p in run_checkpoint.find_checkpoints(tmp_path / "run")] == ["checkpoint-000004"]


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 5}, "made with rank 4, this run has 5"),
    "method": ({"method": "lora"}, "made with method 'qlora'"),
    "optimizer": ({"optimizer": "sgd"}, "made with optimizer 'adamw'"),
    "seed": ({"seed": 3}, "made with seed 0"),
    "batch": ({"batch": 3}, "made with batch 2"),
    "shuffling": ({"shuffle": False}, "other data, or another"),
    "steps": ({"steps": 2}, "is at step 4 already"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_checkpoint_of_another_run_is_refused(folder, tmp_path, change):
    numpy_run(folder, tmp_path / "run")
    options, message = CHANGES[change]
    with pytest.raises(UserError, match=message):
        numpy_run(folder, tmp_path / "run", resume="latest", **options)


@pytest.mark.gpu
def test_a_refused_checkpoint_leaves_no_memory_taken(folder, tmp_path, kernels):
    numpy_run(folder, tmp_path / "run")
    held = kernels.device.allocated_bytes
    with pytest.raises(UserError, match="made with seed 0"):
        train(folder, str(tmp_path / "run"), kernels, steps=4, resume="latest", seed=3)
    assert kernels.device.allocated_bytes == held


def test_the_checkpoint_of_another_model_or_other_data_is_refused(folder, tmp_path):
    numpy_run(folder, tmp_path / "run")
    other = tmp_path / "other"
    make_model(other / "model", seed=5, **TINY)
    make_data(other / "train.jsonl", vocab=96, seed=5)
    with pytest.raises(UserError, match="checkpoint of another model"):
        numpy_run(folder, tmp_path / "run", resume="latest", model=str(other / "model"))
    with pytest.raises(UserError, match="made with other data"):
        numpy_run(folder, tmp_path / "run", resume="latest", data=str(other / "train.jsonl"))


def test_what_is_no_checkpoint_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        numpy_run(folder, tmp_path / "run", resume="latest")
    with pytest.raises(UserError, match=r"^resume: .* is not a checkpoint"):
        numpy_run(folder, tmp_path / "run", resume=str(folder))
    numpy_run(folder, tmp_path / "run")
    for text in ("[]", "[" * 100_000):
        (tmp_path / "run/checkpoint-000004/trainer_state.json").write_text(text)
        with pytest.raises(UserError, match="not the state of a training run"):
            numpy_run(folder, tmp_path / "run", resume="latest")


MOMENT = "moment1.matrix.0"
DAMAGES: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "no moments": (lambda t: t.pop(MOMENT), "holds other tensors than this run's optimizer"),
    "another tensor": (lambda t: t.update(rope_table=np.zeros((32, 8), np.float32)), "holds other tensors than"),
    "whole numbers": (lambda t: t.update({MOMENT: t[MOMENT].astype(np.int64)}), f"{MOMENT!r} does not fit this run"),
    "another shape": (lambda t: t.update({MOMENT: t[MOMENT][1:]}), f"{MOMENT!r} does not fit this run"),
    "moments not finite": (lambda t: t[MOMENT].fill(np.nan), f"{MOMENT!r} holds numbers that are not finite"),
    "counters not finite": (
        lambda t: t["optimizer_state"].fill(np.inf),
        "'optimizer_state' holds numbers that are not",
    ),
}


def change_optimizer(run: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    path = run_checkpoint.find_checkpoints(run)[-1] / "optimizer.safetensors"
    file = SafetensorsFile(path)
    tensors = {name: np.array(file[name]) for name in file.tensors}
    change(tensors)
    save_safetensors(path, tensors)
    reseal(path.parent)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_optimizer_is_refused(folder, tmp_path, damage):
    change, message = DAMAGES[damage]
    numpy_run(folder, tmp_path / "run", steps=1)
    change_optimizer(tmp_path / "run", change)
    with pytest.raises(UserError, match=rf"optimizer\.safetensors: .*{message}"):
        numpy_run(folder, tmp_path / "run", resume="latest")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_a_flipped_bit_is_one_line_naming_file_and_tensor(folder, tmp_path, method):
    """Wherever it is: in weights, moments, headers, configuration or state."""
    options = {"steps": 1, "method": method}
    numpy_run(folder, tmp_path / "run", **options)
    checkpoint = tmp_path / "run/checkpoint-000001"
    for path in sorted(checkpoint.iterdir()):
        whole = path.read_bytes()
        places = {len(whole) // 2: re.escape(path.name)}
        if path.suffix == ".safetensors":
            file = SafetensorsFile(path)
            last, info = list(file.tensors.items())[-1]
            places = {info.start + info.nbytes // 2: f"{re.escape(path.name)}: damaged: tensor {last!r}"}
            places[info.start] = f"tensor {last!r}"
            places[40] = re.escape(path.name)  # in the header
        for at, names in places.items():
            flip(path, at)
            with pytest.raises(UserError, match=names) as caught:
                numpy_run(folder, tmp_path / "run", resume="latest", **(options | {"steps": 2}))
            assert "\n" not in str(caught.value)
            path.write_bytes(whole)
    assert len(numpy_run(folder, tmp_path / "run", resume="latest", **(options | {"steps": 2}))) == 1


def test_the_base_is_not_read_again_at_a_save(folder, tmp_path):
    """It may be gone, or another, by then."""
    base = tmp_path / "base"
    make_model(base / "model", **TINY)
    make_data(base / "train.jsonl", vocab=96)
    trainer = Trainer(config_of(base, str(tmp_path / "run"), device="numpy", steps=4, save_every=1))
    for record in trainer.steps():
        if record.step == 1:
            trainer.save()
            os.truncate(base / "model/model.safetensors", 0)
    assert run_checkpoint.find_checkpoints(tmp_path / "run")[-1].name == "checkpoint-000004"


def test_a_run_goes_on_after_a_skipped_step(folder, tmp_path):
    """Which leaves the loss and the norm that were not finite in the optimizer's state."""
    whole = numpy_run(folder, tmp_path / "run")
    numpy_run(folder, tmp_path / "skipped", steps=1)
    indices = [STATE_FIELDS.index("loss"), STATE_FIELDS.index("grad_norm")]
    change_optimizer(tmp_path / "skipped", lambda t: t["optimizer_state"].put(indices, np.nan))
    assert numpy_run(folder, tmp_path / "skipped", resume="latest") == whole[1:]


def test_a_resumed_run_shows_templates_the_day_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3's template writes the date: with today's, the data of a resumed run would be other data."""
    seen: list[datetime] = []
    monkeypatch.setattr(
        "entrenar_gpu.train.trainer.load_data", lambda config, started, *_: seen.append(started) or 1 / 0
    )
    model = make_model(tmp_path / "model")
    folder = tmp_path / "run" / "checkpoint-000001"
    folder.mkdir(parents=True)
    state = {
        "step": 1,
        "started": "2024-07-26T12:00:00",
        "data": {},
        "config": {},
        "model": {},
        "tiles": {},
        "budget": None,
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))
    for resume in (None, str(folder)):
        config = TrainConfig(model=str(model), data="d", output=str(tmp_path / "new"), resume=resume)
        with pytest.raises(ZeroDivisionError):
            Trainer(config)
    assert abs((seen[0] - datetime.now()).total_seconds()) < 60
    assert seen[1] == datetime(2024, 7, 26, 12)


@pytest.mark.parametrize(
    "changed",
    [
        {"tiles": {"f32 nt 4096x4096x64": [0] * 9}},
        {"tiles": {"f32 nt 4096x4096x64": [64, 64, 16]}},
        {"tiles": {"f32 nt 4096x4096x64": [64, 64, 16, 8, 4, 1, 1, 1, -4]}},
        {"tiles": {"f32 nt 4096x4096x64": [64, 64, 16, 8, 4, 1, 1, 1, math.inf]}},
        *({"budget": value} for value in (-1, math.inf, 10**400)),
        *({"step": value} for value in (-5, 1.5, True, "1", math.inf, 2**53)),
        *({key: []} for key in ("data", "config", "model")),
    ],
)
def test_a_state_that_no_run_has_written_is_one_line(tmp_path, changed):
    fine = {"step": 1, "started": "2024-07-26T12:00:00", "data": {}, "config": {}, "model": {}, "budget": None}
    fine["tiles"] = {"f32 nt 4096x4096x64": [64, 64, 16, 8, 4, 1, 1, 1, 0]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(fine))
    run_checkpoint.read_state(tmp_path)
    (tmp_path / "trainer_state.json").write_text(json.dumps({**fine, **changed}))
    with pytest.raises(UserError, match=r"trainer_state\.json: not the state of a training run"):
        run_checkpoint.read_state(tmp_path)


def test_lines_of_metrics_that_no_run_has_written_are_dropped(tmp_path):
    fine = [b'{"step": 1}', b'{"step": 2, "eval_loss": 0.5}']
    odd = [b"\xff\xfe", b'{"step": 1e999}', b"[" * 100_000, b"[]", b'{"step": 3}', b'{"step": 3']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([fine[0], *odd, fine[1]]))
    MetricsFile(tmp_path).truncate(2)
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == fine
