"""What an observer may ask of the run that it watches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from entrenar_gpu.errors import UserError


@dataclass
class RunControl:
    """Requests to a run. One that is made while a step is told of is met as soon as the device is through with the step
    that is under way by then: that is the next one, but in `for step in trainer.steps()`, where none is.

    `learning_rate`, where it is not None, stands in for the schedule from the next step on that the device is given. It
    is not kept in checkpoints: whoever set it does so again when a run goes on.
    """

    stop_reason: str | None = None
    wants_evaluation: bool = False
    wants_save: bool = False
    _learning_rate: float | None = field(default=None, repr=False)

    def stop(self, reason: str = "asked to stop") -> None:
        """End the run as if its last step were done: evaluated, saved, with its result written."""
        self.stop_reason = reason

    def save(self) -> None:
        """Write a checkpoint."""
        self.wants_save = True

    def evaluate(self) -> None:
        """Evaluate on the evaluation data, of which there must be some."""
        self.wants_evaluation = True

    @property
    def learning_rate(self) -> float | None:
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float | None) -> None:
        try:
            fine = value is None or (math.isfinite(value) and value >= 0)
        except TypeError:
            fine = False
        if not fine:
            raise UserError(f"learning_rate: {value!r} is not a number from 0 up")
        self._learning_rate = value

    @property
    def waiting(self) -> bool:
        """Whether something was asked for that needs the device to be through."""
        return self.wants_evaluation or self.wants_save
