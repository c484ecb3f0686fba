"""A file's checksum from the parts of it that are read anyway, in whatever order and by whatever threads.

The file is cut into blocks. A block's XXH3 is made when all of it has passed; parts of blocks wait for the rest of
theirs. The file's checksum is that of its blocks' checksums in order. A thread of its own makes them: who reads need
not wait for it.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import xxhash
from numpy.typing import NDArray

from entrenar_gpu.files.stored import OpenFile
from entrenar_gpu.integers import ceil_div

BLOCK = 256 << 10  # bytes; xxhash leaves other threads running from 100 kB on
WAITING_BYTES = 64 << 20  # of parts of blocks at most; what comes beyond is read again at the end
BEHIND_BYTES = 32 << 20  # that the thread may be behind; who reads more makes the checksums itself


class StreamedChecksum:
    """Watches what is read of a file from now on."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._sums: list[bytes | None] = [None] * ceil_div(file.size, BLOCK)
        self._parts: dict[int, dict[int, bytes]] = {}  # by block, and by where in the file they begin
        self._waiting = self._behind = 0
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1)
        file.watch = self._saw

    def hexdigest(self) -> str:
        """The checksum; what has not been read yet is read for it. Raises UserError where the file has shrunk."""
        self._file.watch = None
        self._thread.shutdown()
        with self._lock:
            self._parts.clear()
        for block, made in enumerate(self._sums):
            if made is None:
                start, end = self._bounds(block)
                self._sums[block] = xxhash.xxh3_64_digest(self._file.read(start, end - start, "its data"))
        return xxhash.xxh3_128_hexdigest(b"".join(made for made in self._sums if made is not None))

    def _bounds(self, block: int) -> tuple[int, int]:
        return block * BLOCK, min((block + 1) * BLOCK, self._file.size)

    def _saw(self, start: int, data: NDArray[np.uint8]) -> None:
        """The bytes of the file from `start` on, as they were read."""
        with self._lock:
            later = self._behind < BEHIND_BYTES
            self._behind += data.size if later else 0
        if later:
            self._thread.submit(self._sum_later, start, data)
        else:
            self._sum(start, data)

    def _sum_later(self, start: int, data: NDArray[np.uint8]) -> None:
        self._sum(start, data)
        with self._lock:
            self._behind -= data.size

    def _sum(self, start: int, data: NDArray[np.uint8]) -> None:
        end = start + data.size
        for block in range(start // BLOCK, ceil_div(end, BLOCK)):
            if self._sums[block] is None:
                first, last = self._bounds(block)
                part = data[max(first - start, 0) : last - start]
                if part.size == last - first:
                    self._sums[block] = xxhash.xxh3_64_digest(part.data)
                else:
                    self._keep(block, max(first, start), part)

    def _keep(self, block: int, start: int, part: NDArray[np.uint8]) -> None:
        """A part of a block; with the last of its parts the block's checksum is made."""
        first, last = self._bounds(block)
        with self._lock:
            parts = self._parts.setdefault(block, {})
            if start in parts or self._waiting + part.size > WAITING_BYTES:
                return
            parts[start] = part.tobytes()
            self._waiting += part.size
            if sum(map(len, parts.values())) < last - first:
                return
            whole = b"".join(parts[at] for at in sorted(parts))
            self._waiting -= len(whole)
            del self._parts[block]
            if len(whole) == last - first:  # else parts overlap: the block is read again at the end
                self._sums[block] = xxhash.xxh3_64_digest(whole)
