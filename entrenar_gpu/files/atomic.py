"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from entrenar_gpu.errors import UserError


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write in place of `path`, which it becomes, flushed to disk, only when the block ends well.

    Raises UserError naming the file when it cannot be written (disk full, no permission); then, as after any other
    exception, the temporary file is gone and what was at `path` before still is.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def cannot_write(path: str | Path, error: OSError) -> UserError:
    """The one-line form of a failed write."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return UserError(f"{path}: {'the disk is full; nothing was written' if full else f'cannot be written: {error}'}")


def new_folder(path: str | Path) -> None:
    """Make a folder and those above it, where they are not there. Raises UserError naming it when it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def cache_folder() -> Path:
    """Where the system wants files that can be made again: $XDG_CACHE_HOME/entrenar-gpu, by default under ~/.cache;
    ~/Library/Caches/entrenar-gpu on macOS, %LOCALAPPDATA%\\entrenar-gpu on Windows."""
    if os.environ.get("XDG_CACHE_HOME"):
        folder = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path.home() / ".cache"
    return folder / "entrenar-gpu"


def write_text(path: str | Path, text: str) -> None:
    """Replace the file at `path` by UTF-8 `text`."""
    with new_file(path) as stream:
        stream.write(text.encode())
