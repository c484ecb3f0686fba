"""The best checkpoint by evaluation loss: kept, made the run's result, and reason to stop where none better comes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from entrenar_gpu.events import EvalRecord
from entrenar_gpu.files import new_file
from entrenar_gpu.train.control import RunControl
from entrenar_gpu.train.metrics_file import METRICS_FILE, read_metrics

_NO_RESULT = ("optimizer.safetensors", "trainer_state.json")


class BestCheckpoint:
    """Observer behind --keep-best and --patience: asks for a checkpoint of each step whose evaluation is the best so
    far, and for an end after `patience` evaluations that were not. A run that goes on knows those of before."""

    def __init__(self, folder: Path, keep: bool, patience: int | None) -> None:
        self._folder, self._keep, self._patience = folder, keep, patience
        self.step, self.loss, self._waited = 0, math.inf, 0

    def attached(self, control: RunControl) -> None:
        self._control = control

    def remember(self, last_step: int) -> None:
        """The evaluations up to `last_step` of the run that goes on here."""
        if (self._folder / METRICS_FILE).exists():
            for row in read_metrics(self._folder):
                loss = row.get("eval_loss")
                if row["step"] <= last_step and isinstance(loss, float):
                    self._note(row["step"], loss)

    def eval_finished(self, record: EvalRecord) -> None:
        better = self._note(record.step, record.loss)
        if better and self._keep and record.step:
            self._control.save()
        spent = self._patience is not None and self._waited >= self._patience
        if spent and self._control.stop_reason is None:
            self._control.stop(f"no better evaluation loss in {self._waited} evaluations")

    def _note(self, step: int, loss: float) -> bool:
        if math.isfinite(loss) and loss < self.loss:
            self.step, self.loss, self._waited = step, loss, 0
            return True
        self._waited += 1
        return False

    @property
    def checkpoint(self) -> Path | None:
        """The best checkpoint, where one is kept."""
        path = self._folder / f"checkpoint-{self.step:06}"
        return path if self._keep and path.is_dir() else None

    def make_result(self, last_step: int) -> str:
        """Put the best checkpoint's weights in place of the last step's; what was done, in words."""
        best = self.checkpoint
        if best is None or self.step == last_step:
            return ""
        for source in sorted(best.iterdir()):
            if source.is_file() and source.name not in _NO_RESULT:
                with open(source, "rb") as original, new_file(self._folder / source.name) as copy:
                    shutil.copyfileobj(original, copy)
        return f"the result is that of step {self.step}, with evaluation loss {self.loss:.4f}"


def best_checkpoint(config: Any, folder: Path) -> BestCheckpoint | None:
    """The observer that a configuration asks for."""
    if not config.keep_best and config.patience is None:
        return None
    return BestCheckpoint(folder, config.keep_best, config.patience)
