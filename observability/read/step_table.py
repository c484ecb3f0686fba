"""Training steps as columns: one row a step, one column a kind of span, taken from a table of spans.

Time in `checkpoint`, `eval` and `sample` spans is counted apart, whether they lie inside their step or beside it:
`seconds` is the step without them, `wall_seconds` the step with its checkpoint. Evaluations and samples are asked for
and take what they take.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from observability import schema
from observability.errors import TraceError
from observability.read.kernel_sums import KernelSums, kernel_sums
from observability.read.span_table import (
    KERNEL,
    LAYER,
    NO_STEP,
    PHASE,
    RUN_STEP,
    Floats,
    Ints,
    SpanTable,
    one_line,
    whole,
)

PAUSES: Final = (schema.CHECKPOINT, schema.EVAL, schema.SAMPLE)
MOST_KINDS: Final = 1000
_TAKEN_AGAIN: Final = -1  # in place of a run: of steps that a resumed run repeats
_LARGEST: Final = 1e100
SAMPLED: Final = 0.9  # of the steps: where fewer have kernels, those are samples
_LEVEL_NAMES: Final = {PHASE: "phase", LAYER: "layer", KERNEL: "kernel"}
HOST_VALUES: Final = tuple(key for key in schema.HOST_KEYS if key != "gpu_throttle")  # numbers that the host tells
_VALUES: Final = {
    "loss": schema.LOSS,
    "learning_rate": schema.LEARNING_RATE,
    "grad_norm": schema.GRAD_NORM,
    "tokens": schema.TOKENS,
    "row_tokens": schema.ROW_TOKENS,
    "allocated_bytes": schema.ALLOCATED_BYTES,
    "flops": schema.STEP_FLOPS,
    "epoch": schema.EPOCH,
    "tokens_per_second": schema.TOKENS_PER_SECOND,
} | {key: name for key, name in schema.HOST_KEYS.items() if key in HOST_VALUES}


@dataclass(frozen=True)
class Kind:
    """A kind of span: every span of one name and shape, and for a layer of one phase, counts as the same."""

    level: str  # phase, layer or kernel
    name: str
    shape: str = ""
    phase: str = ""

    @property
    def label(self) -> str:
        if self.level == "layer" and self.phase:
            return f"{self.name} ({self.phase})"
        return f"{self.name} {self.shape}".strip()


@dataclass(frozen=True)
class Pause:
    """A checkpoint, an evaluation or samples drawn: what it was, the step it belongs to, seconds, and bytes
    written (0: not told) or the loss over the evaluation data.
    """

    name: str
    step: int
    seconds: float
    bytes: int = 0
    loss: float = math.nan


@dataclass(frozen=True)
class Told:
    """An anomaly that the live detector told of while the run trained, as it saw it then."""

    cause: str
    severity: str
    step: int
    first_step: int
    last_step: int
    span: str
    evidence: str


@dataclass(frozen=True)
class StepTable:
    """A run's steps in order. `durations[i, k]` are the seconds that step i spent in spans of `kinds[k]`.

    `start` is seconds since the first step, which began `began_ns` after the epoch. `values` are what the steps tell of
    themselves (NaN where they do not).
    """

    step: Ints
    start: Floats
    seconds: Floats
    wall_seconds: Floats
    skipped: npt.NDArray[np.bool_]
    values: Mapping[str, Floats]
    kinds: tuple[Kind, ...]
    durations: Floats
    pauses: tuple[Pause, ...] = ()
    restarts: tuple[int, ...] = ()  # rows with which resumed parts of the run begin
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    began_ns: int = 0
    between: Floats = field(default_factory=lambda: np.zeros(0))  # seconds before each step, in no span
    throttle: npt.NDArray[np.str_] = field(default_factory=lambda: np.zeros(0, dtype=str))  # why, by step; or empty
    told: tuple[Told, ...] = ()
    gpu_seconds: Floats = field(default_factory=lambda: np.zeros(0))  # by step, in phases that the GPU timed; or empty
    kernels: KernelSums | None = None

    def __len__(self) -> int:
        return len(self.step)

    @property
    def total_seconds(self) -> float:
        """The run's: steps, checkpoints, evaluations, and what lay between them in no span."""
        pauses = sum(pause.seconds for pause in self.pauses)
        return float(np.sum(self.seconds)) + pauses + float(np.sum(self.between))

    def rows(self, kept: npt.NDArray[np.bool_]) -> StepTable:
        """The steps that the mask `kept` holds."""
        own = ("step", "start", "seconds", "wall_seconds", "skipped", "durations")
        values = {key: column[kept] for key, column in self.values.items()}
        throttle = self.throttle[kept] if len(self.throttle) else self.throttle
        return replace(
            self, values=values, throttle=throttle, restarts=(), **{name: getattr(self, name)[kept] for name in own}
        )

    def column(self, level: str, name: str) -> Floats | None:
        """Seconds a step in the kind of this level and name, or None where the trace has none."""
        for index, kind in enumerate(self.kinds):
            if kind.level == level and kind.name == name:
                column: Floats = self.durations[:, index]
                return column
        return None


