"""Narrow copies of weights that stay on the device: as many as memory is left for, and the same bits without."""

from __future__ import annotations

from dataclasses import replace

import pytest

from entrenar_gpu import ops
from entrenar_gpu.adapters.spec import AdapterSpec
from entrenar_gpu.compiler import weight_copies
from entrenar_gpu.compiler.memory import FittedPlan
from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.compiler.recompute import Recompute
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.graph.caps import Caps, MatrixConfig
from entrenar_gpu.graph.tensor import Graph, Node, Tensor
from entrenar_gpu.model.parameters import Storage
from entrenar_gpu.model.registry import parse_model_config
from entrenar_gpu.ops.gemm.low_precision import low_precision_weight
from entrenar_gpu.session.graphs import RunShape
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.cases import CASES, Case
from tests.helpers.equivalence import needs
from tests.helpers.runs import config_of, fit_for
from tests.helpers.tiny import QWEN3, make_data, make_model
from tests.ops.test_kernels import check_on

# Every projection a multiple of 64 both ways, as low-precision matmuls want.
WIDE = {"intermediate_size": 192, "head_dim": 32}
MODEL = parse_model_config(QWEN3 | WIDE)
CARD = Caps("card", f16=True, max_binding_bytes=1 << 30, flops_per_second=2e12, free_bytes=1 << 40)
TURNED = 2 * 7 - 3  # two layers' projections; nobody wants the gradient of what the first three read
COPIES = 2 * 7 + TURNED


def fitted(caps: Caps, budget_bytes: int, precision: str = "int8", **options):
    config = TrainConfig(batch=2, seq=32, rank=4, precision=precision, **options)
    storage = Storage("qlora", adapters=AdapterSpec.from_config(config, MODEL).modules)
    return fit_for(RunShape(MODEL, storage, config), caps, budget_bytes, True)


def copies_of(plan) -> list[str]:
    return [name for name in plan.buffers if name.endswith(weight_copies.PARTS) and "scales" not in name]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("arithmetic", "panels"), [("f16", False), ("f16", True), ("int8", False)])
def test_a_copy_is_what_a_product_would_make(arithmetic, panels, transposed, device, kernels):
    """Codes, scales and halves bit for bit: the products that read them are compared elsewhere."""
    needs(device, arithmetic)
    quantised = CASES["nf4_dequantize_transposed-transposed"]

    def apply(*parts: Tensor) -> Tensor:
        made = low_precision_weight(ops.Nf4Tensors((128, 64), parts, "bfloat16"), arithmetic, transposed, panels)
        return made[index]

    for index in range(2 if arithmetic == "int8" else 1):
        check_on(
            Case(f"narrow-{arithmetic}-{panels}-{transposed}-{index}", quantised.inputs[1:], apply), device, kernels
        )


@pytest.mark.parametrize("precision", ["f16", "int8"])
def test_copies_change_no_bit_of_a_run(precision, tmp_path, kernels, monkeypatch):
    needs(kernels.device, precision)
    monkeypatch.setattr(kernels.device, "caps", replace(kernels.device.caps, free_bytes=None))
    make_model(tmp_path / "model", **WIDE)
    make_data(tmp_path / "train.jsonl")
    runs = []
    for budget in (None, 1.0):  # memory that nobody spoke of is left alone
        before = kernels.device.allocated_bytes
        options = {"precision": precision, "memory_budget": budget, "steps": 3, "method": "qlora"}
        trainer = Trainer(config_of(tmp_path, f"run{budget}", **options), kernels=kernels)
        plan = trainer.session.plan
        assert len(copies_of(plan)) == (0 if budget is None else COPIES)
        shaders = {launch.shader for step in plan.steps["micro"] for launch in step.launches}
        assert ("nf4_low_precision" in shaders, "nf4_low_precision_transposed" in shaders) == ((budget is None,) * 2)
        losses = [record.loss for record in trainer.steps()]
        assert kernels.device.allocated_bytes - before == plan.peak_bytes
        runs.append((losses, [values.tobytes() for values in trainer.session.adapter_values().values()]))
        trainer.session.close()
    assert runs[0] == runs[1]


