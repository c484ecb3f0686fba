"""Weights onto the device through a ring of mapped buffers that threads fill while the device copies.

`queue.write_buffer` allocates memory at each call and fills it from one thread. Here several threads at once read a
file straight into memory that is allocated once and that the device reads from.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar_gpu.files import StoredArray
from entrenar_gpu.gpu.device import Device
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.integers import ceil_div, round_up

SLOT_BYTES = 32 << 20
SLOTS = 3
THREADS = min(8, os.cpu_count() or 1)  # that read a file at once
SHARE_BYTES = 1 << 20  # what a thread should at least have to copy

Values = np.ndarray | StoredArray


@dataclass
class _Slot:
    """A buffer that the host may map, and the submission that last read it."""

    buffer: Any
    submission: int = 0


class Uploader:
    """Copies arrays into persistent tensors of replays of one device. Holds SLOTS * SLOT_BYTES until it is closed."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._slots: deque[_Slot] = deque()  # the one that was sent longest ago comes first
        self._threads = ThreadPoolExecutor(THREADS)

    def write_part(self, target: Replay, name: str, first: int, values: Values) -> None:
        """Write consecutive elements of a persistent tensor, from the `first` on, in its own dtype.

        Returns when `values` has been read; the device has the copy before anything submitted later. Raises
        FloatingPointError for a number that is not finite: weights are, and on the device nobody would tell.
        """
        buffer, offset, _ = target.buffer_of(name)
        start = offset + first * values.dtype.itemsize
        for at, piece in pieces(values, SLOT_BYTES):
            with self._device.watched():
                self._send(piece.view(np.uint8), values.dtype, buffer, start + at * values.dtype.itemsize)

    def close(self) -> None:
        """Release the ring, one that an error or an interrupt left mapped included.

        Threads that still fill it end first; copies that the device is at keep their memory until they are done.
        """
        self._threads.shutdown()
        for slot in self._slots:
            self._device.release(slot.buffer)
        self._slots.clear()

    def _send(self, piece: Values, dtype: np.dtype[Any], buffer: Any, offset: int) -> None:
        """Copy at most SLOT_BYTES of numbers of a dtype to an offset of a buffer, padded to whole words."""
        slot, padded = self._turn(), round_up(piece.size, 4)
        engine, handle = self._device.engine, self._device.handle
        memory = np.frombuffer(engine.map_after(handle, slot.buffer, slot.submission), np.uint8)
        self._fill(memory[: piece.size], piece, dtype)
        memory[piece.size : padded] = 0
        engine.unmap(slot.buffer)
        encoder = handle.create_command_encoder()
        encoder.copy_buffer_to_buffer(slot.buffer, 0, buffer, offset, padded)
        slot.submission = engine.submit(handle, [encoder.finish()])

    def _turn(self) -> _Slot:
        """A new slot while there are fewer than SLOTS, then the one that was sent longest ago."""
        if len(self._slots) < SLOTS:
            self._slots.append(_Slot(self._device.staging(SLOT_BYTES)))
        else:
            self._slots.rotate(-1)
        return self._slots[-1]

    def _fill(self, memory: np.ndarray, piece: Values, dtype: np.dtype[Any]) -> None:
        share = max(round_up(ceil_div(piece.size, THREADS), 4), SHARE_BYTES)  # of whole numbers

        def copy(at: int) -> None:
            part, target = piece[at : at + share], memory[at : at + share]
            if isinstance(part, StoredArray):
                part = part.read()  # not into mapped memory, which may be slow to read again
            if not finite(part.view(dtype)):
                raise FloatingPointError
            target[...] = part

        list(self._threads.map(copy, range(0, piece.size, share)))


# The bits of a dtype's exponent: all of them are set in what is not finite.
_EXPONENTS: dict[str, tuple[Any, int]] = {
    "float32": (np.uint32, 0x7F800000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}


def finite(values: np.ndarray) -> bool:
    """Whether all of an array's numbers are; integers always."""
    if values.dtype.name not in _EXPONENTS:
        return True
    unsigned, exponent = _EXPONENTS[values.dtype.name]
    return not ((values.view(unsigned) & unsigned(exponent)) == exponent).any()


def pieces(array: Values, nbytes: int) -> Iterator[tuple[int, Any]]:
    """(first element, flat piece of at most `nbytes`) of an array, in order; of a stored one they are stored ones."""
    flat, step = array.reshape(-1), nbytes // array.dtype.itemsize
    for at in range(0, flat.size, step):
        yield at, flat[at : at + step]
