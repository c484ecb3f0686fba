"""What a user can get wrong: one line that names it, exit status 2, and nothing lost or half written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu import cli
from entrenar_gpu.errors import DeviceLost, TrainingDiverged
from entrenar_gpu.files.safetensors_file import SafetensorsFile
from entrenar_gpu.files.tensor_source import save_safetensors
from entrenar_gpu.gpu.device import Device
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.train.run_checkpoint import find_checkpoints
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import config_of, train
from tests.helpers.tiny import QWEN3, make_data, make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    make_model(tmp_path / "model", **TINY)
    make_data(tmp_path / "train.jsonl", vocab=96)
    return tmp_path


def train_command(folder: Path, *more: str) -> list[str]:
    paths = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--output", str(folder / "run")]
    shape = ["--steps", "2", "--batch", "2", "--seq", "32", "--rank", "4", "--device", "numpy", "--quiet"]
    return ["train", *paths, *shape, *more]


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line that a command is refused with."""
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err.removeprefix("error: ").rstrip("\n")


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    path = folder / "model/model.safetensors"
    file = SafetensorsFile(path)
    tensors = {name: np.array(file[name]) for name in file.tensors}
    change(tensors)
    save_safetensors(path, tensors)


def write_index(folder: Path, shard: str) -> None:
    """An index that places every tensor in one shard."""
    names = list(SafetensorsFile(folder / "model/model.safetensors").tensors)
    (folder / "model/model.safetensors").rename(folder / "model/moved.safetensors")
    index = {"weight_map": dict.fromkeys(names, shard)}
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))


def truncate(folder: Path) -> None:
    with open(folder / "model/model.safetensors", "r+b") as stream:
        stream.truncate(20_000)


def write_data(folder: Path, *lines: str) -> None:
    (folder / "train.jsonl").write_text("".join(f"{line}\n" for line in lines))


def adapter_of_another_model(folder: Path) -> None:
    make_model(folder / "other/model", **(TINY | {"hidden_size": 48}))
    make_data(folder / "other/train.jsonl", vocab=96)
    train(folder / "other", "adapter", device="numpy", steps=1)


