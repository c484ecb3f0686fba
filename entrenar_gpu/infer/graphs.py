"""The graphs of a decoder: passes over a few tokens or a chunk of a prompt, and the head of what the latter leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from entrenar_gpu import ops
from entrenar_gpu.adapters import AdapterSpec
from entrenar_gpu.compiler import FittedPlan, Plan, PlanOptions, Recompute, make_plan
from entrenar_gpu.errors import UserError
from entrenar_gpu.graph import Caps, Graph
from entrenar_gpu.model import Transformer
from entrenar_gpu.train import RunShape, Trace

HEAD_ROWS = 16  # tokens whose logits one pass makes at most
HIDDEN, LOGITS, LOGITS_AT = "hidden", "logits", "logits_at"


@dataclass(frozen=True)
class CacheShape:
    """`chunk`: how many tokens of a prompt a pass takes at most. `dtype`: of the cache, "f16" or "f32".

    How many sequences it has, and of how many tokens, are the batch and seq of the run's shape.
    """

    chunk: int
    dtype: str = "f32"

    @property
    def sizes(self) -> list[int]:
        """Tokens that there are graphs for: a few, and a chunk."""
        few = [1 << i for i in range(HEAD_ROWS.bit_length()) if 1 << i < self.chunk]
        return [*few, self.chunk]


def pass_name(tokens: int, adapter: str | None) -> str:
    """The graph of a pass over so many tokens, with an adapter or without."""
    return f"pass.{tokens}" if adapter is None else f"pass.{tokens}.{adapter}"


def adapter_prefix(adapter: str) -> str:
    """What the names of an adapter's tensors begin with."""
    return f"adapter.{adapter}."


def decoder_graphs(
    cache: CacheShape, adapters: Mapping[str, AdapterSpec], shape: RunShape, caps: Caps
) -> dict[str, Graph]:
    """Graphs by number of tokens and adapter, which make the logits of all tokens if these are few.

    Of a chunk they leave the hidden states, and "head" makes the logits of HEAD_ROWS of these.
    """
    graphs = _passes(cache, None, shape, caps)
    for name, spec in adapters.items():
        storage = replace(shape.storage, adapters=spec.modules, adapter_prefix=adapter_prefix(name))
        graphs |= _passes(cache, name, replace(shape, storage=storage), caps)
    return graphs


def _passes(cache: CacheShape, adapter: str | None, shape: RunShape, caps: Caps) -> dict[str, Graph]:
    graphs = {}
    for tokens in cache.sizes:
        graph = Graph(pass_name(tokens, adapter), differentiable=False)
        model = _model(graph, cache, shape, caps, tokens)
        hidden = model.hidden()
        if tokens <= HEAD_ROWS:
            graph.report = f"{LOGITS}.{tokens}"
            ops.keep(model.logits(hidden), graph.report)
        else:
            ops.keep(hidden, HIDDEN)
            if adapter is None:
                graphs["head"] = _head(cache, shape, caps, tokens)
        graphs[graph.name] = graph
    return graphs


def _head(cache: CacheShape, shape: RunShape, caps: Caps, tokens: int) -> Graph:
    graph = Graph("head", report=LOGITS, differentiable=False)
    model = _model(graph, cache, shape, caps, tokens)
    hidden = graph.tensor(HIDDEN, (tokens, shape.model.hidden_size), role="state")
    at = graph.tensor(LOGITS_AT, (HEAD_ROWS,), "u32")
    ops.keep(model.logits(ops.embedding(at, [hidden])), LOGITS)
    return graph


def _model(graph: Graph, cache: CacheShape, shape: RunShape, caps: Caps, tokens: int) -> Transformer:
    train = shape.train
    sizes = (train.batch, train.seq)
    return Transformer(
        graph,
        shape.model,
        shape.storage,
        caps,
        *sizes,
        precision="f32",
        cached=tokens,
        cache_dtype=cache.dtype,
        by_rows=True,
    )


def fit_decoder(trace: Trace, shape: RunShape, caps: Caps, options: PlanOptions) -> FittedPlan:
    """The plan of a decoder. Raises UserError where its context does not fit, naming the longest that does."""

    def plan_of(context: int, launches: bool) -> tuple[Plan, Mapping[str, Graph]]:
        graphs = trace(replace(shape, train=replace(shape.train, seq=context)), caps)
        return make_plan(graphs, caps, options, launches), graphs

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


def _longest(above: int, fits: Callable[[int], bool]) -> int:
    """The longest context below `above` that fits; 0 where none does."""
    low, high = 0, above - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
