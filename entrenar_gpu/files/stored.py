"""Arrays that lie in a file, read by position when their elements are asked for.

Not through a memory map: where a mapped file becomes shorter, or its disk fails, touching a page ends the process by a
signal (SIGBUS). A read by position comes back short or with an error, and that is one line.
"""

from __future__ import annotations

import math
import os
import stat
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar_gpu.errors import UserError

_MOST = 1 << 30  # bytes per call: Linux reads at most 2 GiB at once, macOS fails beyond


class OpenFile:
    """A regular file, read by position. Several threads may read at once."""

    def __init__(self, path: Path) -> None:
        """Raises UserError naming the file where it cannot be opened or is a folder, a pipe or a device."""
        self.path = path
        # Opening a pipe would wait for somebody to write to it.
        flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NONBLOCK"))
        try:
            self._descriptor = os.open(path, flags)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        weakref.finalize(self, os.close, self._descriptor)
        found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: cannot be read: it is no file")
        self.size, self.mtime_ns, self.ctime_ns = found.st_size, found.st_mtime_ns, found.st_ctime_ns
        self.watch: Callable[[int, NDArray[np.uint8]], None] | None = None  # told of what is read, and from where on

    def read_into(self, memory: NDArray[np.uint8], start: int, what: str) -> None:
        """Fill `memory` from `start` on; `what` it is to hold is named in the error when the file ends before. Who
        watches may look at the memory later: nobody writes to it again."""
        done = 0
        while done < memory.size:
            try:
                count = _read_into(self._descriptor, memory[done : done + _MOST].data, start + done)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read: {error.strerror or error}") from None
            if not count:
                raise UserError(f"{self.path}: cut off while it was read, within {what}")
            done += count
        if self.watch is not None:
            self.watch(start, memory)

    def read(self, start: int, nbytes: int, what: str) -> bytes:
        """Bytes from `start` on."""
        made = np.empty(nbytes, np.uint8)
        self.read_into(made, start, what)
        return made.tobytes()

    def read_ahead(self, start: int, nbytes: int) -> None:
        """Let the system read bytes before they are asked for; where it takes no such advice, nothing."""
        if sys.platform == "linux":
            os.posix_fadvise(self._descriptor, start, nbytes, os.POSIX_FADV_WILLNEED)


@dataclass(frozen=True, eq=False)
class StoredArray:
    """Consecutive elements of a file, `start` bytes from its beginning; `what` they are is named in errors.

    Slices of its first axis and flat forms are arrays of the same kind: nothing is read but by `read`, `astype` and
    NumPy's own functions.
    """

    file: OpenFile
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    what: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> StoredArray:
        """The elements of consecutive rows."""
        first, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError("only rows that follow each other are one run of elements")
        row = self.dtype.itemsize * math.prod(self.shape[1:])
        return replace(self, start=self.start + first * row, shape=(max(stop - first, 0), *self.shape[1:]))

    def reshape(self, length: int) -> StoredArray:
        """All elements in a row; `length` is -1 or their number."""
        if length not in (-1, self.size):
            raise ValueError(f"{self.size} elements are not {length}")
        return replace(self, shape=(self.size,))

    def view(self, dtype: Any) -> StoredArray:
        """The bytes of a flat array: `dtype` is uint8."""
        if len(self.shape) != 1 or np.dtype(dtype) != np.uint8:
            raise ValueError("only a flat array is seen as bytes")
        return replace(self, shape=(self.nbytes,), dtype=np.dtype(np.uint8))

    def read(self) -> NDArray[Any]:
        """The elements, in memory that cannot be written. Raises UserError where the file has become too short."""
        made = np.empty(self.shape, self.dtype)
        self.file.read_into(made.reshape(-1).view(np.uint8), self.start, self.what)
        made.flags.writeable = False
        return made

    def astype(self, dtype: Any, copy: bool = True) -> NDArray[Any]:
        """The elements in memory, in another type."""
        return self.read().astype(dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.read() if dtype is None else self.astype(dtype)


if sys.platform == "win32":
    _turn = threading.Lock()  # a read by position is two calls here

    def _read_into(descriptor: int, memory: memoryview, start: int) -> int:
        with _turn:
            os.lseek(descriptor, start, os.SEEK_SET)
            data = os.read(descriptor, len(memory))
        memory[: len(data)] = data
        return len(data)

elif hasattr(os, "preadv"):

    def _read_into(descriptor: int, memory: memoryview, start: int) -> int:
        return os.preadv(descriptor, [memory], start)

else:  # macOS before 11

    def _read_into(descriptor: int, memory: memoryview, start: int) -> int:
        data = os.pread(descriptor, len(memory), start)
        memory[: len(data)] = data
        return len(data)