# What is wrong, the options that go with it, and what the line names.
CASES: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "missing shard": (
        lambda f: write_index(f, "model-00001-of-00001.safetensors"),
        [],
        ["model-00001-of-00001.safetensors: missing", "model.safetensors.index.json"],
    ),
    "truncated file": (truncate, [], ["model.safetensors: cut off", "the file at 20,000"]),
    "index out of the folder": (
        lambda f: write_index(f, "../model/moved.safetensors"),
        [],
        ["model.safetensors.index.json", "'../model/moved.safetensors' is not the name of a file in the model folder"],
    ),
    "wrong shape": (
        lambda f: change_tensors(f, lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1]})),
        [],
        [Q_PROJ, "has shape [31, 32]", "needs [32, 32]"],
    ),
    "wrong dtype": (
        lambda f: change_tensors(f, lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(np.int32)})),
        [],
        [Q_PROJ, "has dtype I32", "supported: F32, F16, BF16"],
    ),
    "missing tensor": (lambda f: change_tensors(f, lambda t: t.pop(Q_PROJ)), [], [Q_PROJ, "is missing"]),
    "unknown architecture": (
        lambda f: (f / "model/config.json").write_text(json.dumps(QWEN3 | {"architectures": ["GPT2LMHeadModel"]})),
        [],
        ["config.json: architecture 'GPT2LMHeadModel' is not supported", "Qwen3ForCausalLM"],
    ),
    "no model": (lambda f: (f / "model/config.json").unlink(), [], ["config.json: not found"]),
    "invalid line": (
        lambda f: write_data(f, '{"input_ids": [1, 2, 3]}', '{"input_ids": [1, 2'),
        [],
        ["train.jsonl:2: not valid JSON"],
    ),
    "nothing to train": (
        lambda f: write_data(f, '{"input_ids": [1, 2], "labels": [-100, -100]}', '{"input_ids": [3]}'),
        [],
        ["train.jsonl: holds no token to train (2 samples without any)"],
    ),
    "token beyond the vocabulary": (
        lambda f: write_data(f, '{"input_ids": [1, 2, 96]}'),
        [],
        ["train.jsonl:1: input_ids: token id 96 is outside the model's vocabulary of 96"],
    ),
    "no data": (lambda f: (f / "train.jsonl").unlink(), [], ["--data", "train.jsonl not found"]),
    "adapter for another model": (
        adapter_of_another_model,
        ["--adapter-init", "{folder}/other/adapter"],
        ["adapter_model.safetensors", "has shape [4, 48], this model needs [4, 32]", "adapter of another model"],
    ),
    "full training of an adapter": (
        lambda f: train(f, "other", device="numpy", steps=1),
        ["--method", "full", "--adapter-init", "{folder}/other"],
        ["--method full trains every weight and has no adapter", "--adapter-init"],
    ),
    **{
        f"another {option} than the adapter's": (
            lambda f: train(f, "other", device="numpy", steps=1),
            ["--adapter-init", "{folder}/other", f"--{option}", value],
            [f"--{option}: ", "other has another; leave it out, or --adapter-init"],
        )
        for option, value in (("rank", "8"), ("alpha", "3"), ("target", "q"))
    },
    "no adapter": (lambda f: None, ["--adapter-init", "{folder}"], ["adapter_config.json: not found"]),
    "checkpoint of another run": (
        lambda f: train(f, "other", device="numpy", steps=1, rank=5),
        ["--resume", "{folder}/other"],
        ["trainer_state.json: made with rank 5, this run has 4"],
    ),
    "no checkpoint": (lambda f: None, ["--resume"], ["--resume", "holds no checkpoint"]),
    "no evaluation data": (
        lambda f: None,
        ["--eval-every", "1"],
        ["--eval-every: no evaluation data; give --eval-data"],
    ),
    "no folder for the cache": (lambda f: None, ["--cache", "--cache-dir", ""], ["--cache-dir: missing"]),
    "rows too long": (lambda f: None, ["--seq", "600"], ["--seq: 600 exceeds the model's 512 positions"]),
    "flag out of bounds": (lambda f: None, ["--dropout", "1.5"], ["--dropout", "1.5"]),
    "unknown flag": (lambda f: None, ["--learning-speed", "1"], ["--learning-speed"]),
    "unknown projection": (lambda f: None, ["--target", "q,x"], ["--target: x_proj; choose from q_proj"]),
    "unknown key in a file": (
        lambda f: (f / "run.yaml").write_text("steps: 3\nlearing_rate: 1\n"),
        ["--config", "{folder}/run.yaml"],
        ["run.yaml: unknown key 'learing_rate'"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(folder, capsys, case):
    spoil, options, parts = CASES[case]
    spoil(folder)
    line = refusal(capsys, train_command(folder, *(option.format(folder=folder) for option in options)))
    for part in parts:
        assert part in line
    assert not (folder / "run").exists()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--resume", "{folder}/other"],
        ["--method", "full", "--output", "{folder}/model"],
        ["--method", "full", "--output", "{folder}/model", "--resume", "{folder}/other"],
    ],
    ids=["run", "run, with the checkpoint of another", "sharded model", "sharded model, with a checkpoint"],
)
def test_a_run_or_a_model_is_not_overwritten(folder, capsys, options):
    assert cli.run(train_command(folder)) == 0
    assert cli.run(train_command(folder, "--output", str(folder / "other"))) == 0
    write_index(folder, "moved.safetensors")
    before = contents(folder)
    assert {path.name for path in before} >= {"adapter_model.safetensors", "adapter_config.json", "metrics.jsonl"}
    capsys.readouterr()
    line = refusal(capsys, train_command(folder, *(option.format(folder=folder) for option in options)))
    assert "--output" in line
    assert "already holds a run or a model" in line
    assert contents(folder) == before


@pytest.mark.parametrize("output", ["train.jsonl", "train.jsonl/run", "new/" + "x" * 300])
def test_an_output_that_cannot_be_written_is_refused_before_loading(folder, capsys, monkeypatch, output):
    monkeypatch.setattr("entrenar_gpu.train.trainer.load_data", lambda *arguments: 1 / 0)
    before = sorted(folder.rglob("*"))
    assert f"{output}: cannot be written" in refusal(capsys, train_command(folder, "--output", str(folder / output)))
    assert sorted(folder.rglob("*")) == before


def test_nothing_is_written_for_a_collector_without_an_address(folder, capsys):
    assert cli.run(train_command(folder, "--otlp", "nonsense")) == 2
    assert "error: --otlp" in capsys.readouterr().err
    assert not (folder / "run").exists()


def test_samples_without_a_target_are_skipped_and_long_ones_cut(folder):
    write_data(folder, '{"input_ids": [5]}', json.dumps({"input_ids": list(range(1, 60))}), '{"input_ids": [1, 2]}')
    samples = Trainer(config_of(folder, device="numpy")).train_samples
    assert (len(samples), samples.skipped, samples.cut) == (2, 1, 1)
    assert samples.lengths.tolist() == [32, 2]


@pytest.mark.parametrize("step", [1, 2])
def test_a_full_disk_leaves_the_checkpoints_before(folder, capsys, monkeypatch, step):
    """Full when the second, or already the first, checkpoint is written: after adapter and moments, with the state."""
    real, flushed = os.fsync, []

    def fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        flushed.append(name)
        if sum("trainer_state" in n for n in flushed) == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert cli.run(train_command(folder, "--save-every", "1")) == 2
    message = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert message.startswith("error: ")
    assert "the disk is full" in message
    assert [p.name for p in find_checkpoints(folder / "run")] == ["checkpoint-000001"][: step - 1]
    assert not list((folder / "run").glob(".checkpoint*"))
    assert not (folder / "run/adapter_model.safetensors").exists()
    monkeypatch.undo()
    if step == 2:
        assert cli.run(train_command(folder, "--resume")) == 0


