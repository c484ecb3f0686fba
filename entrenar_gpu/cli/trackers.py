"""Observers that tell a run to where people keep theirs: TensorBoard, Weights & Biases, MLflow, trackio."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from entrenar_gpu.errors import UserError
from entrenar_gpu.events import EvalRecord, RunInfo, RunSummary, StepRecord

SCALARS = ("loss", "lr", "grad_norm", "tokens_per_second")


class _Tracker(ABC):
    """What all have in common: numbers by name and step. `open` begins a run, `log` adds to it, `close` ends it."""

    @abstractmethod
    def open(self, info: RunInfo) -> None: ...

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int, seconds: float) -> None: ...

    @abstractmethod
    def close(self, status: str) -> None: ...

    def run_started(self, info: RunInfo) -> None:
        self.open(info)

    def step_finished(self, record: StepRecord) -> None:
        self._log({f"train/{name}": getattr(record, name) for name in SCALARS}, record)

    def eval_finished(self, record: EvalRecord) -> None:
        self._log({"eval/loss": record.loss, "eval/perplexity": record.perplexity}, record)

    def run_finished(self, summary: RunSummary) -> None:
        self.close(summary.status)

    def _log(self, values: Mapping[str, float], record: StepRecord | EvalRecord) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.log(finite, record.step, record.end_ns / 1e9)


class TensorBoard(_Tracker):
    """Event files in the run folder's `tensorboard`: numbers, and the configuration as text."""

    def __init__(self, folder: Path) -> None:
        self._writer_of = _imported("tensorboard.summary.writer.event_file_writer", "tensorboard").EventFileWriter
        self._event = _imported("tensorboard.compat.proto.event_pb2", "tensorboard").Event
        self._summary = _imported("tensorboard.compat.proto.summary_pb2", "tensorboard").Summary
        self._tensor = _imported("tensorboard.compat.proto.tensor_pb2", "tensorboard").TensorProto
        self._folder = folder / "tensorboard"

    def open(self, info: RunInfo) -> None:
        self._writer = self._writer_of(str(self._folder))
        summary = self._summary()
        value = summary.value.add(tag="config")
        value.metadata.plugin_data.plugin_name = "text"
        text = "\n".join(f"    {line}" for line in json.dumps(dict(info.config), indent=2).splitlines())
        value.tensor.CopyFrom(self._tensor(dtype=7, string_val=[text.encode()]))  # 7: DT_STRING
        self._writer.add_event(self._event(wall_time=info.start_ns / 1e9, step=0, summary=summary))

    def log(self, values: Mapping[str, float], step: int, seconds: float) -> None:
        summary = self._summary()
        for name, number in values.items():
            summary.value.add(tag=name, simple_value=number)
        self._writer.add_event(self._event(wall_time=seconds, step=step, summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()


class WandbLike(_Tracker):
    """Weights & Biases, or trackio, which has its interface."""

    def __init__(self, module: str) -> None:
        self._module = _imported(module, module)

    def open(self, info: RunInfo) -> None:
        name = Path(info.output).name
        self._module.init(project="entrenar-gpu", name=name, config=dict(info.config))

    def log(self, values: Mapping[str, float], step: int, seconds: float) -> None:
        self._module.log(dict(values), step=step)

    def close(self, status: str) -> None:
        self._module.finish()


class MLflow(_Tracker):
    """A run of MLflow's current experiment."""

    def __init__(self) -> None:
        self._module = _imported("mlflow", "mlflow")

    def open(self, info: RunInfo) -> None:
        self._module.start_run(run_name=Path(info.output).name)
        self._module.log_params({name: str(value)[:500] for name, value in info.config.items()})

    def log(self, values: Mapping[str, float], step: int, seconds: float) -> None:
        self._module.log_metrics(dict(values), step=step)

    def close(self, status: str) -> None:
        self._module.end_run("FINISHED" if status == "finished" else "FAILED" if "failed" in status else "KILLED")


_KNOWN: dict[str, Callable[[Path], _Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": lambda folder: WandbLike("wandb"),
    "mlflow": lambda folder: MLflow(),
    "trackio": lambda folder: WandbLike("trackio"),
}


def trackers(names: str | None, folder: str) -> list[_Tracker]:
    """The observers that --report-to asks for. Raises UserError for unknown names and what is not installed."""
    asked = [name.strip() for name in (names or "").split(",") if name.strip() not in ("", "none")]
    for name in asked:
        if name not in _KNOWN:
            raise UserError(f"--report-to: {name!r} is not one of {', '.join(_KNOWN)}")
    return [_KNOWN[name](Path(folder)) for name in asked]


def _imported(module: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"--report-to: {extra} is not installed: pip install 'entrenar-gpu[{extra}]'") from None
