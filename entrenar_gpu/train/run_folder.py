"""The folder of one run while that run writes into it: who may, what it goes on from, and what stands there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import entrenar_gpu
from entrenar_gpu.adapters import RUN_FILE
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.errors import DeviceLost, UserError
from entrenar_gpu.files import FolderLock, sweep, write_text
from entrenar_gpu.gpu import device_errors
from entrenar_gpu.train import run_checkpoint


class RunFolder:
    """`path`, and `saved`, the checkpoint that the run goes on from, where it does."""

    def __init__(self, path: Path, resume: str | None) -> None:
        """Raises UserError where another process is at work in the folder, or there is nothing to resume."""
        self.path = path
        self._resume = resume
        self._lock = FolderLock(path)
        self._lock.check()
        self.saved = run_checkpoint.resumed_run(resume, path)

    def take(self, config: TrainConfig, begun: bool) -> None:
        """Keep others out, and write what this run is. Raises UserError where another has used the folder meanwhile."""
        self._lock.acquire()
        try:
            if not begun and run_checkpoint.resumed_run(self._resume, self.path) != self.saved:
                raise UserError(f"--output: another process has gone on with {self.path} meanwhile; start again")
            sweep(self.path)
            told = {"version": entrenar_gpu.__version__, "config": config.to_mapping()}
            write_text(self.path / RUN_FILE, json.dumps(told, indent=2) + "\n")
        except BaseException:
            self._lock.release()
            raise

    def release(self) -> None:
        """Let others in."""
        self._lock.release()

    def forget_later(self) -> None:
        """Drop what the folder holds of steps after the checkpoint that the run goes on from."""
        run_checkpoint.forget_after(self.saved, self.path)

    def last_checkpoint(self) -> str:
        """Which checkpoint stands, in words."""
        found = run_checkpoint.find_checkpoints(self.path)
        return f"the last checkpoint stands: {found[-1]}" if found else "there is no checkpoint yet"

    @contextlib.contextmanager
    def device_errors(self) -> Iterator[None]:
        """Errors of the device as this project's; that of one that went away says what is left."""
        try:
            with device_errors():
                yield
        except DeviceLost as error:
            raise DeviceLost(f"{error}; {self.last_checkpoint()}") from error
