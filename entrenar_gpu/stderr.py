"""What libraries write to the process's standard error on their own, past Python: panics, warnings of drivers."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator

from entrenar_gpu.errors import UserError

_HOLDS = threading.Lock()


@contextlib.contextmanager
def held_stderr() -> Iterator[list[bytes]]:
    """What is written to standard error in the block goes, behind it, to the list instead.

    All threads share the descriptor, so that one block at a time holds back, and another that is entered meanwhile
    does not. Where nothing can be held back, nothing is.
    """
    held: list[bytes] = []
    with contextlib.ExitStack() as stack:
        if not _HOLDS.acquire(blocking=False):
            yield held
            return
        stack.callback(_HOLDS.release)
        try:
            shown = os.dup(2)
            stack.callback(os.close, shown)
            kept = stack.enter_context(tempfile.TemporaryFile())
            os.dup2(kept.fileno(), 2)
        except OSError:  # closed, or no room
            yield held
            return
        try:
            yield held
        finally:
            os.dup2(shown, 2)
            kept.seek(0)
            held.append(kept.read())


@contextlib.contextmanager
def without_panics_text() -> Iterator[None]:
    """What a library writes to standard error in the block is shown behind it, and not at all where a UserError leaves
    it: Rust's panics describe themselves there before they become exceptions."""
    told: list[bytes] = []
    try:
        with held_stderr() as told:
            yield
    except UserError:
        told.clear()
        raise
    finally:
        if text := b"".join(told):
            with contextlib.suppress(OSError):
                os.write(2, text)
