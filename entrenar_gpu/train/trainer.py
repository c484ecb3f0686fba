"""The training loop: batches in, losses out, checkpoints and records on the way.

The host is one step ahead of the device: while the device runs step n, the host prepares step n+1, and then reads the
few numbers that step n left behind. Nothing else is read back between evaluations and checkpoints.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

import entrenar_gpu
from entrenar_gpu.compiler import PlanOptions
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.data import Samples, Tokenizer, TrainBatches, data_files, load_samples
from entrenar_gpu.errors import TrainingDiverged, UserError
from entrenar_gpu.events import CheckpointRecord, EvalRecord, RunInfo, RunSummary, Span, StepRecord, notify
from entrenar_gpu.files import new_folder, write_text
from entrenar_gpu.gpu import GpuClock, KernelCache, step_spans
from entrenar_gpu.model import load_model_config, resolve_model
from entrenar_gpu.ops.optimizer import field
from entrenar_gpu.ops.registry import OPS
from entrenar_gpu.train import run_checkpoint
from entrenar_gpu.train.evaluate import evaluate
from entrenar_gpu.train.graphs import STATE_NAME, training_graphs
from entrenar_gpu.train.host_stats import HostSampler
from entrenar_gpu.train.metrics_file import MetricsFile
from entrenar_gpu.train.schedule import learning_rate
from entrenar_gpu.train.session import Session

MAX_SKIPPED_IN_A_ROW = 10
CONFIG_FILE = "run.json"
DEFAULT_EPOCHS = 3.0


@dataclass
class _Flying:
    """A step the device is still at: what its record needs besides what the device will report."""

    number: int
    epoch: float
    lr: float
    tokens: int
    data_ns: tuple[int, int]  # when the host began and ended to make its batches
    report: Any


class Trainer:
    """One training run, from its configuration to its result.

    >>> Trainer(TrainConfig(model="Qwen3-0.6B", data="train.jsonl", output="run")).run()

    Observers (events.StepObserver) are told of every step; metrics.jsonl in the run folder holds the same in short.
    """

    def __init__(self, config: TrainConfig, observers: Sequence[Any] = (), kernels: KernelCache | None = None) -> None:
        """Read and check model, data and checkpoint, plan, and put the weights on the device.

        `kernels` shares an open device and what was compiled for it; by default the run opens its own.
        """
        for key in ("model", "data", "output"):
            if not getattr(config, key):
                raise UserError(f"--{key}: missing")
        self.config, self._observers = config, (*observers, MetricsFile(Path(config.output)))
        self.output = Path(config.output)
        saved = self._saved = run_checkpoint.resumed_run(config.resume, self.output)
        self.run_id = uuid.uuid4().hex
        # Some chat templates write the date: a resumed run shows them the day on which it began.
        self.started = datetime.now() if saved is None else saved.started
        self.train_samples, self.eval_samples = load_data(config, self.started)
        self.batches = _batches(config, self.train_samples)
        epochs = DEFAULT_EPOCHS if config.epochs is None else config.epochs
        self.total_steps = config.steps if config.steps is not None else max(self.batches.steps(epochs), 1)
        trace = functools.partial(training_graphs, evaluates=self.eval_samples is not None)
        began = None if saved is None else PlanOptions(saved.budget, tiles=saved.tiles)
        engine = None if saved is None else saved.engine
        self.session = Session.open(config, trace, began, kernels=kernels, engine=engine)
        self._loss = math.nan
        try:
            self.first_step = 1 if saved is None else self._go_on(saved)
        except BaseException:
            self.session.close()
            raise
        self._done = self.first_step - 1
        self._last_end = 0
        self._clock = GpuClock()
        self._skipped = 0
        self._stopping = False

    def _go_on(self, saved: run_checkpoint.SavedRun) -> int:
        """Put a checkpoint onto the device; returns the first step to take."""
        run_checkpoint.load_run(self.session, saved)
        self.batches.restore(saved.data)
        if saved.step > self.total_steps:
            raise UserError(f"--steps: {saved.path.parent} is at step {saved.step} already, past {self.total_steps}")
        if saved.step:  # the last loss of a run in which no step is left to take
            self._loss = field(self.executor.read(STATE_NAME), "loss")
        return saved.step + 1

    def observe(self, *observers: Any) -> None:
        """Add observers, before `run`."""
        self._observers = (*observers, *self._observers)

    @property
    def executor(self) -> Any:
        return self.session.executor

    def run(self) -> RunSummary:
        """Train to the last step, evaluate, save, and return how it went.

        An interrupt lets the step under way finish and saves a checkpoint; a second one stops at once. Raises
        TrainingDiverged after ten steps in a row whose loss or gradient was not finite, DeviceLost when the device
        went away; the checkpoints written before stand.
        """
        start = time.time_ns()
        steps = self.steps()
        self._tell("run_started", self._run_info(start))
        status = "failed"
        try:
            with self._interruptible():
                for _ in steps:
                    pass
            status = "interrupted" if self._done < self.total_steps else "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        except Exception as error:
            status = f"failed: {error}"
            raise
        finally:
            taken = self._done - self.first_step + 1
            seconds = (time.time_ns() - start) / 1e9
            summary = RunSummary(taken, self._skipped, self._loss, seconds, str(self.output), status, time.time_ns())
            self._tell("run_finished", summary)
        return summary

    def steps(self) -> Iterator[StepRecord]:
        """Train step by step; each record comes when its step is done on the device, one step late.

        Nothing is written before this is called, which makes the run folder; with the first step a run that goes on
        there drops the checkpoints and metrics of later ones.
        """
        self._make_output()
        return self._watched_steps()

    def _watched_steps(self) -> Iterator[StepRecord]:
        """The steps, with what the host does meanwhile."""
        with HostSampler(str(self.session.gpu_info["adapter"])) as self._host:
            yield from self._steps()

    def _steps(self) -> Iterator[StepRecord]:
        c = self.config
        flying: _Flying | None = None
        if self._saved is not None:  # only now: a run that an observer refuses to begin has lost nothing
            run_checkpoint.forget_after(self._saved, self.output)
        self._calibrate()
        if self.eval_samples is not None and self._saved is None:
            self.evaluate(0)
        for number in range(self.first_step, self.total_steps + 1):
            if self._stopping:
                break
            launched = self._launch(number)
            if flying is not None:
                yield self._land(flying)
            flying = launched
            evaluates = self.eval_samples is not None and c.eval_every and number % c.eval_every == 0
            saves = c.save_every and number % c.save_every == 0
            if number < self.total_steps and (evaluates or saves):
                yield self._land(flying)
                flying = None
                if evaluates:
                    self.evaluate(number)
                if saves:
                    self.save(number)
        if flying is not None:
            yield self._land(flying)
        if self._done < self.total_steps:
            self.save(self._done)
            return
        evaluated = self.first_step > self.total_steps and MetricsFile(self.output).evaluated(self.total_steps)
        if self.eval_samples is not None and not evaluated:
            self.evaluate(self.total_steps)
        self.save(self.total_steps)
        run_checkpoint.save_result(self.session, self.output)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Turns the first interrupt into a request to stop between steps, where weights and counters agree."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread gets signals
            return

        def stop(signum: int, frame: Any) -> None:
            self._stopping = True
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _launch(self, number: int) -> _Flying:
        """Make a step's batches and hand it to the device."""
        start = time.time_ns()
        step = next(self.batches)
        made = time.time_ns()
        lr = learning_rate(self.config, number, self.total_steps)
        write = self.executor.write
        write("inv_tokens", np.array([1 / step.tokens]))
        write("lr", np.array([lr]))
        for micro, batch in enumerate(step.micro_batches):
            self.session.write_batch(batch)
            if "rng" in self.executor.tensors:
                write("rng", np.array([self.config.seed, number, micro]))
            self.executor.run("micro", micro)
        report = self.executor.run("update")
        return _Flying(number, step.epoch, lr, step.tokens, (start, made), report)

    def _land(self, flying: _Flying) -> StepRecord:
        """Wait for a step and tell of it."""
        state = flying.report.result()
        groups = self.session.plan.groups if self.session.plan is not None else {}
        spans, end = step_spans(flying.report, groups, self.config.accumulate, self._clock, flying.data_ns[1])
        start = min(max(flying.data_ns[0], self._last_end), end)
        data = Span("data", "phase", max(flying.data_ns[0], start), max(flying.data_ns[1], start))
        self._last_end = end
        self._done = flying.number
        seconds = max((end - start) / 1e9, 1e-9)
        skipped = not field(state, "apply")
        self._skipped += skipped
        self._loss = field(state, "loss")
        record = StepRecord(
            step=flying.number,
            epoch=flying.epoch,
            loss=self._loss,
            lr=flying.lr,
            grad_norm=field(state, "grad_norm"),
            tokens=flying.tokens,
            row_tokens=self.config.batch * self.config.seq * self.config.accumulate,
            step_seconds=seconds,
            tokens_per_second=flying.tokens / seconds,
            start_ns=start,
            end_ns=end,
            skipped=skipped,
            allocated_bytes=self.session.allocated_bytes,
            flops=self._flops,
            spans=(*spans, data),
            host=self._host.sample(),
        )
        self._tell("step_finished", record)
        if field(state, "in_a_row") >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(
                f"step {flying.number}: loss or gradient not finite {MAX_SKIPPED_IN_A_ROW} times in a row;"
                f" lower --lr; {self._last_checkpoint()}"
            )
        return record

    def evaluate(self, step: int) -> EvalRecord:
        """Mean loss over all unmasked tokens of the evaluation data, as the weights stand."""
        assert self.eval_samples is not None
        start = time.time_ns()
        loss, tokens = evaluate(self.session, self.eval_samples)
        record = EvalRecord(step, loss, math.exp(min(loss, 700.0)), tokens, start, time.time_ns())
        self._calibrate()
        self._last_end = time.time_ns()
        self._tell("eval_finished", record)
        return record

    def save(self, step: int) -> Path:
        """Write a checkpoint of the run as it stands after `step`."""
        start = time.time_ns()
        c = self.config
        path = run_checkpoint.save_run(
            self.session, self.output, step, self.batches.state(), self.started, self.run_id, c.save_total_limit
        )
        nbytes = sum(f.stat().st_size for f in path.iterdir())
        record = CheckpointRecord(step, str(path), nbytes, start, time.time_ns())
        self._calibrate()
        self._last_end = time.time_ns()
        self._tell("checkpoint_saved", record)
        return path

    def _calibrate(self) -> None:
        """Line up the device's clock with the host's, while the device is idle."""
        reading = self.executor.read_clock()
        if reading is not None:
            self._clock.calibrate(*reading)

    def _tell(self, method: str, record: object) -> None:
        notify(self._observers, method, record)

    def _last_checkpoint(self) -> str:
        found = run_checkpoint.find_checkpoints(self.output)
        return f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"

    @property
    def _flops(self) -> int:
        if not hasattr(self, "_flops_cache"):
            micro, update = (
                sum(OPS[n.op].flops(n) for n in self.session.graphs[name].nodes) for name in ("micro", "update")
            )
            self._flops_cache = micro * self.config.accumulate + update
        return self._flops_cache

    def _run_info(self, start: int) -> RunInfo:
        shapes = self.session.shape.model.parameter_shapes()
        return RunInfo(
            run_id=self.run_id,
            output=str(self.output),
            project_version=entrenar_gpu.__version__,
            **self.session.gpu_info,
            model=self.config.model,
            method=self.config.method,
            precision=self.config.precision,
            total_steps=self.total_steps,
            first_step=self.first_step,
            resumes=self._saved.run_id if self._saved is not None else None,
            parameters=sum(math.prod(s) for s in shapes.values()),
            trainable_parameters=sum(math.prod(s) for s in self.session.trainable().values()),
            planned_bytes=self.session.plan.peak_bytes if self.session.plan is not None else 0,
            config=self.config.to_mapping(),
            start_ns=start,
        )

    def _make_output(self) -> None:
        new_folder(self.output)
        saved = {"version": entrenar_gpu.__version__, "config": self.config.to_mapping()}
        write_text(self.output / CONFIG_FILE, json.dumps(saved, indent=2) + "\n")


def _batches(config: TrainConfig, samples: Samples) -> TrainBatches:
    return TrainBatches(
        samples,
        batch=config.batch,
        seq=config.seq,
        accumulate=config.accumulate,
        seed=config.seed,
        shuffle=config.shuffle,
        pack=config.pack,
    )


def load_data(config: TrainConfig, started: datetime) -> tuple[Samples, Samples | None]:
    """Tokenised training and evaluation data of a run that began at `started`."""
    folder = resolve_model(config.model)
    model = load_model_config(folder)
    tokenizer = Tokenizer.load(folder, started) if (folder / "tokenizer.json").is_file() else None
    train, held_out = data_files(config.data, config.eval_data)
    if config.eval_every is not None and held_out is None:
        raise UserError("--eval-every: no evaluation data; give --eval-data, or valid.jsonl in a --data folder")

    def read(path: Path) -> Samples:
        return load_samples(
            path,
            tokenizer,
            vocab_size=model.vocab_size,
            seq=config.seq,
            loss_on=config.loss_on,
            completions=config.completions,
        )

    return read(train), read(held_out) if held_out is not None else None
