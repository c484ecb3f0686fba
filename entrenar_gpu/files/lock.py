"""One writer at a time: locks that the system takes back when their process ends, however it ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from entrenar_gpu.errors import UserError
from entrenar_gpu.files.atomic import cannot_write, new_folder

LOCK_FILE = ".lock"


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """What one process at a time does about the file `path`, in a folder that exists; the others wait for their turn.

    Where the folder's file system has no locks, nobody waits.
    """
    lock = filelock.FileLock(path.with_name(path.name + LOCK_FILE))
    with contextlib.suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class FolderLock:
    """The right to write into a folder, held by one process at a time. `LOCK_FILE` is in the folder while it is held.

    The file's text is the holder's pid, for messages alone: what locks is the system's lock on it (`filelock`).
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / LOCK_FILE
        self._lock = filelock.FileLock(self._path)
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take it, making the folder where there is none; nothing happens where this object holds it already.

        Raises UserError naming the folder, and the other's pid where it is known.
        """
        if self._lock.is_locked:
            return
        self._made = [folder for folder in (self._folder, *self._folder.parents) if not os.path.exists(folder)]
        new_folder(self._folder)
        holder = self._holder()
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise self._taken(holder) from None
        except OSError as error:
            raise cannot_write(self._path, error) from None
        with contextlib.suppress(OSError), open(self._path, "r+", encoding="ascii") as stream:
            stream.truncate()
            stream.write(f"{os.getpid()}\n")

    def check(self) -> None:
        """Raise UserError where somebody holds it now; makes nothing."""
        if not os.path.exists(self._path) or self._lock.is_locked:
            return
        holder = self._holder()
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise self._taken(holder) from None
        except OSError:  # told when the folder is written to
            return
        self.release()

    def release(self) -> None:
        """Give it back, where it is held, and remove the folders that taking it has made, where nothing is in them.

        The file goes first: whoever opened it meanwhile finds that it is gone.
        """
        if not self._lock.is_locked:
            return
        with contextlib.suppress(OSError):  # an open file cannot be deleted on Windows: filelock does it there
            self._path.unlink()
        self._lock.release()
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _holder(self) -> str:
        try:
            text = self._path.read_text(encoding="ascii").strip() if self._path.is_file() else ""
        except (OSError, ValueError):
            return ""
        return text if text.isdecimal() and len(text) < 20 else ""

    def _taken(self, pid: str) -> UserError:
        who = f"process {pid}" if pid else "another process"
        return UserError(f"--output: {who} is writing to {self._folder}; wait for it, or use another folder")
