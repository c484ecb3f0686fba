"""Observers that tell a run to where people keep theirs: TensorBoard, Weights & Biases, MLflow, trackio."""

from __future__ import annotations

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu.cli.text import printable
from entrenar_gpu.errors import UserError
from entrenar_gpu.events import EvalRecord, RunInfo, RunSummary, SampleRecord, StepRecord

SCALARS = ("loss", "lr", "grad_norm", "tokens_per_second")
STEPS_OF_HISTOGRAM = 100  # whose gradient norms make one, or those since the last evaluation
BINS = 30


class _Tracker(ABC):
    """What all have in common: numbers by name and step, samples of text, and what the gradient norms were like.

    `open` begins a run, the rest add to it, `close` ends it. What a library cannot do when a run begins ends it in one
    line; what goes wrong later is said once, and the run goes on without that library.
    """

    name: str

    def __init__(self) -> None:
        self._norms: list[float] = []
        self._failed = False

    @abstractmethod
    def open(self, info: RunInfo) -> None: ...

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int, seconds: float) -> None: ...

    @abstractmethod
    def show(self, rows: Sequence[tuple[str, str]], step: int, seconds: float) -> None:
        """Samples: what the model was asked, and what it said."""

    @abstractmethod
    def spread(self, name: str, values: Sequence[float], step: int, seconds: float) -> None:
        """A histogram."""

    @abstractmethod
    def close(self, status: str) -> None: ...

    def run_started(self, info: RunInfo) -> None:
        try:
            self.open(info)
        except Exception as error:
            raise UserError(f"--report-to: {self.name}: {_reason(error)}") from error

    def step_finished(self, record: StepRecord) -> None:
        self._log({f"train/{name}": getattr(record, name) for name in SCALARS}, record)
        if math.isfinite(record.grad_norm):
            self._norms.append(record.grad_norm)
        if len(self._norms) == STEPS_OF_HISTOGRAM:
            self._spread(record.step, record.end_ns)

    def eval_finished(self, record: EvalRecord) -> None:
        self._log({"eval/loss": record.loss, "eval/perplexity": record.perplexity}, record)
        self._spread(record.step, record.end_ns)

    def samples_drawn(self, record: SampleRecord) -> None:
        asked = [_asked(row) for row in record.rows]
        self._try(self.show, list(zip(asked, record.texts, strict=True)), record.step, record.end_ns / 1e9)

    def run_finished(self, summary: RunSummary) -> None:
        self._try(self.close, summary.status)

    def _try(self, method: Callable[..., None], *given: Any) -> None:
        if self._failed:
            return
        try:
            method(*given)
        except Exception as error:
            self._failed = True
            text = f"--report-to: {self.name} is told no more: {_reason(error)}"
            print(printable(text), file=sys.stderr)

    def _spread(self, step: int, end_ns: int) -> None:
        if self._norms:
            self._try(self.spread, "train/grad_norms", self._norms, step, end_ns / 1e9)
            self._norms = []

    def _log(self, values: Mapping[str, float], record: StepRecord | EvalRecord) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._try(self.log, finite, record.step, record.end_ns / 1e9)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _asked(row: Mapping[str, Any]) -> str:
    """What a row of --sample-prompts asks, as text."""
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    messages = row.get("messages") or [row]
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)