def step_table(spans: SpanTable, source: str) -> StepTable:
    """The steps of the newest run in `spans`, with those of earlier runs that it goes on from.

    `source` names the spans in errors. Raises TraceError when there is no step.
    """
    rows = np.flatnonzero(spans.level == RUN_STEP)
    if not len(rows):
        raise TraceError(f"{source}: no training steps among its {len(spans)} spans{_seen(spans)}")
    notes = [f"{count} {reason}" for reason, count in spans.skipped.items()]
    newest = int(spans.run[rows[np.argmax(spans.start[rows])]])
    spans, began_again = _with_earlier_parts(spans, newest)
    if began_again:
        notes.append(f"resumed at step {', '.join(map(str, began_again))}")
    others = len(np.setdiff1d(spans.run[rows], [newest, _TAKEN_AGAIN]))
    if others:
        notes.append(f"{others} earlier run(s) in the same trace (this is the newest)")
    rows = rows[spans.run[rows] == newest]
    rows = _one_row_a_step(spans, rows, notes)
    if not len(rows):
        raise TraceError(f"{source}: its step spans have no step numbers")
    step, start = spans.step[rows], spans.start[rows]
    backwards = int(np.sum(np.diff(start) < 0))
    if backwards:
        notes.append(f"{backwards} time(s) the clock went backwards between steps (durations are used as they are)")
    wall = (spans.end[rows] - start) / 1e9
    kinds, durations, pauses, inside = _children(spans, newest, rows, step, notes)
    pauses_beside = pause_intervals(spans, newest)
    attributes = [spans.attributes.get(int(row), {}) for row in rows]
    checkpoints = pause_seconds(pauses, step, schema.CHECKPOINT)
    restarts = tuple(np.searchsorted(step, began_again).tolist())
    between = _between(step, start, spans.end[rows], pauses_beside, restarts)
    return StepTable(
        step=step,
        start=(start - start[0]) / 1e9,
        seconds=np.maximum(wall - inside, 1e-9),
        wall_seconds=np.maximum(wall - inside + checkpoints, 1e-9),
        skipped=np.array([bool(a.get(schema.SKIPPED)) for a in attributes]),
        values={key: np.array([number(a.get(name)) for a in attributes]) for key, name in _VALUES.items()},
        kinds=kinds,
        durations=durations,
        pauses=tuple(pauses),
        restarts=restarts,
        between=between,
        facts=_facts(spans, newest),
        notes=tuple(notes),
        began_ns=int(start[0]),
        throttle=np.array([str(a.get(schema.GPU_THROTTLE, "")) for a in attributes]),
        told=_told(spans, newest),
        gpu_seconds=_gpu_seconds(spans, newest, step),
        kernels=kernel_sums(spans, newest, step),
    )


def _gpu_seconds(spans: SpanTable, run: int, step: Ints) -> Floats:
    """Seconds of each step in phases that the GPU timed; empty where it timed none."""
    rows = np.flatnonzero((spans.run == run) & (spans.level == PHASE) & spans.on_gpu)
    position = np.searchsorted(step, spans.step[rows])
    known = (position < len(step)) & (step[np.minimum(position, len(step) - 1)] == spans.step[rows])
    if not known.any():
        return np.zeros(0)
    seconds = (spans.end[rows[known]] - spans.start[rows[known]]) / 1e9
    result: Floats = np.bincount(position[known], weights=seconds, minlength=len(step)).astype(np.float64)
    return result


def _told(spans: SpanTable, run: int) -> tuple[Told, ...]:
    """What was told of the run while it trained, in order."""
    result = []
    for row, attributes in spans.attributes.items():
        if spans.label(row) != schema.ANOMALY or spans.run[row] != run:
            continue
        step = whole(attributes.get(schema.STEP_NUMBER), NO_STEP)
        first, last = (
            whole(attributes.get(key), step) for key in (schema.ANOMALY_FIRST_STEP, schema.ANOMALY_LAST_STEP)
        )
        words = (schema.ANOMALY_CAUSE, schema.ANOMALY_SEVERITY, schema.ANOMALY_SPAN, schema.ANOMALY_EVIDENCE)
        cause, severity, span, evidence = (one_line(str(attributes.get(key, ""))) for key in words)
        result.append(Told(cause, severity, step, first, max(first, last), span, evidence))
    return tuple(result)


