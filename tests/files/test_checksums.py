"""Checksums: of files as they are written, and of files as they are read, in any order."""

from __future__ import annotations

import itertools
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from entrenar_gpu.files import checksums_of, checksums_of_writes, save_safetensors, write_text
from entrenar_gpu.files import streamed_checksum as streamed
from entrenar_gpu.files.stored import OpenFile
from entrenar_gpu.files.streamed_checksum import StreamedChecksum

SIZE = 10_007


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(streamed, "BLOCK", 512)
    (tmp_path / "file").write_bytes(np.random.default_rng(0).bytes(SIZE))
    return tmp_path / "file"


def test_what_is_written_has_the_sums_of_what_is_there(tmp_path):
    with checksums_of_writes() as sums:
        save_safetensors(tmp_path / "a.safetensors", {"x": np.arange(5.0), "y": np.arange(3, dtype=np.float32)})
        write_text(tmp_path / "b.json", "{}")
    write_text(tmp_path / "c.json", "{}")
    assert sums == {tmp_path / name: checksums_of(tmp_path / name) for name in ("a.safetensors", "b.json")}
    assert sums[tmp_path / "a.safetensors"].keys() == {"", "x", "y"}


def parts_of(rng: random.Random) -> list[tuple[int, int]]:
    """The whole file in parts of odd sizes, in disorder, some of them twice and some that overlap."""
    cuts = sorted({0, SIZE, *(rng.randrange(SIZE) for _ in range(40))})
    parts = list(itertools.pairwise(cuts))
    parts += [parts[3], (100, 700), (5000, 5001)]
    rng.shuffle(parts)
    return parts


@pytest.mark.parametrize("threads", [1, 4])
def test_a_checksum_does_not_depend_on_how_a_file_is_read(file, threads):
    wanted = StreamedChecksum(OpenFile(file)).hexdigest()  # nothing has passed: all of it is read at the end
    for seed in range(5):
        opened, parts = OpenFile(file), parts_of(random.Random(seed))
        made = StreamedChecksum(opened)

        def read(share: list[tuple[int, int]], opened: OpenFile = opened) -> None:
            for start, end in share:
                opened.read(start, end - start, "it")

        working = [threading.Thread(target=read, args=(parts[i::threads],)) for i in range(threads)]
        for thread in working:
            thread.start()
        for thread in working:
            thread.join()
        assert made.hexdigest() == wanted


def test_what_has_passed_is_not_read_again(file, monkeypatch):
    opened = OpenFile(file)
    made = StreamedChecksum(opened)
    for start in range(0, SIZE, 300):
        opened.read(start, min(300, SIZE - start), "it")
    wanted = StreamedChecksum(OpenFile(file)).hexdigest()
    monkeypatch.setattr(OpenFile, "read_into", lambda *_: pytest.fail("read again"))
    assert made.hexdigest() == wanted


def test_parts_that_wait_are_bounded(file, monkeypatch):
    monkeypatch.setattr(streamed, "WAITING_BYTES", 1000)
    opened = OpenFile(file)
    made = StreamedChecksum(opened)
    for start in range(0, SIZE - 400, 512):
        opened.read(start, 400, "it")
        assert sum(len(part) for parts in made._parts.values() for part in parts.values()) <= 1000
    assert made.hexdigest() == StreamedChecksum(OpenFile(file)).hexdigest()


def test_every_byte_counts(file):
    data = bytearray(file.read_bytes())
    sums = {StreamedChecksum(OpenFile(file)).hexdigest()}
    for at in (0, 511, 512, SIZE - 1):
        data[at] ^= 1
        file.write_bytes(data)
        sums.add(StreamedChecksum(OpenFile(file)).hexdigest())
    assert len(sums) == 5
