"""Files that appear whole or not at all: reports, findings as JSON, traces for other tools."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from observability.errors import TraceError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside `path`, then put that in its place; on failure neither is left.

    Raises TraceError, naming `path`, where it cannot be written or is no file: a device would be replaced.
    """
    if os.path.exists(path) and not path.is_file():
        raise TraceError(f"{path}: cannot be written: it is no file")
    # A name of its own: what is read may bear any, as in `report a.html.tmp --html a.html`.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666))
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise TraceError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):  # gone, or never there
            temporary.unlink()