def pause_intervals(spans: SpanTable, run: int) -> Ints:
    """[pauses, 2] when checkpoints and evaluations of the run began and ended, nanoseconds, in order."""
    names = [i for i, label in enumerate(spans.labels) if label in PAUSES]
    rows = np.flatnonzero((spans.run == run) & (spans.level == PHASE) & np.isin(spans.name, names))
    rows = rows[np.argsort(spans.start[rows], kind="stable")]
    return np.stack([spans.start[rows], spans.end[rows]], axis=1)


def _between(step: Ints, start: Ints, end: Ints, pauses: Ints, restarts: tuple[int, ...]) -> Floats:
    """Seconds before each step, from the end of the one before, in which no checkpoint or evaluation ran either.

    None before the first step of the run or of a resumed part, as what came before was no step's, nor where the step
    before is not in the trace.
    """
    result = np.zeros(len(start))
    for row in np.flatnonzero((start[1:] > end[:-1]) & (np.diff(step) == 1)) + 1:
        if row not in restarts:
            result[row] = gap_before(int(end[row - 1]), int(start[row]), pauses)
    return result


def gap_before(low: int, high: int, pauses: Ints) -> float:
    """Seconds between two dates, in nanoseconds, less those of the `pauses` [n, 2] in order that lie there."""
    covered, at = 0, low
    first, last = int(np.searchsorted(pauses[:, 1], low, side="right")), int(np.searchsorted(pauses[:, 0], high))
    for begin, stop in pauses[first:last].tolist():
        covered += max(min(stop, high) - max(begin, at), 0)
        at = max(at, min(stop, high))
    return max(high - low - covered, 0) / 1e9


def _with_earlier_parts(spans: SpanTable, newest: int) -> tuple[SpanTable, list[int]]:
    """`spans` with the steps that `newest` goes on from counted as its own, and the steps at which it began again.

    A step that was taken twice, before an interruption and again after it, is the later one's.
    """
    run, part, end = spans.run.copy(), newest, 2**62
    began_again: list[int] = []
    seen = {newest}
    while part in spans.resumes and spans.resumes[part][0] not in seen:
        part, first = spans.resumes[part]
        end = min(end, first)
        of_part = (spans.run == part) & (spans.step != NO_STEP)
        run[of_part] = np.where(spans.step[of_part] < end, newest, _TAKEN_AGAIN)
        if np.any(of_part & (spans.level == RUN_STEP) & (spans.step < end)):
            began_again.insert(0, first)
        seen.add(part)
    return replace(spans, run=run), began_again


def number(value: Any) -> float:
    """`value` as a float; NaN where it is none, or too large to be summed or squared."""
    try:
        result = float(value)
        return result if not abs(result) > _LARGEST else math.nan
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _seen(spans: SpanTable) -> str:
    names, counts = np.unique(spans.name, return_counts=True)
    common = [spans.labels[names[i]][:40] for i in np.argsort(-counts)[:3]]
    service = str(spans.resources[int(spans.run[-1])].get(schema.SERVICE_NAME, "another program"))[:40]
    return f": a trace of {service!r}, with spans like {', '.join(map(repr, common))}"


def _one_row_a_step(spans: SpanTable, rows: Ints, notes: list[str]) -> Ints:
    """Rows by step number, the last given where several have one; steps without a number cannot be placed."""
    numbered = rows[spans.step[rows] >= 0]
    if len(numbered) < len(rows):
        notes.append(f"{len(rows) - len(numbered)} step spans without a step number")
    _, last = np.unique(spans.step[numbered][::-1], return_index=True)
    kept: Ints = numbered[::-1][last]
    if len(kept) < len(numbered):
        notes.append(f"{len(numbered) - len(kept)} steps given more than once (the last is used)")
    return kept


