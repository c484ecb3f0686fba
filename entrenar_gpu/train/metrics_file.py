"""metrics.jsonl and samples.jsonl of a run folder: each step, evaluation and sampled answer in one line of JSON."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from entrenar_gpu.config import refuse_named_pipe
from entrenar_gpu.errors import UserError
from entrenar_gpu.events import EvalRecord, SampleRecord, StepRecord
from entrenar_gpu.files import cannot_write, write_text

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"


class StepLines:
    """A file of JSON lines, each with the step that it is of. Raises UserError for a pipe."""

    def __init__(self, path: Path) -> None:
        refuse_named_pipe(path)
        self._path = path

    def truncate(self, last_step: int) -> None:
        """Forget the steps after `last_step`, which a resumed run will take again."""
        if self._path.exists():
            kept = [line for line in self._lines() if _step_of(line) <= last_step]
            write_text(self._path, "".join(f"{line}\n" for line in kept))

    def _lines(self) -> list[str]:
        return self._path.read_text(encoding="utf-8", errors="replace").splitlines() if self._path.exists() else []

    def _append(self, *lines: dict[str, Any]) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(values) + "\n" for values in lines))
        except OSError as error:
            raise cannot_write(self._path, error) from None


class SamplesFile(StepLines):
    """Observer that appends what the model answers to the sample prompts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / SAMPLES_FILE)

    def samples_drawn(self, record: SampleRecord) -> None:
        pairs = zip(record.rows, record.texts, strict=True)
        self._append(*({"step": record.step, **row, "text": text} for row, text in pairs))


class MetricsFile(StepLines):
    """Observer that appends one JSON line per step to metrics.jsonl; numbers that are not finite become null."""

    FIELDS = (
        *("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds"),
        *("positions", "trained_tokens_per_second"),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / METRICS_FILE)

    def evaluated(self, step: int) -> bool:
        """Whether an evaluation after this step is in the file."""
        return any(_step_of(line) == step and '"eval_loss"' in line for line in self._lines())

    def step_finished(self, record: StepRecord) -> None:
        self._append({key: _finite(getattr(record, key)) for key in self.FIELDS} | {"skipped": record.skipped})

    def eval_finished(self, record: EvalRecord) -> None:
        self._append({"step": record.step, "eval_loss": _finite(record.loss), "eval_tokens": record.tokens})


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics.jsonl, but for one that a crash cut off. Raises UserError without any."""
    path = Path(folder) / METRICS_FILE
    refuse_named_pipe(path)
    rows = []
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                with contextlib.suppress(ValueError, RecursionError):
                    rows.append(json.loads(line))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 2**62  # a line cut off by a crash, or none of ours
