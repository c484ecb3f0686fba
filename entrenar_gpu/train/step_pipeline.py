"""Steps on their way: drawn from the data by the host, handed over to the device, and landed as records."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar_gpu.data import Step
from entrenar_gpu.events import StepRecord
from entrenar_gpu.ops.optimizer import field
from entrenar_gpu.ops.registry import OPS
from entrenar_gpu.session import Session
from entrenar_gpu.train.control import RunControl
from entrenar_gpu.train.host_stats import HostSampler
from entrenar_gpu.train.schedule import learning_rate
from entrenar_gpu.train.step_timer import StepTimer


@dataclass(frozen=True)
class DrawnStep:
    """A step's batches, the place in the data behind them, and when the host began and ended to make them."""

    number: int
    batches: Step
    data_state: dict[str, Any]
    drawn_ns: tuple[int, int]


@dataclass(frozen=True)
class StepOnDevice:
    """A step the device is still at, and what it will report."""

    drawn: DrawnStep
    lr: float
    report: Any


class StepPipeline:
    """Draws, launches and lands the steps of one run. Of each, one may wait for the device and one be under way."""

    def __init__(self, session: Session, batches: Any, control: RunControl, total_steps: int, done: int) -> None:
        """For a run that stands after step `done`, with `batches` in the same place of the data."""
        self._session, self._batches, self._control, self._total_steps = session, batches, control, total_steps
        self._config, self._executor = session.config, session.executor
        self.timer = StepTimer(self._executor, session.fitted.plan.groups, self._config.accumulate)
        self.done = self.launched = done  # the last step that was told of, and handed over
        self.data_state = batches.state()  # behind the last step that was handed over
        self.loss = math.nan  # of the last step
        self.skipped = self.skipped_in_a_row = 0
        self._waiting: DrawnStep | None = None  # a step that was drawn and not handed over

    @contextlib.contextmanager
    def watched_host(self) -> Iterator[None]:
        """While this is open, records say what the host did."""
        with HostSampler(str(self._session.gpu_info["adapter"])) as self._host:
            yield

    def draw(self, number: int) -> DrawnStep | None:
        """Make a step's batches, where they have not been made yet; None where the data have ended."""
        if self._waiting is None:
            begin = self.timer.now()
            batches = next(self._batches, None)
            if batches is None:
                return None
            self._waiting = DrawnStep(number, batches, self._batches.state(), (begin, self.timer.now()))
        return self._waiting

    def launch(self, drawn: DrawnStep) -> StepOnDevice:
        """Hand a step to the device."""
        self.launched, self.data_state, self._waiting = drawn.number, drawn.data_state, None
        lr = self._control.learning_rate
        lr = learning_rate(self._config, drawn.number, self._total_steps) if lr is None else lr
        write = self._executor.write
        write("inv_tokens", np.array([1 / drawn.batches.weight]))
        write("lr", np.array([lr]))
        for number, batch in enumerate(drawn.batches.micro_batches):
            self._session.write_batch(batch)
            if "rng" in self._executor.tensors:
                write("rng", np.array([self._config.seed, drawn.number, number]))
            self._executor.run("micro", number)
        return StepOnDevice(drawn, lr, self._executor.run("update"))

    def land(self, flying: StepOnDevice) -> StepRecord:
        """Wait for a step, and say how it went."""
        state, batches = flying.report.result(), flying.drawn.batches
        times = self.timer.step(flying.report, flying.drawn.drawn_ns)
        self.done = flying.drawn.number
        skipped = not field(state, "apply")
        self.skipped += skipped
        self.loss = field(state, "loss")
        self.skipped_in_a_row = int(field(state, "in_a_row"))
        return StepRecord(
            step=self.done,
            epoch=batches.epoch,
            loss=self.loss,
            lr=flying.lr,
            grad_norm=field(state, "grad_norm"),
            tokens=batches.tokens,
            row_tokens=self._config.batch * self._config.seq * self._config.accumulate,
            step_seconds=times.seconds,
            tokens_per_second=batches.positions / times.seconds,
            start_ns=times.start_ns,
            end_ns=times.end_ns,
            skipped=skipped,
            allocated_bytes=self._session.allocated_bytes,
            flops=self._flops,
            spans=times.spans,
            host=self._host.between(times.start_ns, times.end_ns),
            positions=batches.positions,
            trained_tokens_per_second=batches.tokens / times.seconds,
        )

    @functools.cached_property
    def _flops(self) -> int:
        """Of one optimizer step."""
        graphs = self._session.graphs
        micro, update = (sum(OPS[n.op].flops(n) for n in graphs[name].nodes) for name in ("micro", "update"))
        return micro * self._config.accumulate + update