def _children(
    spans: SpanTable, run: int, rows: Ints, step: Ints, notes: list[str]
) -> tuple[tuple[Kind, ...], Floats, list[Pause], Floats]:
    """Kinds, seconds by step and kind, pauses, and the seconds of pauses that lie inside their step."""
    inside = np.zeros(len(step))
    child = np.flatnonzero((spans.run == run) & (spans.level >= PHASE))
    homeless = spans.step[child] == NO_STEP
    if homeless.any():
        notes.append(f"{int(homeless.sum())} spans without a parent or step number")
        child = child[~homeless]
    position = np.searchsorted(step, spans.step[child])
    known = (position < len(step)) & (step[np.minimum(position, len(step) - 1)] == spans.step[child])
    pause_names = [i for i, label in enumerate(spans.labels) if label in PAUSES]
    is_pause = np.isin(spans.name[child], pause_names)
    pauses = []
    for row, place, has_step in zip(child[is_pause], position[is_pause], known[is_pause], strict=True):
        seconds = float(spans.end[row] - spans.start[row]) / 1e9
        told = spans.attributes.get(int(row), {})
        written, loss = whole(told.get(schema.CHECKPOINT_BYTES), 0), number(told.get(schema.EVAL_LOSS))
        pauses.append(Pause(spans.label(row), int(spans.step[row]), seconds, written, loss))
        if has_step:
            inside[place] += _overlap(spans, row, rows[place])
    lost = int(np.sum(~known & ~is_pause))
    if lost:
        notes.append(f"{lost} spans whose step is not in the trace")
    keep = known & ~is_pause & _in_most_steps(spans, child, len(step))
    kinds, durations = _by_kind(spans, child[keep], position[keep], len(step), notes)
    return kinds, durations, pauses, inside


def _in_most_steps(spans: SpanTable, child: Ints, steps: int) -> npt.NDArray[np.bool_]:
    """Which spans may be held against those of other steps: no kernels where only some steps have them."""
    kernels = spans.level[child] == KERNEL
    sampled = len(np.unique(spans.step[child[kernels]])) < SAMPLED * steps
    return ~kernels if sampled else np.ones(len(child), dtype=bool)


def _overlap(spans: SpanTable, a: int, b: int) -> float:
    """Seconds that two spans share."""
    shared = min(spans.end[a], spans.end[b]) - max(spans.start[a], spans.start[b])
    return max(float(shared) / 1e9, 0.0)


def _by_kind(
    spans: SpanTable, child: Ints, position: Ints, steps: int, notes: list[str]
) -> tuple[tuple[Kind, ...], Floats]:
    if not len(child):
        return (), np.zeros((steps, 0))
    phase = _phase_of(spans, child)
    keys = np.stack([spans.level[child], spans.name[child], spans.shape[child], phase])
    keys[3, keys[0] != LAYER] = 0
    unique, inverse = np.unique(keys, axis=1, return_inverse=True)
    inverse = inverse.reshape(-1)
    seconds = (spans.end[child] - spans.start[child]) / 1e9
    if unique.shape[1] > MOST_KINDS:
        notes.append(f"{unique.shape[1] - MOST_KINDS} rarer kinds of span (the {MOST_KINDS} longest are used)")
        longest = np.sort(np.argsort(-np.bincount(inverse, weights=seconds))[:MOST_KINDS])
        new_index = np.full(unique.shape[1], -1)
        new_index[longest] = np.arange(len(longest))
        kept = new_index[inverse] >= 0
        unique, inverse = unique[:, longest], new_index[inverse][kept]
        seconds, position = seconds[kept], position[kept]
    width = unique.shape[1]
    durations = np.zeros(steps * width)
    np.add.at(durations, position * width + inverse, seconds)
    kinds = tuple(
        Kind(_LEVEL_NAMES[level], spans.labels[name], spans.labels[shape], spans.labels[phase_name])
        for level, name, shape, phase_name in unique.T.tolist()
    )
    return kinds, durations.reshape(steps, width)


def _phase_of(spans: SpanTable, child: Ints) -> Ints:
    """Label index of the phase above each span, 0 where there is none."""
    result = np.zeros(len(child), dtype=np.int64)
    ancestor = spans.parent[child]
    for _ in range(4):  # a phase is at most three levels above a span
        valid = ancestor >= 0
        found = valid & (spans.level[ancestor] == PHASE) & (result == 0)
        result[found] = spans.name[ancestor[found]]
        ancestor = np.where(valid, spans.parent[ancestor], -1)
    return result


def pause_seconds(pauses: Iterable[Pause], step: Ints, name: str) -> Floats:
    """Seconds of pauses by step; one between two recorded steps counts for the one before, one before all for none."""
    result = np.zeros(len(step))
    for pause in pauses:
        row = int(np.searchsorted(step, pause.step, side="right")) - 1
        if pause.name == name and row >= 0:
            result[row] += pause.seconds
    return result


def _facts(spans: SpanTable, run: int) -> dict[str, Any]:
    """What the run says of itself, from the resource and the `train` span."""
    facts = dict(spans.resources[run])
    for row, attributes in spans.attributes.items():
        if spans.run[row] == run and spans.label(row) == schema.TRAIN:
            facts.update(attributes)
    return facts
