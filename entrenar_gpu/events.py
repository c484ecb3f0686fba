"""What the trainer tells the world: plain records, handed to observers.

An observer is any object with some of the methods of `StepObserver`. Records hold numbers and strings only, so an
observer needs nothing of this package (observability/ duck-types them). All times are host clock nanoseconds since
the epoch, GPU spans included: the trainer maps GPU timestamps onto the host clock before it reports them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Span:
    """A named interval inside a step.

    `kind` is "phase" (data, forward, backward, optimizer, checkpoint, eval), "layer" ("layer 3") or "kernel".
    `parent` indexes the step's span list, where it stands before its children, or is None for a child of the step
    itself. `attributes` may hold layer, kernel, shape, bytes and flops. `on_gpu` tells whether the
    interval was measured by GPU timestamps (True) or by the host clock (False).
    """

    name: str
    kind: str
    start_ns: int
    end_ns: int
    parent: int | None = None
    on_gpu: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunInfo:
    """Facts of a run that do not change while it runs."""

    run_id: str
    output: str
    project_version: str
    adapter: str
    backend: str
    driver: str
    model: str
    method: str
    precision: str
    total_steps: int
    first_step: int  # 1, or the step after the checkpoint a run resumed from
    resumes: str | None  # id of the run that wrote that checkpoint, where it is known
    parameters: int
    trainable_parameters: int
    planned_bytes: int
    config: Mapping[str, Any]
    start_ns: int


@dataclass(frozen=True)
class HostStats:
    """What the host and the GPU did while a step ran; NaN and "" where the system does not tell.

    `run_delay_seconds` is how long threads of this process were ready to run and waited for a processor, summed over
    them; `held_seconds` how long the whole process was kept from running (stopped, swapped out, outrun by others, the
    machine asleep). `others_cpu_seconds` is processor time that other programs took. GPU figures are at most a second
    old.
    """

    cpu_seconds: float
    run_delay_seconds: float
    held_seconds: float
    others_cpu_seconds: float
    major_faults: int
    voluntary_switches: int
    involuntary_switches: int
    peak_resident_bytes: int
    gpu_clock_mhz: float
    gpu_temperature_c: float
    gpu_power_w: float
    gpu_throttle: str


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    `loss` is the mean over the step's unmasked tokens; `grad_norm` the global norm before clipping; both are NaN or
    infinite as computed when the step was skipped. `tokens` counts the tokens trained on (with a target), `positions`
    all tokens of the data that went through the model, prompts included, and `row_tokens` all positions computed,
    padding included. `tokens_per_second` is positions per second, `trained_tokens_per_second` tokens per second.
    `flops` are those of the plan, for all micro-batches of the step.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    row_tokens: int
    step_seconds: float
    tokens_per_second: float
    start_ns: int
    end_ns: int
    skipped: bool = False
    allocated_bytes: int = 0
    flops: int = 0
    spans: tuple[Span, ...] = ()
    host: HostStats | None = None
    positions: int = 0
    trained_tokens_per_second: float = 0.0


@dataclass(frozen=True)
class EvalRecord:
    """Mean loss over all unmasked tokens of the evaluation data, after `step` optimizer steps."""

    step: int
    loss: float
    perplexity: float
    tokens: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class CheckpointRecord:
    """A checkpoint that was written after `step` optimizer steps: its folder, and the bytes that it takes."""

    step: int
    path: str
    bytes: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class SampleRecord:
    """What the model answered to the run's sample prompts after `step` optimizer steps, greedily.

    `rows` are the prompts as the file has them, `texts` the answers.
    """

    step: int
    rows: Sequence[Mapping[str, Any]]
    texts: Sequence[str]
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class RunSummary:
    """How a run went: the steps it took, of them those skipped, the last step's loss, seconds in all, its folder."""

    steps: int
    skipped_steps: int
    final_loss: float
    seconds: float
    output: str
    status: str  # "finished", "interrupted" or "failed: <reason>"
    end_ns: int
    stopped: str = ""  # why a run that finished took fewer steps than planned
    result: str = ""  # which step's weights the result has, where they are not the last one's


@dataclass(frozen=True)
class RequestRecord:
    """A request that the server has answered, or that was broken off.

    `status` is the HTTP status, 499 where the client went away. `finish` holds why each answer ended, in words.
    `cached_tokens` of the prompt were in the key/value cache already. `first_token_ns` is 0 where none came.
    """

    request_id: str
    route: str
    model: str
    status: int
    finish: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    start_ns: int
    first_token_ns: int
    end_ns: int


class StepObserver(Protocol):
    """What a run may tell. Every method is optional; an observer that raises ends the run."""

    def attached(self, control: Any) -> None:
        """Called once, before `run_started`: `control` (train/control.py) takes requests to stop, save, evaluate and
        to train on at another learning rate."""

    def run_started(self, info: RunInfo) -> None: ...
    def step_finished(self, record: StepRecord) -> None: ...
    def eval_finished(self, record: EvalRecord) -> None: ...
    def checkpoint_saved(self, record: CheckpointRecord) -> None: ...
    def samples_drawn(self, record: SampleRecord) -> None: ...
    def run_finished(self, summary: RunSummary) -> None: ...

    def flush(self) -> None:
        """Called before a checkpoint is written: what was told so far has to outlive the process with it."""


def is_observer(value: Any) -> bool:
    """Whether an object, not a class, has any of the methods."""
    names = [name for name in vars(StepObserver) if not name.startswith("_")]
    return not isinstance(value, type) and any(callable(getattr(value, name, None)) for name in names)


def notify(observers: Sequence[Any], method: str, record: object) -> None:
    """Call `method` on every observer that has it."""
    for observer in observers:
        handler = getattr(observer, method, None)
        if handler is not None:
            handler(record)


def flush(observers: Sequence[Any]) -> None:
    """Let every observer that holds anything back write it."""
    for observer in observers:
        handler = getattr(observer, "flush", None)
        if handler is not None:
            handler()
