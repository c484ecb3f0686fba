"""What tells one base from another: every byte of it, summed while it is loaded."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from entrenar_gpu.errors import UserError
from entrenar_gpu.files import SafetensorsFile, save_safetensors, streamed_checksum
from entrenar_gpu.files.stored import OpenFile
from entrenar_gpu.model import HFCheckpoint
from entrenar_gpu.session import base_identity
from entrenar_gpu.session.base_identity import BaseIdentity, release_identity
from entrenar_gpu.train import run_checkpoint
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import config_of, train
from tests.helpers.tiny import make_data, make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}
WEIGHT = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_model(tmp_path / "model", **TINY)
    make_data(tmp_path / "train.jsonl", vocab=96)
    return tmp_path


def changed(folder: Path) -> None:
    """The same model but for one number, that no sample of its beginning has."""
    path = folder / "model/model.safetensors"
    file = SafetensorsFile(path)
    tensors = {name: np.array(file[name]) for name in file.tensors}
    tensors[WEIGHT][-1, -1] += 0.5
    save_safetensors(path, tensors, {"format": "pt"})


def test_a_base_that_differs_in_one_number_is_another(folder):
    train(folder, device="numpy", steps=2)
    before = release_identity(HFCheckpoint.open(folder / "model"))
    changed(folder)
    assert release_identity(HFCheckpoint.open(folder / "model")) == before  # 64 values of each weight do not tell
    with pytest.raises(UserError, match="checkpoint of another model"):
        train(folder, device="numpy", steps=3, resume="latest")


@pytest.mark.skipif(sys.platform == "win32", reason="keeps no time that cannot be set")
def test_one_byte_tells_where_size_and_time_are_as_they_were(folder):
    train(folder, device="numpy", steps=2)
    path = folder / "model/model.safetensors"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="checkpoint of another model"):
        train(folder, device="numpy", steps=3, resume="latest")


def test_one_that_was_moved_or_only_touched_is_the_same(folder):
    train(folder, device="numpy", steps=2)
    shutil.copytree(folder / "model", folder / "moved")
    (folder / "model/model.safetensors").touch()
    train(folder, device="numpy", steps=3, resume="latest")
    train(folder, device="numpy", steps=4, resume="latest", model=str(folder / "moved"))


def test_loading_reads_every_byte_once_and_the_next_start_makes_no_checksum(folder, monkeypatch):
    weights, read = folder / "model/model.safetensors", []
    read_into = OpenFile.read_into

    def counted(self: OpenFile, memory: np.ndarray, start: int, what: str) -> None:
        read.append(memory.size if self.path == weights else 0)
        read_into(self, memory, start, what)

    monkeypatch.setattr(OpenFile, "read_into", counted)
    monkeypatch.setattr(streamed_checksum, "BLOCK", 512)
    trainer = Trainer(config_of(folder, device="numpy", steps=1))
    trainer.session.close()
    header = SafetensorsFile(weights).header()
    assert sum(read) < weights.stat().st_size + 3 * len(header) + 2 * 512  # the header before anything is watched
    first = trainer.session.base.value()

    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(base_identity, "StreamedChecksum", lambda *_: pytest.fail("made again"))
    assert BaseIdentity(HFCheckpoint.open(folder / "model")).value() == first


def test_a_save_reads_neither_the_base_nor_what_it_wrote(folder, monkeypatch):
    trainer = Trainer(config_of(folder, device="numpy", steps=2, method="full"))
    path, data = trainer.output, trainer.batches.state()
    (folder / "model/model.safetensors").unlink()
    read_into = OpenFile.read_into

    def read(self: OpenFile, memory: np.ndarray, start: int, what: str) -> None:
        assert self.path.suffix == ".json", self.path
        read_into(self, memory, start, what)

    monkeypatch.setattr(OpenFile, "read_into", read)
    saved = run_checkpoint.save_run(trainer.session, path, 1, data, trainer.started, trainer.run_id, None)
    monkeypatch.undo()
    assert run_checkpoint.read_state(saved).checksums == run_checkpoint.checksums(saved)
    trainer.session.close()