@pytest.mark.gpu
def test_a_batch_that_cannot_fit_is_refused_before_allocation(folder, capsys, monkeypatch):
    def refuse(*arguments: Any) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr("entrenar_gpu.gpu.device.Device.buffer", refuse)
    command = [*train_command(folder, "--memory-budget", "0.0625", "--batch", "4000"), "--device", "0"]
    line = refusal(capsys, command)
    assert "--batch 4000 at --seq 32" in line
    fits = int(line.split("; --batch ")[1].split()[0])
    assert 100 < fits < 4000
    with pytest.raises(AssertionError, match="allocated"):
        cli.run([*command, "--batch", str(fits)])
    assert not (folder / "run").exists()


@pytest.mark.gpu
def test_an_unknown_device_is_named_with_those_there_are(folder, capsys, device):
    line = refusal(capsys, [*train_command(folder), "--device", "Voodoo 2"])
    assert "--device 'Voodoo 2' matches no GPU" in line
    assert device.caps.name in line


def spoil_steps(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Make loss and gradients NaN in the steps that `bad` names."""
    real, written = trainer.executor.write, []

    def write(name: str, array: np.ndarray) -> None:
        if name == "inv_tokens":
            written.append(name)
            array = np.array([np.nan]) if bad(len(written)) else array
        real(name, array)

    monkeypatch.setattr(trainer.executor, "write", write)


@pytest.mark.gpu
def test_steps_that_are_not_finite_are_skipped_and_counted(folder, kernels, monkeypatch):
    """The weights stand still: what follows is the run in which that step was never taken."""
    trainer = Trainer(config_of(folder, schedule="constant", steps=6), kernels=kernels)
    spoil_steps(trainer, monkeypatch, lambda step: step == 3)
    records = list(trainer.steps())
    assert [record.step for record in records if record.skipped] == [3]
    assert np.isnan(records[2].loss)
    assert all(np.isfinite(record.loss) for record in records if record.step != 3)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [False, False, True, False, False, False]
    assert lines[2]["loss"] is None
    values = trainer.session.adapter_values()
    trainer.session.close()

    other = Trainer(config_of(folder, "other", schedule="constant", steps=5), kernels=kernels)
    skipped, draw = [], other.batches.__next__

    class Batches:
        """The same batches, the third left out."""

        def __next__(self) -> Any:
            skipped.append(draw())
            return draw() if len(skipped) == 3 else skipped[-1]

        def state(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(other._pipeline, "_batches", Batches())
    losses = [record.loss for record in other.steps()]
    assert losses == [record.loss for record in records if record.step != 3]
    for name, value in other.session.adapter_values().items():
        np.testing.assert_array_equal(value, values[name])
    other.session.close()


@pytest.mark.gpu
def test_ten_steps_in_a_row_that_are_not_finite_end_the_run(folder, kernels, monkeypatch):
    trainer = Trainer(config_of(folder, steps=40, save_every=2), kernels=kernels)
    spoil_steps(trainer, monkeypatch, lambda step: step > 5 and step != 7)
    records = []
    with pytest.raises(TrainingDiverged, match=r"step 17: .* 10 times in a row; lower lr") as caught:
        records.extend(trainer.steps())
    # the skipped steps changed nothing, so the checkpoints made among them are good ones
    newest = find_checkpoints(folder / "run")[-1]
    assert str(newest) in str(caught.value)
    file = SafetensorsFile(newest / "adapter_model.safetensors")
    assert all(np.isfinite(file[name]).all() for name in file.tensors)
    trainer.session.close()


@pytest.mark.gpu
def test_weights_whose_loss_is_not_finite_end_the_run(folder, capsys):
    """Finite themselves, or loading would refuse them: their products overflow."""
    change_tensors(folder, lambda t: t["model.norm.weight"].fill(3e38))
    assert cli.run([*train_command(folder, "--steps", "30"), "--device", "0"]) == 2
    message = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert "step 10: loss or gradient not finite 10 times in a row" in message
    assert "there is no checkpoint yet" in message


@pytest.mark.gpu
@pytest.mark.parametrize("step", [3, 4], ids=["at work", "while saving"])
def test_a_lost_device_is_one_error_and_the_checkpoint_stands(folder, kernels, step):
    class Loser:
        def step_finished(self, record: Any) -> None:
            if record.step == step:
                trainer.executor.device.handle.destroy()

    trainer = Trainer(config_of(folder, save_every=2), [Loser()], KernelCache(Device.open()))
    with pytest.raises(DeviceLost, match=r"was lost \(Parent device is lost\); the last checkpoint stands") as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    assert [p.name for p in find_checkpoints(folder / "run")] == ["checkpoint-000002"]
    assert len(train(folder, "run", kernels, resume="latest")) == 8
