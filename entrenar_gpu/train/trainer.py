"""The training loop: batches in, losses out, checkpoints and records on the way.

In `run` the host is one step ahead of the device: while the device runs step n, the host prepares and hands over step
n+1, and then reads the few numbers that step n left behind. In `for step in trainer.steps()` the device waits for the
body of the loop, which finds everything as step n left it. Nothing else is read back between evaluations and
checkpoints.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

import entrenar_gpu
from entrenar_gpu import signals
from entrenar_gpu.adapters import adapter_spec, refuse_other_adapter
from entrenar_gpu.compiler import PlanOptions
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.errors import TrainingDiverged, UserError, naming_arguments
from entrenar_gpu.events import (
    CheckpointRecord,
    EvalRecord,
    RunInfo,
    RunSummary,
    SampleRecord,
    StepRecord,
    flush,
    is_observer,
    notify,
)
from entrenar_gpu.gpu import KernelCache
from entrenar_gpu.infer import LanguageModel, RunSampler, model_of
from entrenar_gpu.model import load_model_config, resolve_model
from entrenar_gpu.ops.optimizer import field
from entrenar_gpu.session import STATE_NAME, Session, training_graphs
from entrenar_gpu.train import run_checkpoint
from entrenar_gpu.train.best import best_checkpoint
from entrenar_gpu.train.control import RunControl
from entrenar_gpu.train.evaluate import evaluate
from entrenar_gpu.train.metrics_file import MetricsFile, SamplesFile
from entrenar_gpu.train.random_base import with_random_base
from entrenar_gpu.train.results import FinishedRun, plot_run
from entrenar_gpu.train.run_data import evaluation_steps, load_data, planned_steps
from entrenar_gpu.train.run_folder import RunFolder
from entrenar_gpu.train.step_pipeline import StepOnDevice, StepPipeline

MAX_SKIPPED_IN_A_ROW = 10


def _check_observers(observers: Any) -> None:
    """Raise UserError unless these are a sequence of observers."""
    if not isinstance(observers, Sequence) or isinstance(observers, str | bytes):
        raise UserError(f"observers: a {type(observers).__name__}, not a list of observers")
    for observer in observers:
        if isinstance(observer, type):
            raise UserError(f"observers: {observer.__name__} is a class, not an object of it")
        if not is_observer(observer):
            raise UserError(
                f"observers: a {type(observer).__name__} has no method of StepObserver; rows go in as data="
            )


class Trainer:
    """One training run, from its configuration to its result.

    >>> Trainer(TrainConfig(model="Qwen3-0.6B", data="train.jsonl", output="run")).run()

    Observers (events.StepObserver) are told of every step; metrics.jsonl in the run folder holds the same in short.
    """

    def __init__(
        self,
        config: TrainConfig,
        observers: Sequence[Any] = (),
        kernels: KernelCache | None = None,
        *,
        data: Any = None,
        eval_data: Any = None,
    ) -> None:
        """Read and check model, data and checkpoint, plan, and put the weights on the device.

        `data` and `eval_data` stand in for those of `config`: a path or a list of paths; rows, as mappings or arrays of
        token ids, in a list, a `datasets.Dataset` or any other iterable; one array of token ids. An iterable without a
        length is read as steps need it where `config.steps` says how many there are, else to its end. `kernels` shares
        an open device and what was compiled for it; by default the run opens its own. Raises UserError.
        """
        with naming_arguments():
            self._prepare(config, observers, kernels, data, eval_data)

    def _prepare(
        self, config: TrainConfig, observers: Sequence[Any], kernels: KernelCache | None, data: Any, eval_data: Any
    ) -> None:
        if not isinstance(config, TrainConfig):
            raise UserError(f"config: expected a TrainConfig, not a {type(config).__name__}")
        _check_observers(observers)
        for key in ("model", "data", "output"):
            if not getattr(config, key) and (key != "data" or data is None):
                raise UserError(f"--{key}: missing")
        self.control = RunControl()
        self.output = Path(config.output)
        self._best = best_checkpoint(config, self.output)
        own = (MetricsFile(self.output), SamplesFile(self.output), *([self._best] if self._best else []))
        self._observers = (*observers, *own)
        self._folder = RunFolder(self.output, config.resume)
        self.config = config = with_random_base(config)
        saved = self._folder.saved
        self.run_id = uuid.uuid4().hex
        # Some chat templates write the date: a resumed run shows them the day on which it began.
        self.started = datetime.now() if saved is None else saved.started
        # A wrong --target, or one that is not the adapter's, is told before data is read.
        model = load_model_config(resolve_model(config.model))
        adapter_spec(config, model)
        refuse_other_adapter(config, model)
        self.batches, self.eval_samples = load_data(config, self.started, data, eval_data)
        self.train_samples = self.batches.samples
        self.total_steps = planned_steps(config, self.batches)
        self._eval_every = evaluation_steps(config, self.batches, self.eval_samples is not None)
        self._sampler = None if config.sample_prompts is None else RunSampler(config)
        held_out = self.eval_samples
        weighted = self.batches.weighted or (held_out is not None and held_out.weights is not None)
        trace = functools.partial(
            training_graphs, evaluates=held_out is not None, beside=self._sampler, weighted=weighted
        )
        began = None if saved is None else PlanOptions(saved.budget, tiles=saved.tiles)
        engine = None if saved is None else saved.engine
        with self._folder.device_errors():
            self.session = Session.open(config, trace, began, kernels=kernels, engine=engine, identified=True)
            try:
                self.first_step = 1 if saved is None else self._go_on(saved)
            except BaseException:
                self.session.close()
                raise
        self._pipeline = StepPipeline(self.session, self.batches, self.control, self.total_steps, self.first_step - 1)
        if self.first_step > 1:  # the last loss of a run in which no step is left to take
            self._pipeline.loss = field(self.executor.read(STATE_NAME), "loss")
        self._begun = self._finished = False
        self.stopped_by: int | None = None  # the signal that asked this run to end
        self._closed = False
        self._evaluated = -1  # the step after which the run was evaluated last
        self.result_note = ""  # which step's weights the result has, where they are not the last one's
        notify(self._observers, "attached", self.control)

    def _go_on(self, saved: run_checkpoint.SavedRun) -> int:
        """Put a checkpoint onto the device; returns the first step to take."""
        run_checkpoint.load_run(self.session, saved)
        if self._best is not None and saved.lies_in(self.output):
            self._best.remember(saved.step)
        self.batches.restore(saved.data)
        if saved.step > self.total_steps:
            raise UserError(f"--steps: {saved.path.parent} is at step {saved.step} already, past {self.total_steps}")
        return saved.step + 1

    def observe(self, *observers: Any) -> None:
        """Add observers, before `run`."""
        _check_observers(observers)
        self._observers = (*observers, *self._observers)
        notify(observers, "attached", self.control)

    def stop(self, reason: str = "asked to stop") -> None:
        """End the run after the step under way as if it were the last: evaluated, saved, with its result written."""
        self.control.stop(reason)

    @property
    def learning_rate(self) -> float | None:
        """Where it is not None, the rate of the steps to come instead of the schedule's; checkpoints do not keep it."""
        return self.control.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float | None) -> None:
        self.control.learning_rate = value

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of what is trained, float32, by the names that the files of the result have: an adapter's tensors by
        PEFT's names, or after full training the model's weights."""
        self._settled(None)
        return run_checkpoint.trained_tensors(self.session)

    def plot(self) -> Any:
        """Loss, evaluation loss and learning rate by step, as a plotly figure, which a notebook shows."""
        return plot_run(self.output)

    def close(self) -> None:
        """Give back the device and its memory; the files stay."""
        self._closed = True
        self.session.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def executor(self) -> Any:
        return self.session.executor

    def run(self) -> RunSummary:
        """Train to the last step, evaluate, save, and return how it went.

        SIGINT, SIGTERM and SIGHUP let the step under way finish and save a checkpoint; a second one stops at once.
        After the first, another call goes on. Raises TrainingDiverged after ten steps in a row whose loss or gradient
        was not finite, DeviceLost when the device went away; the checkpoints written before stand.
        """
        with naming_arguments():
            return self._run()

    def _run(self) -> RunSummary:
        if self._finished:
            raise UserError('this Trainer has run; make another to go on, with resume="latest"')
        began, first = time.monotonic(), self._pipeline.done + 1
        self.stopped_by = None
        steps = self._opened(ahead=True)
        try:
            self._tell("run_started", self._run_info(first))
        except BaseException:
            self._folder.release()
            raise
        status = "failed"
        try:
            with self._interruptible():
                for _ in steps:
                    pass
            status = "finished" if self._finished else "interrupted"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        except Exception as error:
            status = f"failed: {error}"
            raise
        finally:
            taken, seconds = self._pipeline.done - first + 1, time.monotonic() - began
            summary = FinishedRun(
                taken,
                self._pipeline.skipped,
                self._pipeline.loss,
                seconds,
                str(self.output),
                status,
                time.time_ns(),
                (self.control.stop_reason or "") if self._pipeline.done < self.total_steps else "",
                self.result_note,
            )
            self._tell("run_finished", summary)
            self._folder.release()
        return summary

    def steps(self) -> Iterator[StepRecord]:
        """Train step by step: each record comes when its step is done on the device, and the next step begins when
        the loop's body is through. What the body reads, evaluates or saves is the state after that step.

        The device waits for the body, and for the host to hand over the next step; `run`, which nobody asks anything
        between steps, keeps it busy. Another call goes on behind the last step, `run` as well. Nothing is written
        before this is called, which makes the run folder; with the first step a run that goes on there drops the
        checkpoints and metrics of later ones. Raises UserError where no step is left to take, or one was broken off.
        """
        with naming_arguments():
            return self._told_steps(self._opened(ahead=False))

    def _told_steps(self, steps: Iterator[StepRecord]) -> Iterator[StepRecord]:
        """The steps; an interrupt waits until the one under way is done, so that the next call can go on behind it."""
        asked: list[int] = []

        def note(number: int, frame: Any) -> None:
            asked.append(number)
            undo()

        with contextlib.closing(steps):  # type: ignore[type-var]
            while True:
                with naming_arguments(), signals.ending(note, [signal.SIGINT]) as undo:
                    record = next(steps, None)
                if record is None:
                    return
                if asked:
                    raise KeyboardInterrupt
                yield record

    def _opened(self, ahead: bool) -> Iterator[StepRecord]:
        self._check_open()
        if self._finished:
            raise UserError(f"this Trainer is at its last step, {self.total_steps}; make another to train on")
        if self._pipeline.launched != self._pipeline.done:
            raise UserError(
                f'step {self._pipeline.launched} was broken off; make another Trainer, with resume="latest"'
            )
        self._folder.take(self.config, self._begun)
        return self._watched_steps(ahead)

    def _watched_steps(self, ahead: bool) -> Iterator[StepRecord]:
        """The steps, with what the host does meanwhile; when they end, the folder is another run's to take."""
        try:
            with self._folder.device_errors(), self._pipeline.watched_host():
                yield from self._steps(ahead)
        finally:
            self._folder.release()

    def _steps(self, ahead: bool) -> Iterator[StepRecord]:
        """`ahead`: the device gets the next step before the record of one is handed out."""
        self._begin()
        flying: StepOnDevice | None = None
        for number in range(self._pipeline.done + 1, self.total_steps + 1):
            drawn = self._pipeline.draw(number)  # while the device is at the step before
            if flying is not None and not ahead:
                yield self._land(flying)
                flying = None
                self._pipeline.timer.resume()
            if self.control.waiting and flying is not None:
                yield self._land(flying)
                flying = None
            if flying is None:
                self._meet_requests()
            if drawn is None and number == 1:
                raise UserError("--data: holds no token to train")
            if drawn is None:
                self.control.stop(f"the data ended at step {number - 1} of {self.total_steps}")
            if drawn is None or self.stopped_by is not None or self.control.stop_reason is not None:
                break
            launched = self._pipeline.launch(drawn)
            if flying is not None:
                yield self._land(flying)
            flying = launched
            if self._evaluates_after(number) or self._saves_after(number) or self._samples_after(number):
                yield self._land(flying)
                flying = None
                if self._samples_after(number):
                    self.sample()
                if self._evaluates_after(number):
                    self.evaluate()
                if self._saves_after(number):
                    self.save()
        if flying is not None:
            yield self._land(flying)
        self._end()

    def _meet_requests(self) -> None:
        """Evaluate and save where observers have asked for it."""
        control = self.control
        if control.wants_evaluation:
            control.wants_evaluation = False
            self.evaluate()
        if control.wants_save:
            control.wants_save = False
            self.save()

    def _begin(self) -> None:
        """What comes before the first step, or before those of another loop over them."""
        if self._begun:
            self._pipeline.timer.resume()
            return
        self._begun = True
        self._folder.forget_later()  # only now: a run that is refused has lost nothing
        self._pipeline.timer.calibrate()
        if self.eval_samples is not None and self._folder.saved is None:
            self.evaluate()
        if self._sampler is not None and self._folder.saved is None:
            self.sample()

    def _end(self) -> None:
        """What comes after the last step, or after that in which the run was asked to stop."""
        if self._pipeline.done < self.total_steps and self.control.stop_reason is None:
            self.save()
            return
        evaluated = self.first_step > self.total_steps and MetricsFile(self.output).evaluated(self.total_steps)
        if self.eval_samples is not None and not evaluated and self._evaluated != self._pipeline.done:
            self.evaluate()
        if self._sampler is not None:
            self.sample()
        self.save()
        run_checkpoint.save_result(self.session, self.output)
        self.result_note = self._best.make_result(self._pipeline.done) if self._best is not None else ""
        self._finished = True

    def _evaluates_after(self, number: int) -> bool:
        every = self._eval_every if self.eval_samples is not None else None
        return every is not None and number % every == 0 and number < self.total_steps

    def _samples_after(self, number: int) -> bool:
        every = self.config.sample_every if self._sampler is not None else None
        return every is not None and number % every == 0 and number < self.total_steps

    def _saves_after(self, number: int) -> bool:
        every = self.config.save_every
        return every is not None and number % every == 0 and number < self.total_steps

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Turns the first signal to end into a request to stop between steps, where weights and counters agree."""

        def stop(number: int, frame: Any) -> None:
            self.stopped_by = number
            undo()

        with signals.ending(stop) as undo:
            yield

    def _land(self, flying: StepOnDevice) -> StepRecord:
        """Wait for a step and tell of it."""
        record = self._pipeline.land(flying)
        self._tell("step_finished", record)
        if self._pipeline.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(
                f"step {record.step}: loss or gradient not finite {MAX_SKIPPED_IN_A_ROW} times in a row;"
                f" lower --lr; {self._folder.last_checkpoint()}"
            )
        return record

    def evaluate(self, step: int | None = None) -> EvalRecord:
        """Mean loss over all unmasked tokens of the evaluation data, after the last step that was told of.

        `step`, where given, must be that step's number. Before the first step it is only returned: observers and
        metrics.jsonl hear of it when the run has begun. Raises UserError where there is nothing to evaluate on.
        """
        if self.eval_samples is None:
            raise UserError("eval_data: there is none to evaluate on")
        self._settled(step)
        begin = self._pipeline.timer.now()
        loss, tokens = evaluate(self.session, self.eval_samples)
        dates = self._pipeline.timer.between_steps(begin)
        self._evaluated = self._pipeline.done
        record = EvalRecord(self._pipeline.done, loss, math.exp(min(loss, 700.0)), tokens, *dates)
        if self._begun:
            self._tell("eval_finished", record)
        return record

    def sample(self) -> SampleRecord:
        """What the model answers to `sample_prompts`, greedily, after the last step that was told of.

        Before the first step it is only returned, as by `evaluate`. Raises UserError where there are no such prompts.
        """
        if self._sampler is None:
            raise UserError("sample_prompts: none to answer; the configuration names no file of them")
        self._settled(None)
        begin = self._pipeline.timer.now()
        texts = self._sampler.answers(self.session)
        record = SampleRecord(
            self._pipeline.done, self._sampler.rows, texts, *self._pipeline.timer.between_steps(begin)
        )
        if self._begun:
            self._tell("samples_drawn", record)
        return record

    @functools.cached_property
    def model(self) -> LanguageModel:
        """The model as it stands when this is first asked for, to talk to (`infer.LanguageModel`).

        It is copied on the device, beside the run, and answers on when the run has gone on or was closed. Raises
        UserError where there is no room for it.
        """
        self._settled(None)
        return model_of(self.session, self.config.seq)

    def save(self, step: int | None = None) -> Path:
        """Write a checkpoint of the run as it stands after the last step that was told of.

        `step`, where given, must be that step's number. Raises UserError before the first step.
        """
        self._settled(step)
        if not self._begun:
            raise UserError("save: no step has been taken yet")
        begin = self._pipeline.timer.now()
        flush(self._observers)  # what goes on from a checkpoint finds every record before it
        path = run_checkpoint.save_run(
            self.session,
            self.output,
            self._pipeline.done,
            self._pipeline.data_state,
            self.started,
            self.run_id,
            self.config.save_total_limit,
            spared=None if self._best is None else self._best.checkpoint,
        )
        nbytes = sum(f.stat().st_size for f in path.iterdir())
        record = CheckpointRecord(self._pipeline.done, str(path), nbytes, *self._pipeline.timer.between_steps(begin))
        self._tell("checkpoint_saved", record)
        return path

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("this Trainer is closed; make another")

    def _settled(self, step: int | None) -> None:
        """Raise unless the device is as the last record left it: in `run` the next step is under way."""
        self._check_open()
        done, launched = self._pipeline.done, self._pipeline.launched
        if step not in (None, done):
            raise ValueError(f"step {step}: the run stands after step {done}")
        if launched != done:
            raise RuntimeError(
                f"step {launched} is under way: save and evaluate in the body of `for step in trainer.steps()`"
            )

    def _tell(self, method: str, record: object) -> None:
        notify(self._observers, method, record)

    def _run_info(self, first_step: int) -> RunInfo:
        return RunInfo(
            run_id=self.run_id,
            output=str(self.output),
            project_version=entrenar_gpu.__version__,
            **self.session.gpu_info,
            model=self.config.model,
            method=self.config.method,
            precision=self.config.precision,
            total_steps=self.total_steps,
            first_step=first_step,
            resumes=self._folder.saved.run_id if self._folder.saved is not None else None,
            parameters=self.session.shape.model.parameters,
            trainable_parameters=sum(math.prod(s) for s in self.session.trainable().values()),
            planned_bytes=self.session.plan.peak_bytes if self.session.plan is not None else 0,
            config=self.config.to_mapping(),
            start_ns=time.time_ns(),
        )
