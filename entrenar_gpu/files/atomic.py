"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from entrenar_gpu.errors import UserError
from entrenar_gpu.files.checksums import SummedStream

# The names of what is not finished: nobody else's, and never one that is there already. The later forms are those of
# earlier versions.
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{16}|[0-9]+)\.tmp|\.checkpoint-[0-9]+(\.old)?\.tmp")


def temporary_path(path: Path) -> Path:
    """A name beside `path` for what will become it, or for what it was; `sweep` removes what bears such a name."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def sweep(folder: Path) -> None:
    """Remove what a writer that was killed left in a folder. Only for whoever holds the folder's lock."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if _TEMPORARY.fullmatch(entry.name):
                remove(Path(entry.path))


def remove(path: Path) -> None:
    """Delete a file or a whole folder, a link but not what it points to; what cannot be deleted is left."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@contextlib.contextmanager
def new_file(path: str | Path) -> Iterator[SummedStream]:
    """A file to write in place of `path`, which it becomes, flushed to disk, only when the block ends well.

    Raises UserError naming the file when it cannot be written (disk full, no permission); then, as after any other
    exception, the temporary file is gone and what was at `path` before still is.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with _create(temporary) as stream:
            summed = SummedStream(stream)
            yield summed
            stream.flush()
            os.fsync(stream.fileno())
        summed.tell_as(path)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _create(path: Path) -> BinaryIO:
    """A file that was not there: never one that somebody has put in the way, nor what a link points to."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    flags |= sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk; without it a file that was renamed may be gone after a power cut.

    Windows has no such call, and journals its names.
    """
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that cannot
                raise
        finally:
            os.close(descriptor)


def cannot_write(path: str | Path, error: OSError) -> UserError:
    """The one-line form of a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: the disk is full; nothing was written")
    return UserError(f"{path}: cannot be written: {error.strerror or error}")


def new_folder(path: str | Path) -> None:
    """Make a folder and those above it, where they are not there. Raises UserError naming it when it cannot be made."""
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)
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
