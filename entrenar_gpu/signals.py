"""The signals that ask a program to end, under one rule: the first is a request, a second one ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# What a terminal sends when it is closed, and a Windows console for Ctrl-Break: not every system has them.
_SOME = [getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name)]
ENDING: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, *_SOME)


_raised: list[int] = []


def leave(number: int, frame: Any) -> None:
    """A handler that ends the process at once, without a word."""
    os._exit(exit_status(number))


def interrupt(number: int, frame: Any) -> None:
    """A handler that ends what the main thread is at by KeyboardInterrupt; the next signal ends the process."""
    for each in ENDING:
        if signal.getsignal(each) is interrupt:
            signal.signal(each, leave)
    _raised.append(number)
    raise KeyboardInterrupt


def interrupted_by() -> int:
    """The signal behind a KeyboardInterrupt."""
    return _raised[-1] if _raised else signal.SIGINT


def is_interrupt(error: BaseException | None) -> bool:
    """Whether a KeyboardInterrupt is behind an exception: what it meets on its way may raise another from it, as Python
    3.11 does where a class is being made."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def exit_status(number: int) -> int:
    """What shells report of a program that a signal has ended."""
    return 128 + number


@contextlib.contextmanager
def ending(
    handler: Callable[[int, Any], None], numbers: Sequence[signal.Signals] = ENDING
) -> Iterator[Callable[[], None]]:
    """Have `handler` called for every signal that asks to end, while the block runs; yields what undoes it earlier.

    One that the caller has had ignored stays so, as `nohup` wants SIGHUP; but for SIGINT, which shells have ignored in
    the background, where it can still be sent. Only the main thread gets signals: in another, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before: dict[signal.Signals, Any] = {}

    def undo() -> None:
        while before:
            number, former = before.popitem()
            signal.signal(number, signal.SIG_DFL if former is None else former)

    for number in numbers:
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield undo
    finally:
        undo()
