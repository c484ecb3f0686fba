"""What is kept for the backward pass: as much as the budget allows, the cheapest first, and never a byte too many."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.adapters.spec import AdapterSpec
from entrenar_gpu.compiler.autodiff import backward
from entrenar_gpu.compiler.cost import seconds
from entrenar_gpu.compiler.memory import Ladder, Layer, MemoryBudgetError, fit, layers_of
from entrenar_gpu.compiler.plan import PlanOptions, make_plan
from entrenar_gpu.compiler.recompute import rewrite
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.graph.caps import Caps
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.parameters import Storage
from entrenar_gpu.model.registry import model_shape, parse_model_config
from entrenar_gpu.session.graphs import RunShape, training_graphs
from entrenar_gpu.session.plan_report import PROFILES
from tests import ROOT
from tests.helpers.runs import fit_for
from tests.helpers.tiny import QWEN3

LAYERS = 6
SMALL = parse_model_config(QWEN3 | {"num_hidden_layers": LAYERS, "vocab_size": 512})


def run_shape(model: ModelConfig = SMALL, **options) -> RunShape:
    config = TrainConfig(**({"batch": 4, "seq": 64, "rank": 4} | options))
    adapters = {} if config.method == "full" else AdapterSpec.from_config(config, model).modules
    return RunShape(model, Storage(config.method, adapters=adapters), config)


def peaks_of(graphs: dict[str, Graph], fp16: bool) -> list[int]:
    """Peak bytes after each step of the ladder."""
    ladder = Ladder(graphs["micro"], Caps(), fp16)
    found = []
    for steps in range(len(ladder) + 1):
        rewritten = {name: rewrite(graph, ladder.choice(steps)) for name, graph in graphs.items()}
        found.append(make_plan(rewritten, Caps(), launches=False).peak_bytes)
    return found


@pytest.mark.parametrize(("method", "precision"), [("qlora", "f32"), ("qlora", "int8"), ("full", "f32")])
def test_each_step_costs_more_time_and_takes_less_memory(method, precision):
    graphs = training_graphs(run_shape(method=method, precision=precision), Caps(), evaluates=False)
    fp16 = precision != "f32"
    peaks, ladder = peaks_of(graphs, fp16), Ladder(graphs["micro"], Caps(), fp16)
    shares = [ladder.choice(steps).share for steps in range(len(peaks))]
    assert shares[0] == 0
    assert all(before < after for before, after in pairwise(shares))
    # Up to what the packing of buffers gains or loses by chance.
    assert all(after < 1.02 * before for before, after in pairwise(peaks))
    assert min(peaks) < 0.75 * peaks[0]
    counts = ladder.choice(len(peaks) - 1).counts("fp16")
    assert bool(counts) == fp16


def test_no_more_steps_are_taken_than_the_budget_asks_for():
    graphs = training_graphs(run_shape(precision="int8"), Caps(), evaluates=False)
    peaks, ladder = peaks_of(graphs, True), Ladder(graphs["micro"], Caps(), True)
    chosen = set()
    for budget in np.linspace(peaks[-1], max(peaks), 9).astype(int):
        fitted = fit(graphs, Caps(), PlanOptions(int(budget), fp16=True))
        choice, plan, rewritten = fitted.recompute, fitted.plan, fitted.graphs
        steps = next(n for n in range(len(peaks)) if ladder.choice(n) == choice)
        assert plan.peak_bytes == peaks[steps] <= budget
        assert steps == 0 or peaks[steps - 1] > budget
        assert any(node.op == "to_half" for node in rewritten["micro"].nodes) == bool(choice.counts("fp16"))
        chosen.add(steps)
    assert len(chosen) > 6


def layer_of_choices() -> Layer:
    """A layer in which a tensor may be kept, halved or made again from others that may be, too."""
    graph = Graph("g")
    x, norm = graph.tensor("x", (4096, 512)), graph.tensor("norm", (512,), role="weight")
    weights = [graph.parameter(f"w{i}", (512, 512)) for i in range(4)]
    with graph.within(layer=0):
        a = ops.matmul(x, weights[0])
        b = ops.swish(a)
        # Of the norm the backward pass reads the statistics alone: what is scaled, it does not.
        c = ops.scale(ops.rms_norm(ops.matmul(b, weights[1]), norm, 1e-6), 0.5)
        d = ops.matmul(ops.mul(b, c), weights[2])
    with graph.within(layer=1):
        loss = ops.sum(ops.swish(ops.matmul(d, weights[3])))
    backward(loss, weights)
    return layers_of(graph)[1]


def test_the_states_of_a_layer_are_the_best_of_all():
    """Every combination of fates is tried: none takes less time at the bytes of a state, or on the line to the next."""
    layer, caps = layer_of_choices(), Caps()
    states, costs = layer.states(caps, fp16=True), [seconds(n, caps) for n in layer.nodes]
    moves = [("keep", "fp16", "recompute")] * (len(layer.nodes) - 1) + [("keep", "fp16")]
    every = [layer.state(dict(enumerate(fates)), costs) for fates in product(*moves)]
    assert len(states) > 4

    def least(nbytes: int) -> float:
        before, after = next((a, b) for a, b in pairwise(states) if b.nbytes <= nbytes <= a.nbytes)
        part = (before.nbytes - nbytes) / (before.nbytes - after.nbytes)
        return before.seconds + part * (after.seconds - before.seconds)

    assert states[-1].nbytes == min(s.nbytes for s in every)
    for state in every:
        assert state.nbytes > states[0].nbytes or state.seconds >= least(state.nbytes) - 1e-12, state
    prices = [(b.seconds - a.seconds) / (a.nbytes - b.nbytes) for a, b in pairwise(states)]
    assert prices == sorted(prices)


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_only_runs_that_round_anyway_keep_activations_in_half_precision(precision):
    shape = run_shape(precision=precision)
    with pytest.raises(MemoryBudgetError) as error:
        fit(training_graphs(shape, Caps(), False), Caps(), PlanOptions(1 << 16, fp16=precision != "f32"))
    fitted = fit_for(shape, Caps(), error.value.needed)
    choice, graphs = fitted.recompute, fitted.graphs
    assert bool(choice.counts("fp16")) == (precision != "f32")
    assert any(n.op == "to_half" for n in graphs["micro"].nodes) == (precision != "f32")


def test_what_is_kept_whole_is_not_refused_because_recomputation_would_take_more():
    """By chance of packing: with one layer and no other adapter, what is computed again takes more than it saves."""
    model = parse_model_config(QWEN3 | {"num_hidden_layers": 1, "hidden_size": 512, "intermediate_size": 52})
    graphs = training_graphs(run_shape(model, seq=16, batch=3, rank=16, target="down", method="lora"), Caps(), False)
    peaks = peaks_of(graphs, fp16=False)
    assert peaks[0] < peaks[-1]
    assert fit(graphs, Caps(), PlanOptions(peaks[0])).recompute.fates == {}


def test_the_smallest_plan_is_sought_before_the_last_step_too():
    model = parse_model_config(QWEN3 | {"num_hidden_layers": 1, "intermediate_size": 1024, "num_attention_heads": 8})
    graphs = training_graphs(run_shape(model, seq=257, batch=3, rank=16, method="lora"), Caps(), False)
    peaks = peaks_of(graphs, fp16=False)
    assert min(peaks) < min(peaks[0], peaks[-1])
    assert fit(graphs, Caps(), PlanOptions(min(peaks))).plan.peak_bytes == min(peaks)
    with pytest.raises(MemoryBudgetError) as error:
        fit(graphs, Caps(), PlanOptions(min(peaks) - 1))
    assert error.value.needed == min(peaks)


def test_a_budget_of_what_a_refusal_names_is_enough():
    for needed in (3 << 30, (3 << 30) + 1, int(3.301 * 2**30), int(3.309 * 2**30)):
        words = str(MemoryBudgetError(needed, needed - 1)).split()
        assert float(words[1]) * 2**30 >= needed
        assert float(words[7]) * 2**30 < needed


def test_what_cannot_fit_is_refused_with_the_largest_batch_that_does():
    graphs = training_graphs(run_shape(batch=3), Caps(), evaluates=True)
    with pytest.raises(MemoryBudgetError) as error:
        fit(graphs, Caps(), PlanOptions(1 << 16))
    smallest = error.value.needed
    with pytest.raises(UserError, match=r"--batch 8 at --seq 64: needs .* GiB, over the budget .*; --batch 3 fits"):
        fit_for(run_shape(batch=8), Caps(), smallest, evaluates=True)
    assert fit_for(run_shape(batch=3), Caps(), smallest, evaluates=True).plan.peak_bytes <= smallest
    with pytest.raises(UserError, match="no --batch fits: lower --seq or --rank"):
        fit_for(run_shape(batch=8), Caps(), 1 << 16, evaluates=True)


def test_what_no_binding_holds_is_refused_with_the_largest_batch_that_does():
    """A device without memory to tell of, but with small bindings: a row of swiglu takes 64 x 160 x 4 bytes."""
    caps = replace(Caps(), max_binding_bytes=5 * 64 * 160 * 4)
    with pytest.raises(UserError, match=r"--batch 9 at --seq 64: .* binds at most .*; --batch 5 fits"):
        fit_for(run_shape(batch=9), caps, 1 << 40)


def test_what_no_batch_mends_is_refused_without_advice_on_it():
    with pytest.raises(UserError, match=r"^--precision: webgpu has no f16 arithmetic; int8 and f32 run everywhere$"):
        fit_for(run_shape(precision="f16"), Caps(), 1 << 40)


def test_more_tokens_than_a_binding_holds_are_refused_before_they_are_planned():
    """A plan of 2^40 tokens, which takes minutes, must not be begun."""
    shape = run_shape(replace(SMALL, max_positions=1 << 20), batch=1 << 20, seq=1 << 20)
    with pytest.raises(UserError, match="1099511627776 tokens are more than webgpu binds at once; no --batch fits"):
        fit_for(shape, Caps(), 1 << 40)


# Rank 16 on all projections, int8: what each is to fit beside what it may take on a card of 16 GiB.
ROWS = [(1, 512, 3.6), (4, 512, 4.5), (4, 2048, 7.0), (1, 512, 16.0), (4, 512, 16.0), (4, 2048, 16.0)]


@pytest.mark.parametrize(("batch", "seq", "gib"), ROWS)
def test_qwen3_4b_within_budgets(batch, seq, gib):
    """Fits, and what is left of the budget is less than any single step back would take: it is used, as docs/memory.md
    has it."""
    options = {"batch": batch, "seq": seq, "rank": 16, "precision": "int8", "memory_budget": gib}
    shape = run_shape(model_shape("qwen3-4b"), **options)
    fitted = fit_for(shape, PROFILES["desktop"], int(gib * 2**30))
    choice, plan = fitted.recompute, fitted.plan
    assert plan.peak_bytes <= gib * 2**30
    assert plan.peak_bytes > 0.97 * gib * 2**30 or not choice.fates
    assert choice.share < 0.35
    page = (ROOT / "docs" / "memory.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| {batch} × {seq} | {gib:g} |"))
    assert row.split("|")[3].split(",")[0].strip() == f"{plan.peak_bytes / 2**30:.2f}"
    assert row.split("|")[-2].strip() in (f"{choice.share:.0%}", f"{choice.share:.1%}", f"{choice.share:g}")
