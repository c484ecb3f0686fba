"""The graphs of a run, traced: the micro-batch, the update, evaluation and last-token logits.

They share weights by name. `RunShape` is what fixes their shapes; everything here is plain data, so that `plan` can
answer for a model without a GPU or its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from entrenar_gpu import ops
from entrenar_gpu.adapters import LoraModule
from entrenar_gpu.compiler import (
    FittedPlan,
    MemoryBudgetError,
    PlanOptions,
    autodiff,
    fit,
    parameter_pages,
    weight_copies,
)
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.dtypes import ELEMENT_BYTES
from entrenar_gpu.errors import UserError
from entrenar_gpu.graph import Caps, Graph
from entrenar_gpu.model import ModelConfig, Storage, Transformer
from entrenar_gpu.ops.gemm.tiles import Arithmetic, TileTable, arithmetic_on
from entrenar_gpu.ops.optimizer import FIRST_SCALE, OPTIMIZERS, STATE

STATE_NAME, LOSS_NAME, EVAL_LOSS_NAME = "optimizer_state", "loss", "eval_loss"
LOSS_SCALE_NAME = "loss_scale"
FASTER = "_b"  # the group of parameters that --lr-ratio-b is about
MARGIN = 0.9  # of a GPU's memory; the rest is the display's and the driver's


@dataclass(frozen=True)
class RunShape:
    """Everything that the graphs of a run depend on, the optimizer's constants included."""

    model: ModelConfig
    storage: Storage
    train: TrainConfig

    def __post_init__(self) -> None:
        if self.train.seq > self.model.longest_row:
            raise UserError(f"--seq: {self.train.seq} exceeds the model's {self.model.longest_row} positions")
        if self.train.lr_ratio_b is not None and not self.faster_parameters:
            raise UserError(f"--lr-ratio-b: --method {self.train.method} trains no adapter that has a B")

    def precision(self, caps: Caps) -> Arithmetic:
        """The arithmetic of matmuls with NF4 weights on such a device. Raises UserError where it is not to be had."""
        asked = self.train.precision
        if asked == "auto":
            return "f16" if caps.f16 and not caps.software else "f32"
        if asked == "f16" and not caps.f16:
            raise UserError(f"--precision: {caps.name} has no f16 arithmetic; int8 and f32 run everywhere")
        return arithmetic_on(asked, caps)

    def first_loss_scale(self, caps: Caps) -> float:
        return 1.0 if self.precision(caps) == "f32" else FIRST_SCALE

    def plan_options(self, caps: Caps, budget_bytes: int | None, tiles: TileTable | None = None) -> PlanOptions:
        """How such a run is planned for a device. Raises UserError where that lacks the precision asked for."""
        # Where matmuls round their operands, so may what waits for them; f32 means f32.
        fp16 = self.precision(caps) != "f32"
        return PlanOptions(budget_bytes, fp16, self.train.trace_level, tiles or {})

    @property
    def dropout(self) -> float:
        return self.train.dropout if self.storage.method != "full" else 0.0

    @property
    def faster_parameters(self) -> frozenset[str]:
        """What --lr-ratio-b makes faster (LoRA+, Hayou et al., arXiv 2402.12354): the B of every adapter, but for the
        embedding's, which PEFT's LoRA+ leaves out too."""
        made = (*self.storage.adapters.values(), self.storage.head_adapter)
        return frozenset(module.b_name for module in made if isinstance(module, LoraModule))


Trace = Callable[[RunShape, Caps], Mapping[str, Graph]]  # what makes the graphs that a session runs
Fit = Callable[[Trace, RunShape, Caps, PlanOptions], FittedPlan]  # what plans them


def micro_graph(shape: RunShape, caps: Caps, weighted: bool = False) -> Graph:
    """Forward and backward of one micro-batch: gradients and the loss are added to what is there.

    With `weighted` tokens the batch has their weights, and inv_tokens is 1 / the sum of a step's.
    """
    graph = Graph("micro", traced=True, repeats=shape.train.accumulate)
    model = _transformer(graph, shape, caps, shape.dropout, noisy=bool(shape.train.neftune))
    inverse = graph.tensor("inv_tokens", (1,))
    loss = ops.mul(model.loss_sum(shape.train.label_smoothing, weighted), inverse)
    total = graph.tensor(LOSS_NAME, (1,), role="state")
    ops.in_place(ops.add(total, loss), total)
    parameters = [t for t in graph.persistents.values() if t.role == "param"]
    for parameter in parameters if shape.train.lr_ratio_b is not None else ():
        if parameter.name in shape.faster_parameters and parameter.grad is not None:
            parameter.group = parameter.grad.group = FASTER
    autodiff.backward(loss, parameters, upstream=graph.tensor(LOSS_SCALE_NAME, (1,), role="state"))
    return graph


def evaluate_graph(shape: RunShape, caps: Caps, weighted: bool = False) -> Graph:
    """Sum of the losses of one batch, added to `eval_loss`; without dropout, smoothing or gradients."""
    graph = Graph("evaluate", report=EVAL_LOSS_NAME, differentiable=False)
    loss = _transformer(graph, shape, caps).loss_sum(weighted=weighted)
    total = graph.tensor(EVAL_LOSS_NAME, (1,), role="state")
    ops.in_place(ops.add(total, loss), total)
    return graph


