"""XXH3 of what is written, made as it is written, and of files that are there.

A safetensors file has a sum for each tensor, by its name, and one for its header; every other file has one as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from entrenar_gpu.files.safetensors_file import SafetensorsFile

WHOLE = ""  # the part of a file that is no tensor: its header, or all of it
THREADS = 4

_written: ContextVar[dict[Path, Mapping[str, str]] | None] = ContextVar("_written", default=None)


class SummedStream:
    """Writes to a stream and, inside `checksums_of_writes`, sums what passes, part by part; the first part is WHOLE."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._parts: dict[str, xxhash.xxh3_64] = {}
        self._part: xxhash.xxh3_64 | None = None
        self.begin(WHOLE)

    def begin(self, part: str) -> None:
        """What is written from here on belongs to `part`."""
        if _written.get() is not None:
            self._part = self._parts.setdefault(part, xxhash.xxh3_64())

    def write(self, data: bytes | memoryview) -> int:
        if self._part is not None:
            self._part.update(data)
        return self._stream.write(data)

    def tell_as(self, path: Path) -> None:
        """The file is whole and will be at `path`: whoever asked for checksums of writes gets them."""
        made = _written.get()
        if made is not None:
            made[path] = {part: sum.hexdigest() for part, sum in self._parts.items()}


@contextlib.contextmanager
def checksums_of_writes() -> Iterator[dict[Path, Mapping[str, str]]]:
    """The sums of every file that the block writes, by path; filled when a file is whole."""
    made: dict[Path, Mapping[str, str]] = {}
    token = _written.set(made)
    try:
        yield made
    finally:
        _written.reset(token)


def checksums_of(path: Path) -> dict[str, str]:
    """The same sums of a file that is there. Raises UserError or OSError where it cannot be read."""
    if path.suffix != ".safetensors":
        return {WHOLE: xxhash.xxh3_64_hexdigest(path.read_bytes())}
    file = SafetensorsFile(path)

    def of(name: str) -> str:
        return xxhash.xxh3_64_hexdigest(file[name].reshape(-1).view(np.uint8).data)

    with ThreadPoolExecutor(THREADS) as threads:
        made = threads.map(of, file.tensors)
        return {WHOLE: xxhash.xxh3_64_hexdigest(file.header()), **dict(zip(file.tensors, made, strict=True))}
