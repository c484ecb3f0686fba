"""Files that appear whole or not at all: their temporary names are nobody else's, and are swept."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from entrenar_gpu.errors import UserError
from entrenar_gpu.files import atomic
from entrenar_gpu.files.atomic import new_file, new_folder, sweep, temporary_path, write_text


def test_no_two_temporary_names_are_the_same(tmp_path):
    """Not those of one process, nor those of two with one pid (containers that share a folder)."""
    path = tmp_path / "a.json"
    assert len({temporary_path(path) for _ in range(100)}) == 100
    with new_file(path) as one, new_file(path) as other:
        one.write(b"1")
        other.write(b"2")
    assert path.read_bytes() == b"1"  # the one that was finished last
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_link_put_in_the_way_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    trap = tmp_path / ".a.json.0123456789abcdef.tmp"
    trap.symlink_to(victim)
    monkeypatch.setattr(atomic, "temporary_path", lambda path: trap)
    with pytest.raises(UserError, match=r"a\.json: cannot be written"):
        write_text(tmp_path / "a.json", "new")
    assert victim.read_text() == "precious"


def test_permissions_are_those_of_any_new_file(tmp_path):
    write_text(tmp_path / "a", "")
    (tmp_path / "b").touch()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such call")
def test_folders_are_flushed_as_files_are(tmp_path, monkeypatch):
    """A name is on the disk when its folder is: after a rename, and after a folder was made."""
    flushed: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    new_folder(tmp_path / "run" / "deep")
    assert set(flushed) == {"run", tmp_path.name}
    flushed.clear()
    write_text(tmp_path / "run/a", "")
    assert len(flushed) == 2
    assert flushed[0].startswith(".a.")
    assert flushed[1] == "run"


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path):
    stays = ["a.tmp", ".a.tmp", ".hidden", "checkpoint-000001", ".a.0123456789abcdef", ".b.0123.tmp.gz"]
    goes = [".a.0123456789abcdef.tmp", ".model.safetensors.4711.tmp"]
    folders = [".checkpoint-000003.tmp", ".checkpoint-000003.old.tmp", ".checkpoint-000004.00112233aabbccdd.tmp"]
    for name in (*stays, *goes):
        (tmp_path / name).write_text("")
    for name in folders:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text("")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("")
    (tmp_path / ".link.0123456789abcdef.tmp").symlink_to(elsewhere)
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*stays, "elsewhere"])
    assert os.listdir(elsewhere) == ["kept"]


def test_sweeping_a_folder_that_is_not_there_is_nothing(tmp_path):
    sweep(Path(tmp_path / "none"))
