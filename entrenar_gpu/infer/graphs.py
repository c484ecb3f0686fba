"""The graphs of a decoder: passes over a few tokens or over a piece of a prompt, and the head of what the latter leave.

Two families of products make them. A few tokens take the one that reads each weight as it is stored
(`ops/gemm/gemv.py`). Prompts take that of training where it has f16 or int8 arithmetic, with the blocking of the
longest piece for shorter ones too; else the same as a few tokens do. In both a row is summed in one order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from entrenar_gpu import ops
from entrenar_gpu.adapters import AdapterSpec, adapted
from entrenar_gpu.compiler import FittedPlan, Plan, PlanOptions, Recompute, fuse_rows, make_plan
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.graph import Caps, Graph, Target, Tensor
from entrenar_gpu.model import CachedPass, Transformer
from entrenar_gpu.ops.gemm.launches import layout_of
from entrenar_gpu.ops.gemm.linear import product_sizes
from entrenar_gpu.ops.gemm.matmul import is_low_rank, matmul_sizes
from entrenar_gpu.ops.gemm.tiles import Arithmetic, TileTable, choose, key, to_numbers
from entrenar_gpu.session import PlanReport, RunShape, Trace, plan_graphs

CHUNK = 512  # tokens of a prompt's longest piece
HEAD_ROWS = 16  # tokens of a pass over a few, and whose logits one pass makes at most
SHORTEST = 32  # tokens of a prompt's shortest piece


@dataclass(frozen=True)
class Pass:
    """A graph over so many tokens: of a prompt, in the run's arithmetic, or any, by rows."""

    tokens: int
    prompt: bool = False

    def name(self, adapter: str | None) -> str:
        return f"{'prompt' if self.prompt else 'pass'}.{self.tokens}" + ("" if adapter is None else f".{adapter}")

    def input(self, name: str) -> str:
        """The tensor that holds `input_ids`, `positions` or `slots`."""
        return f"{name}.{self.tokens}"

    @property
    def has_head(self) -> bool:
        """Whether a graph of its own makes the logits; else the pass itself makes those of all its tokens."""
        return self.tokens > HEAD_ROWS

    def head(self, adapter: str | None) -> str:
        """That graph, which differs by adapter where that changes the head."""
        return f"head.{self.tokens}" + ("" if adapter is None else f".{adapter}")

    @property
    def logits(self) -> str:
        """The logits of the last run, and the graph that does nothing but bring them to the host."""
        return f"logits.{self.tokens}"

    @property
    def likeliest(self) -> str:
        """Where the logits are largest, u32 [T], which is what a run brings to the host: in place of the tokens that it
        read, so that the next run can go on from them, and beside those of a prompt."""
        return f"likeliest.{self.tokens}" if self.has_head else self.input("input_ids")

    @property
    def logits_at(self) -> str:
        """Which tokens the head makes logits of, u32 [HEAD_ROWS]."""
        return f"logits_at.{self.tokens}"

    @property
    def hidden(self) -> str:
        """What the head reads, f32 [T, D]."""
        return f"hidden.{self.tokens}"