def test_copies_take_what_a_budget_leaves_and_no_more():
    none = fitted(replace(CARD, free_bytes=None), 1 << 40).plan.peak_bytes
    sizes, found = fitted(CARD, 1 << 40).plan.buffers, []
    for left in range(-20_000, 400_000, 20_000):
        made = fitted(CARD, none + left)
        level, plan, graphs = made.recompute, made.plan, made.graphs
        assert plan.peak_bytes <= none + left
        names = copies_of(plan)
        assert (weight_copies.GRAPH in graphs) == bool(names)
        if level.fates:
            assert not names  # what the backward pass needs comes first
        missing = [sizes[name] for name in sizes if name.endswith(".transposed") and name not in names]
        # Turned ones come first: others are there only where those were too large for what was left.
        assert all(sizes[name] < min(missing, default=1 << 40) for name in names if name.endswith(".narrow"))
        found.append(len(names))
    assert found == sorted(found)
    assert (found[0], found[-1]) == (0, COPIES)
    assert len(set(found)) > 5


@pytest.mark.parametrize(
    ("caps", "options", "copies"),
    [
        (CARD, {}, COPIES),
        (replace(CARD, free_bytes=None), {}, 0),  # 16 GiB assumed are not there to be filled, nor the system's memory
        (replace(CARD, free_bytes=0), {}, 0),  # all of it is somebody else's
        (replace(CARD, free_bytes=None), {"memory_budget": 1.0}, COPIES),
        (CARD, {"precision": "f32"}, 0),
        (CARD, {"precision": "f16"}, COPIES),
    ],
    ids=str,
)
def test_only_memory_that_may_be_filled_is(caps, options, copies):
    assert len(copies_of(fitted(caps, 1 << 30, **options).plan)) == copies


def test_evaluation_reads_the_copies_too():
    graphs = fitted(CARD, 1 << 30).graphs
    for name in ("micro", "evaluate"):
        products = [n for n in graphs[name].nodes if n.op == "linear"]
        assert products
        assert all(n.group("copy") and not n.group("weight") for n in products)


def test_the_graphs_given_stay_as_they_were():
    graph = Graph("g")
    x = graph.tensor("x", (64, 64))
    ops.keep(ops.linear(x, ops.Nf4Tensors.declare(graph, "w", (64, 64), False, "float32"), precision="int8"), "y")
    plan = make_plan({"g": graph}, Caps())
    larger = weight_copies.keep_copies(FittedPlan(plan, {"g": graph}, Recompute()), 1 << 30)
    assert len(copies_of(larger.plan)) == 1
    assert not graph.nodes[0].group("copy")
    assert larger.graphs["g"].nodes[0].group("copy")
    assert set(graph.persistents) == {"x", "y", "w.codes", "w.absmax"}


UNITS = replace(
    CARD,
    max_workgroup_bytes=49152,
    max_invocations=1024,
    matrices=(MatrixConfig("f16", "f32", 16, 16, 16, 32, 32), MatrixConfig("i8", "i32", 16, 16, 32, 32, 32)),
)


def told_of(graphs) -> list[Node]:
    return [
        n for name in ("micro", "evaluate") for n in graphs[name].nodes if n.op == "linear" and "largest" in n.inputs
    ]


def test_products_without_a_copy_are_told_the_largest_values_of_its_rows():
    """In int8 by rows; then each makes its copy in one pass over the weight instead of two."""
    free = fitted(UNITS, 1 << 40)
    assert len(copies_of(free.plan)) == COPIES
    assert not told_of(free.graphs)
    none = fitted(replace(UNITS, free_bytes=None), 1 << 40)
    products = [n for name in ("micro", "evaluate") for n in none.graphs[name].nodes if n.op == "linear"]
    assert len(told_of(none.graphs)) == len(products) > COPIES
    steps = [step for steps in none.plan.steps.values() for step in steps if step.node.op == "linear"]
    made = [launch for step in steps for launch in step.launches if launch.shader == "nf4_panels"]
    assert {launch.constants["stage"] for launch in made} == {"codes"}
    assert not any(name.endswith("largest") for name in fitted(replace(CARD, free_bytes=None), 1 << 40).plan.buffers)


def test_the_largest_values_are_within_a_budget_that_is_short():
    whole = fitted(replace(UNITS, free_bytes=None), 1 << 40).plan.peak_bytes
    for share in (0.9, 0.8):
        made = fitted(UNITS, int(share * whole))
        assert made.recompute.fates
        assert told_of(made.graphs)
        assert made.plan.peak_bytes <= int(share * whole)