class TensorBoard(_Tracker):
    """Event files in the run folder's `tensorboard`: numbers, histograms, texts, and the options as hyperparameters."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._writer_of = _imported("tensorboard.summary.writer.event_file_writer", "tensorboard").EventFileWriter
        self._event = _imported("tensorboard.compat.proto.event_pb2", "tensorboard").Event
        self._summary = _imported("tensorboard.compat.proto.summary_pb2", "tensorboard").Summary
        self._histogram = _imported("tensorboard.compat.proto.summary_pb2", "tensorboard").HistogramProto
        self._tensor = _imported("tensorboard.compat.proto.tensor_pb2", "tensorboard").TensorProto
        self._plugin = _imported("tensorboard.plugins.hparams.plugin_data_pb2", "tensorboard")
        self._statuses = _imported("tensorboard.plugins.hparams.api_pb2", "tensorboard").Status
        self._folder = folder / "tensorboard"
        self._end_seconds = 0.0

    def open(self, info: RunInfo) -> None:
        self._writer = self._writer_of(str(self._folder))
        started = info.start_ns / 1e9
        text = "\n".join(f"    {line}" for line in json.dumps(dict(info.config), indent=2).splitlines())
        self._add(self._text("config", [text]), 0, started)
        start = self._plugin.SessionStartInfo(group_name=info.output, start_time_secs=started)
        for name, value in info.config.items():
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, (int, float)):
                start.hparams[name].number_value = value
            elif value is not None:
                start.hparams[name].string_value = str(value)
        self._add(self._session(session_start_info=start), 0, started)

    def log(self, values: Mapping[str, float], step: int, seconds: float) -> None:
        summary = self._summary()
        for name, number in values.items():
            summary.value.add(tag=name, simple_value=number)
        self._add(summary, step, seconds)

    def show(self, rows: Sequence[tuple[str, str]], step: int, seconds: float) -> None:
        for number, (asked, said) in enumerate(rows, 1):
            indented = ["\n".join(f"    {line}" for line in text.splitlines()) for text in (asked, said)]
            self._add(self._text(f"samples/{number}", ["\n\n---\n\n".join(indented)]), step, seconds)

    def spread(self, name: str, values: Sequence[float], step: int, seconds: float) -> None:
        counts, edges = np.histogram(values, BINS)
        made = self._histogram(min=min(values), max=max(values), num=len(values), sum=sum(values))
        made.sum_squares = sum(value * value for value in values)
        made.bucket_limit.extend(edges[1:].tolist())
        made.bucket.extend(counts.tolist())
        summary = self._summary()
        summary.value.add(tag=name, histo=made)
        self._add(summary, step, seconds)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, status: str) -> None:
        succeeded = self._statuses.Value("STATUS_SUCCESS" if status == "finished" else "STATUS_FAILURE")
        end = self._plugin.SessionEndInfo(status=succeeded, end_time_secs=self._end_seconds)
        self._add(self._session(session_end_info=end), 0, self._end_seconds)
        self._writer.close()

    def _text(self, tag: str, texts: Sequence[str]) -> Any:
        summary = self._summary()
        value = summary.value.add(tag=tag)
        value.metadata.plugin_data.plugin_name = "text"
        value.tensor.CopyFrom(self._tensor(dtype=7, string_val=[text.encode() for text in texts]))  # 7: DT_STRING
        return summary

    def _session(self, **info: Any) -> Any:
        """A part of what the hyperparameters' dashboard reads of a run."""
        (kind,) = info
        summary = self._summary()
        value = summary.value.add(tag=f"_hparams_/{kind}")
        value.metadata.plugin_data.plugin_name = "hparams"
        value.metadata.plugin_data.content = self._plugin.HParamsPluginData(version=0, **info).SerializeToString()
        return summary

    def _add(self, summary: Any, step: int, seconds: float) -> None:
        self._end_seconds = max(self._end_seconds, seconds)
        self._writer.add_event(self._event(wall_time=seconds, step=step, summary=summary))


class WandbLike(_Tracker):
    """Weights & Biases, or trackio, which has its interface."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self.name = module
        self._module = _imported(module, module)

    def open(self, info: RunInfo) -> None:
        name = Path(info.output).name
        self._module.init(project="entrenar-gpu", name=name, config=dict(info.config))

    def log(self, values: Mapping[str, float], step: int, seconds: float) -> None:
        self._module.log(dict(values), step=step)

    def show(self, rows: Sequence[tuple[str, str]], step: int, seconds: float) -> None:
        table = self._module.Table(columns=["asked", "said"], data=[list(row) for row in rows])
        self._module.log({"samples": table}, step=step)

    def spread(self, name: str, values: Sequence[float], step: int, seconds: float) -> None:
        self._module.log({name: self._module.Histogram(list(values))}, step=step)

    def close(self, status: str) -> None:
        self._module.finish()


class MLflow(_Tracker):
    """A run of MLflow's current experiment; samples and histograms are its artifacts."""

    name = "mlflow"

    def __init__(self) -> None:
        super().__init__()
        self._module = _imported("mlflow", "mlflow")

    def open(self, info: RunInfo) -> None:
        self._module.start_run(run_name=Path(info.output).name)
        self._module.log_params({name: str(value)[:500] for name, value in info.config.items()})

    def log(self, values: Mapping[str, float], step: int, seconds: float) -> None:
        self._module.log_metrics(dict(values), step=step)

    def show(self, rows: Sequence[tuple[str, str]], step: int, seconds: float) -> None:
        table = [{"asked": asked, "said": said} for asked, said in rows]
        self._module.log_dict({"samples": table}, f"samples/step-{step:06}.json")

    def spread(self, name: str, values: Sequence[float], step: int, seconds: float) -> None:
        counts, edges = np.histogram(values, BINS)
        histogram = {"counts": counts.tolist(), "edges": edges.tolist()}
        self._module.log_dict(histogram, f"{name.replace('/', '_')}/step-{step:06}.json")

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