def logits_graph(shape: RunShape, caps: Caps) -> Graph:
    """Logits [1, V] of one token, left in `logits`."""
    graph = Graph("logits", differentiable=False)
    ops.keep(_transformer(graph, shape, caps).last_logits(), "logits")
    return graph


def update_graph(shape: RunShape, micro: Graph, caps: Caps) -> Graph:
    """The optimizer step over the pages of the parameters of `micro`."""
    graph, c = Graph("update", report=STATE_NAME, traced=True), shape.train
    parameters = [t for t in micro.persistents.values() if t.role == "param"]
    optimizer = OPTIMIZERS[c.optimizer]
    pages = parameter_pages(graph, parameters, optimizer.moments)
    state = graph.tensor(STATE_NAME, (STATE,), role="state")
    loss = graph.tensor(LOSS_NAME, (1,), role="state")
    lr = graph.tensor("lr", (1,))
    with graph.within("clip", phase="optimizer"):
        partials = [ops.sum_of_squares(page.grad) for page in pages]
        scale = graph.tensor(LOSS_SCALE_NAME, (1,), role="state")
        # Gradients that pass through low precision are scaled, and the scale adapts; f32 needs none.
        low_precision = shape.precision(caps) != "f32"
        state = ops.decide(state, loss, scale, partials, c.clip, (c.beta1, c.beta2), adapts=low_precision)
    with graph.within("step", phase="optimizer"):
        faster = ops.scale(lr, c.lr_ratio_b) if c.lr_ratio_b is not None else lr
        for page in pages:
            rate = faster if page.group == FASTER else lr
            decay = c.weight_decay if page.decays or shape.storage.method != "full" else 0.0
            optimizer.step(page.param, page.grad, page.moments, state, rate, decay, c)
    return graph


def _transformer(graph: Graph, shape: RunShape, caps: Caps, dropout: float = 0.0, noisy: bool = False) -> Transformer:
    train = shape.train
    precision = shape.precision(caps)
    return Transformer(graph, shape.model, shape.storage, caps, train.batch, train.seq, dropout, precision, noisy=noisy)


class Beside(Protocol):
    """What a run does between its steps, with graphs of its own over the run's weights."""

    def graphs(self, shape: RunShape, caps: Caps) -> Mapping[str, Graph]: ...


def training_graphs(
    shape: RunShape, caps: Caps, evaluates: bool, beside: Beside | None = None, weighted: bool = False
) -> dict[str, Graph]:
    """The graphs of a training run: micro, update, where there is data to evaluate on evaluate, and what is beside."""
    micro = micro_graph(shape, caps, weighted)
    graphs = {"micro": micro, "update": update_graph(shape, micro, caps)}
    if evaluates:
        graphs["evaluate"] = evaluate_graph(shape, caps, weighted)
    return {**graphs, **(beside.graphs(shape, caps) if beside is not None else {})}


def fit_run(trace: Trace, shape: RunShape, caps: Caps, options: PlanOptions) -> FittedPlan:
    """`memory.fit` for the graphs of a run, with copies of its weights where there is room for them.

    Says which batch would fit where this one does not.
    """
    try:
        return _fit(trace, shape, caps, options)
    except UserError as error:  # over the budget, or a tensor larger than the device binds
        fits = _largest_batch(trace, shape, caps, options)
        advice = f"--batch {fits} fits" if fits else "no --batch fits: lower --seq or --rank, or raise --memory-budget"
        raise UserError(f"--batch {shape.train.batch} at --seq {shape.train.seq}: {error}; {advice}") from error


def _fit(trace: Trace, shape: RunShape, caps: Caps, options: PlanOptions) -> FittedPlan:
    tokens = shape.train.batch * shape.train.seq
    if tokens * ELEMENT_BYTES["u32"] > caps.max_binding_bytes:  # before anything is as long as that on the host
        raise UserError(f"{tokens} tokens are more than {caps.name} binds at once")
    graphs, budget = trace(shape, caps), options.budget_bytes or 0
    try:
        fitted = fit(graphs, caps, _less(options, weight_copies.largest_bytes(graphs)))
    except MemoryBudgetError:
        fitted = fit(graphs, caps, options)
    fill = budget if shape.train.memory_budget is not None else _unused(caps)
    return weight_copies.keep_copies(fitted, budget, fill)


def _less(options: PlanOptions, nbytes: int) -> PlanOptions:
    """The same with so much taken off the budget."""
    return options if options.budget_bytes is None else replace(options, budget_bytes=options.budget_bytes - nbytes)


def _unused(caps: Caps) -> int:
    """Memory that may be filled where nobody spoke of any: a card's own that is free, less the margin."""
    return int((caps.free_bytes or 0) * MARGIN)


def _largest_batch(trace: Trace, shape: RunShape, caps: Caps, options: PlanOptions) -> int:
    low, high = 0, shape.train.batch - 1
    while low < high:
        middle = (low + high + 1) // 2
        smaller = replace(shape, train=replace(shape.train, batch=middle))
        try:
            _fit(trace, smaller, caps, options)
            low = middle
        except UserError:
            high = middle - 1
    return low
