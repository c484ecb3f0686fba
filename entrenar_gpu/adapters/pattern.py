"""Regular expressions out of an adapter's files, matched in bounded time: a stranger's may backtrack for ever."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from contextvars import ContextVar

import regex

SECONDS = 0.25  # for one pattern and one path; ordinary ones take microseconds
SECONDS_OF_FILE = 2.0  # for all that one file asks for

_deadline: ContextVar[float] = ContextVar("_deadline", default=math.inf)


class TooSlow(Exception):
    """A pattern that takes too long to match."""


@contextlib.contextmanager
def one_file() -> Iterator[None]:
    """Bounds what all matches in the block take together."""
    token = _deadline.set(time.monotonic() + SECONDS_OF_FILE)
    try:
        yield
    finally:
        _deadline.reset(token)


def check_pattern(pattern: str) -> None:
    """Raises ValueError, with the reason, when this is not a regular expression."""
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


def full_match(pattern: str, path: str) -> regex.Match[str] | None:
    """The match of a whole path, as `re.fullmatch` has it. Raises TooSlow when that takes too long."""
    try:
        left = min(SECONDS, _deadline.get() - time.monotonic())
        if left <= 0:  # regex takes a limit of zero for none
            raise TimeoutError
        return regex.fullmatch(pattern, path, timeout=max(left, 0.001))
    except TimeoutError:
        raise TooSlow(f"pattern {pattern[:80]!r} takes too long to match {path}") from None
