"""One writer per output folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from entrenar_gpu import cli
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import FolderLock
from tests import ROOT
from tests.helpers.runs import config_of, train
from tests.helpers.tiny import make_data, make_model

HOLDER = """
import sys, time
from pathlib import Path
from entrenar_gpu.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


class Holder:
    """Another process that holds a folder's lock."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", HOLDER, str(folder)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}
    make_model(tmp_path / "model", **tiny)
    make_data(tmp_path / "train.jsonl", vocab=96)
    return tmp_path


def test_training_resuming_and_merging_are_refused_with_the_other_s_pid(folder, capsys):
    train(folder, device="numpy", steps=2, save_every=1)
    train(folder, "other", device="numpy", steps=1)
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}
    holder = Holder(folder / "run")
    try:
        common = ["--model", str(folder / "model"), "--output", str(folder / "run")]
        data = ["--data", str(folder / "train.jsonl"), "--device", "numpy", "--seq", "32", "--rank", "4"]
        commands = [
            ["train", *common, *data],
            ["train", *common, *data, "--steps", "4", "--batch", "2", "--resume"],
            ["merge", *common, "--adapter", str(folder / "other")],
        ]
        for command in commands:
            assert cli.run(command) == 2
            message = capsys.readouterr().err
            assert message.count("\n") == 1
            assert f"--output: process {holder.process.pid} is writing to {folder / 'run'}" in message
        now = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}
        assert now == before | {folder / "run/.lock": now[folder / "run/.lock"]}
    finally:
        holder.kill()
    # the lock died with its process
    assert len(train(folder, device="numpy", steps=3, resume="latest")) == 1
    assert not (folder / "run/.lock").exists()


def test_of_two_runs_that_were_made_one_begins(folder):
    from entrenar_gpu.train import Trainer

    one, other = (Trainer(config_of(folder, device="numpy", steps=2)) for _ in range(2))
    steps = one.steps()
    next(steps)
    with pytest.raises(UserError, match=f"process {os.getpid()} is writing to"):
        other.steps()
    assert len(list(steps)) == 1
    with pytest.raises(UserError, match="already holds a run"):
        other.steps()
    assert not (folder / "run/.lock").exists()


def test_a_checkpoint_that_is_another_s_by_the_time_is_not_gone_on_from(folder):
    from entrenar_gpu.train import Trainer

    train(folder, device="numpy", steps=2)
    one, other = (Trainer(config_of(folder, device="numpy", steps=4, resume="latest")) for _ in range(2))
    assert len(list(one.steps())) == 2
    with pytest.raises(UserError, match="another process has gone on"):
        other.steps()


def test_folders_that_a_refused_writer_made_are_removed(tmp_path):
    with pytest.raises(UserError, match="no"), FolderLock(tmp_path / "a" / "b"):
        raise UserError("no")
    assert not (tmp_path / "a").exists()


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"\.lock: cannot be written"):
        FolderLock(tmp_path).acquire()
    assert (tmp_path / "victim").read_text() == "precious"
