"""The elements of a JSON array, read like lines: in bounded memory, however long the file or an element."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import BinaryIO

from entrenar_gpu.data.lines import BYTE_ORDER_MARK
from entrenar_gpu.errors import UserError

PIECE = 1 << 20
# What says where an element ends: strings are passed over, whole ones at once.
_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*+"|["\[\]{},]', re.DOTALL)
_STRING = re.compile(rb'(?:[^"\\]|\\.)*+', re.DOTALL)


class ArrayElements:
    """`readline` gives the next element, ended by the only newline in it; of a long one, a part per call."""

    def __init__(self, stream: BinaryIO, place: Callable[[int], str]) -> None:
        self._stream, self._place = stream, place
        self._piece, self._at = stream.read(PIECE).removeprefix(BYTE_ORDER_MARK).lstrip()[1:], 0
        self._depth, self._in_string, self._escaped = 0, False, False
        self._number, self._ended = 0, False
        self._is_blank = True  # the element so far

    def readline(self, limit: int) -> bytes:
        """About `limit` bytes of the element, b"" behind the last one: a string in it is not parted without need.

        Raises UserError where the array is broken.
        """
        found = bytearray()
        while not self._ended and len(found) < limit:
            if self._at == len(self._piece):
                self._piece, self._at = self._stream.read(PIECE), 0
                if not self._piece:
                    raise UserError(f"{self._place(self._number + 1)}: the file ends within the array")
            begin, room = self._at, limit - len(found)
            closed = self._scan(begin + room)
            part = self._piece[begin : self._at - closed].replace(b"\n", b" ")
            self._is_blank = self._is_blank and not part.strip()
            found += part
            if closed:
                return b"" if self._close() else bytes(found) + b"\n"
        return bytes(found)

    def _scan(self, limit: int) -> bool:
        """Go on to the end of the element, or to that of the piece or `limit`; whether it was the element's end."""
        while self._at < min(limit, len(self._piece)):
            if self._in_string:
                self._leave_string()
                continue
            mark = _STRUCTURE.search(self._piece, self._at)
            if mark is None:
                self._at = len(self._piece)
                return False
            self._at = mark.end()
            if mark.group() == b'"':
                self._in_string = True
            elif mark.group() in (b"{", b"["):
                self._depth += 1
            elif mark.group() in (b"}", b"]") and self._depth:
                self._depth -= 1
            elif mark.group() in (b",", b"]") and not self._depth:
                self._ended = mark.group() == b"]"
                return True
        return False

    def _leave_string(self) -> None:
        """Pass the rest of a string that is not whole in one piece."""
        inside = _STRING.match(self._piece, self._at + self._escaped)
        assert inside is not None
        self._at, self._escaped = inside.end(), False
        if self._at == len(self._piece):
            return
        if self._piece[self._at : self._at + 1] == b'"':
            self._in_string = False
        else:
            self._escaped = True  # a backslash, and what it escapes is in the next piece
        self._at += 1

    def _close(self) -> bool:
        """Begin the next element; whether there was none, as in an empty array."""
        self._number += 1
        was_blank, self._is_blank = self._is_blank, True
        if was_blank and not (self._ended and self._number == 1):
            raise UserError(f"{self._place(self._number)}: nothing stands between two commas")
        if self._ended and (self._piece[self._at :] + self._stream.read(PIECE)).strip():
            raise UserError(f"{self._place(self._number)}: there is more behind the end of the array")
        return was_blank