@dataclass(frozen=True)
class Passes:
    """The passes that a decoder has: over a few tokens, and over pieces of prompts of at most `chunk`."""

    few: tuple[Pass, ...]
    prompt: tuple[Pass, ...]

    @classmethod
    def of(cls, chunk: int, precision: Arithmetic) -> Passes:
        few = [Pass(1 << i) for i in range(HEAD_ROWS.bit_length()) if 1 << i < chunk or i == 0]
        longer = [chunk]
        while longer[0] // 4 >= SHORTEST:
            longer.insert(0, longer[0] // 4)
        if precision != "f32" and chunk >= SHORTEST:
            return cls((*few,), tuple(Pass(tokens, prompt=True) for tokens in longer))
        every = (*few, *(Pass(tokens) for tokens in longer if tokens > few[-1].tokens))
        return cls(every, every)


def adapter_prefix(adapter: str) -> str:
    """What the names of an adapter's tensors begin with."""
    return f"adapter.{adapter}."


def decoder_graphs(chunk: int, adapters: Mapping[str, AdapterSpec], shape: RunShape, caps: Caps) -> dict[str, Graph]:
    """The graphs of all passes, without an adapter and with each, and their heads."""
    graphs: dict[str, Graph] = {}
    passes = Passes.of(chunk, shape.precision(caps))
    for made in dict.fromkeys((*passes.few, *passes.prompt)):
        graphs |= _with_head(made, None, shape, caps)
        for name, spec in adapters.items():
            storage = adapted(shape.storage, spec, adapter_prefix(name))
            graphs |= _with_head(made, name, replace(shape, storage=storage), caps, spec.changes_head(shape.model))
    return graphs


def _with_head(made: Pass, adapter: str | None, shape: RunShape, caps: Caps, own_head: bool = True) -> dict[str, Graph]:
    """A pass, the graph that brings its logits and, where it has one, its head; without `own_head` that of the base
    does."""
    graph = _pass(made, adapter, shape, caps)
    logits = Graph(made.logits, report=made.logits, differentiable=False)
    logits.tensor(made.logits, (min(made.tokens, HEAD_ROWS), shape.model.vocab_size), role="state")
    if not made.has_head or not own_head:
        return {graph.name: graph, logits.name: logits}
    head = Graph(made.head(adapter), report=made.likeliest, differentiable=False)
    model = _model(head, made, shape, caps)
    hidden = head.tensor(made.hidden, (made.tokens, shape.model.hidden_size), role="state")
    at = head.tensor(made.logits_at, (HEAD_ROWS,), "u32")
    found = ops.keep(model.logits(ops.embedding(at, [hidden])), made.logits)
    ops.keep(_likeliest(head, found), made.likeliest)
    return {graph.name: graph, head.name: head, logits.name: logits}


def _pass(made: Pass, adapter: str | None, shape: RunShape, caps: Caps) -> Graph:
    graph = Graph(made.name(adapter), differentiable=False)
    model = _model(graph, made, shape, caps)
    hidden = model.hidden()
    if made.has_head:
        ops.keep(hidden, made.hidden)
    else:
        graph.report = made.likeliest
        ops.in_place(_likeliest(graph, ops.keep(model.logits(hidden), made.logits)), graph.persistents[made.likeliest])
    fuse_rows(graph, caps)
    return graph


def _likeliest(graph: Graph, logits: Tensor) -> Tensor:
    with graph.within("lm_head"):
        return ops.argmax(logits)


def _model(graph: Graph, made: Pass, shape: RunShape, caps: Caps) -> Transformer:
    precision, sizes = shape.precision(caps), (shape.train.batch, shape.train.seq)
    cached = CachedPass(made.tokens, "f16" if precision != "f32" and caps.f16 else "f32", by_rows=not made.prompt)
    return Transformer(graph, shape.model, shape.storage, caps, *sizes, precision=precision, cached=cached)


def fit_decoder(trace: Trace, shape: RunShape, caps: Caps, options: PlanOptions) -> FittedPlan:
    """The plan of a decoder. Raises UserError where its context does not fit, naming the longest that does."""

    def plan_of(context: int, launches: bool) -> tuple[Plan, Mapping[str, Graph]]:
        graphs = trace(replace(shape, train=replace(shape.train, seq=context)), caps)
        tiles = pinned_tiles(graphs.values(), caps, options.tiles)
        return make_plan(graphs, caps, replace(options, tiles=tiles), launches), graphs

    def why_not(context: int) -> str | None:
        try:
            plan, _ = plan_of(context, launches=False)
        except UserError as error:
            return str(error)
        budget = options.budget_bytes
        if budget is None or plan.peak_bytes <= budget:
            return None
        return f"needs {plan.peak_bytes / 2**30:.2f} GiB, over the budget of {budget / 2**30:.2f} GiB"

    context = shape.train.seq
    if (reason := why_not(context)) is not None:
        longest = _longest(context, lambda tokens: why_not(tokens) is None)
        advice = f"--context {longest} fits" if longest else "no context fits: raise --memory-budget"
        raise UserError(f"--context {context}: {reason}; {advice}")
    plan, graphs = plan_of(context, launches=True)
    return FittedPlan(plan, graphs, Recompute({}, 0.0))


def plan_decoder(config: TrainConfig, caps: Caps, budget_bytes: int, context: int, chunk: int = CHUNK) -> PlanReport:
    """What a decoder of `config.batch` slots of `context` tokens would allocate, without adapters, weights or a GPU."""
    config = replace(config, seq=context)
    trace = functools.partial(decoder_graphs, min(chunk, context), {})
    return plan_graphs(config, caps, budget_bytes, trace, fit_decoder, with_adapter=False)


def _longest(above: int, fits: Callable[[int], bool]) -> int:
    """The longest context below `above` that fits; 0 where none does."""
    low, high = 0, above - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def pinned_tiles(graphs: Iterable[Graph], caps: Caps, tiles: TileTable) -> TileTable:
    """`tiles`, and for every product those of the same one with the most rows.

    Blocking follows from the number of rows, and the order in which a row is summed from the blocking.
    """
    found: dict[tuple[Arithmetic, str, int, int], set[int]] = {}
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "linear":
                m, n, k, _ = product_sizes(node)
                found.setdefault((node.attrs["arithmetic"], "nt", n, k), set()).add(m)
            elif node.op == "matmul" and not is_low_rank(node):
                m, n, k, _ = matmul_sizes(node)
                layout = layout_of(node.attrs["transpose_a"], node.attrs["transpose_b"])
                found.setdefault(("f32", layout, n, k), set()).add(m)
    target, pinned = Target.of(caps, tiles), dict(tiles)
    for (arithmetic, layout, n, k), rows in found.items():
        choice = choose(arithmetic, max(rows), n, k, layout, target)
        pinned |= {key(arithmetic, m, n, k, layout): to_numbers(choice) for m in rows}
    return pinned
