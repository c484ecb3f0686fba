"""Regular expressions out of an adapter's files, matched in bounded time: a stranger's may backtrack for ever."""

from __future__ import annotations

import regex

from entrenar_gpu.errors import UserError

SECONDS = 0.25  # for one pattern and one path; ordinary ones take microseconds


def check_pattern(pattern: str) -> None:
    """Raises ValueError, with the reason, when this is not a regular expression."""
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


def full_match(pattern: str, path: str) -> regex.Match[str] | None:
    """The match of a whole path, as `re.fullmatch` has it. Raises UserError when that takes too long."""
    try:
        return regex.fullmatch(pattern, path, timeout=SECONDS)
    except TimeoutError:
        raise UserError(f"adapter_config.json: pattern {pattern[:80]!r} takes too long to match {path}") from None
