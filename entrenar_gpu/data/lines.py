"""Lines of JSON, in bounded memory: of a text that is too long for any row, only the beginning is kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from entrenar_gpu.errors import UserError

LONG_LINE = 8 << 20  # bytes; longer ones are shortened
KEPT_OF_TEXT = 4 << 20  # bytes of each text in a shortened line
MOST_OF_LINE = 64 << 20  # bytes of a shortened line: what is not text is never cut
_PIECE = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_HIGH, _ANY = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[0-9a-fA-F]{4}"
_WHOLE_ESCAPES = re.compile(
    rb"(?:[^\\]++|%b%b|(?!%b)%b|%b(?=[^\\]|\\[^u])|\\[^u])*+" % (_HIGH, _ANY, _HIGH, _ANY, _HIGH), re.DOTALL
)


@dataclass(frozen=True)
class Row:
    """A row and its number from 1: JSON text, or what it says already. `shortened` where a text in it is not whole."""

    number: int
    content: bytes | Any
    shortened: bool = False

    @property
    def weight(self) -> int:
        """About how many bytes it holds."""
        return len(self.content) if isinstance(self.content, bytes) else _weight(self.content)


class Lines(Protocol):
    """What lines are read from: at most so many bytes of one, its newline included; b"" at the end."""

    def readline(self, limit: int, /) -> bytes: ...


def read_lines(stream: Lines, place: Callable[[int], str]) -> Iterator[Row]:
    """Every line that is not blank. `place` is how errors call a line by its number."""
    number = 0
    while content := stream.readline(LONG_LINE):
        number += 1
        shortened = len(content) >= LONG_LINE and not content.endswith(b"\n")
        # Windows editors begin a file with a byte order mark
        content = content.removeprefix(BYTE_ORDER_MARK) if number == 1 else content
        if shortened:
            shortener = _Shortener(place(number))
            shortener.feed(content)
            shortener.feed_line(stream)
            content, shortened = bytes(shortener.kept), shortener.dropped
        if content.strip():
            yield Row(number, content, shortened)


class _Shortener:
    """Copies a line of JSON piece by piece, and of each string in it no more than `KEPT_OF_TEXT` bytes."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.kept = bytearray()
        self.dropped = False
        self._string_from: int | None = None  # where the open string begins in `kept`
        self._backslashes = 0  # at the end of the last piece
        self._cut = False  # whether the open string was

    def feed_line(self, stream: Lines) -> None:
        """The rest of the line that `stream` is in."""
        while piece := stream.readline(_PIECE):
            self.feed(piece)
            if piece.endswith(b"\n"):
                return

    def feed(self, piece: bytes) -> None:
        at = 0
        while at < len(piece):
            if self._string_from is None:
                quote = piece.find(b'"', at)
                end = len(piece) if quote < 0 else quote + 1
                self.kept += piece[at:end]
                if quote >= 0:
                    self._string_from, self._backslashes = len(self.kept), 0
            else:
                quote = self._closing_quote(piece, at)
                end = len(piece) if quote < 0 else quote
                self._keep(piece[at:end])
                if quote >= 0:
                    self._close()
                    end += 1
            at = end
            if len(self.kept) > MOST_OF_LINE:
                raise UserError(f"{self.where}: more than {MOST_OF_LINE >> 20} MiB in one line")

    def _closing_quote(self, piece: bytes, at: int) -> int:
        """Where the open string ends in `piece` from `at` on: at a quote behind an even number of backslashes."""
        quote = at - 1
        while (quote := piece.find(b'"', quote + 1)) >= 0:
            if self._run(piece, at, quote) % 2 == 0:
                return quote
        self._backslashes = self._run(piece, at, len(piece))
        return -1

    def _run(self, piece: bytes, at: int, end: int) -> int:
        """How many backslashes stand before `end`, those at the end of the last piece included."""
        first = end
        while first > at and piece[first - 1] == ord("\\"):
            first -= 1
        return end - first + (self._backslashes if first == at else 0)

    def _keep(self, text: bytes) -> None:
        assert self._string_from is not None
        room = self._string_from + KEPT_OF_TEXT - len(self.kept)
        self.kept += text[: max(room, 0)]
        self._cut |= len(text) > room

    def _close(self) -> None:
        if self._cut:
            assert self._string_from is not None
            _trim(self.kept, self._string_from)
            self.dropped = True
        self.kept += b'"'
        self._string_from, self._cut = None, False


def _trim(text: bytearray, start: int) -> None:
    """Take from the end of a JSON string, begun at `start`, what is half an escape, a surrogate pair or a character."""
    whole = _WHOLE_ESCAPES.match(text, start)
    assert whole is not None
    del text[whole.end() :]
    while len(text) > start and text[-1] & 0xC0 == 0x80:
        text.pop()
    if len(text) > start and text[-1] >= 0xC0:
        text.pop()


def _weight(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(str(key)) + _weight(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return 8 * len(value) if value and isinstance(value[0], int) else sum(map(_weight, value))
    return int(getattr(value, "nbytes", 8))
