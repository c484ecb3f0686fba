"""Cross-entropy in f16: against the same arithmetic in NumPy, against the exact loss, and where it is chosen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.plan import PlanOptions, make_plan
from entrenar_gpu.dtypes import NUMPY_TYPES
from entrenar_gpu.executors.numpy_executor import run_node
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.tensor import Graph, Tensor
from entrenar_gpu.ops import loss as loss_ops
from entrenar_gpu.ops.gemm import tiles
from entrenar_gpu.ops.gemm.tiles import Choice, Tile, TileTable
from tests.helpers.equivalence import fault, needs


@dataclass
class Head:
    """The loss of random tokens over a vocabulary in shards, with logits of a few units, and dx."""

    tokens: int
    depth: int
    shards: tuple[int, ...]
    smoothing: float = 0.0
    dtype: str = "bf16"
    wants_dx: bool = True
    precision: Any = "f16"
    weighted: bool = False
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng, graph = np.random.default_rng(5), Graph("head")
        self.graph = graph
        x = graph.tensor("x", (self.tokens, self.depth), requires_grad=self.wants_dx)
        targets = graph.tensor("targets", (self.tokens,), "i32")
        shards = [graph.tensor(f"w{i}", (n, self.depth), self.dtype, "weight") for i, n in enumerate(self.shards)]
        goals = rng.integers(0, sum(self.shards), self.tokens)
        goals[rng.random(self.tokens) < 0.2] = ops.IGNORE
        self.arrays = {"x": rng.standard_normal(x.shape).astype(np.float32), "targets": goals.astype(np.int32)}
        for shard in shards:
            values = 3 / np.sqrt(self.depth) * rng.standard_normal(shard.shape)
            self.arrays[shard.name] = values.astype(NUMPY_TYPES[self.dtype])
        weights = graph.tensor("weights", (self.tokens,)) if self.weighted else None
        if weights is not None:
            self.arrays["weights"] = rng.uniform(0.01, 1, self.tokens).astype(np.float32)
        ops.cross_entropy(x, targets, shards, self.smoothing, self.precision, weights=weights)
        (self.node,) = graph.nodes

    def outputs(self) -> dict[str, Tensor]:
        return dict(zip(("loss", "lse", "dx"), self.node.outputs, strict=False))

    def reference(self) -> dict[str, np.ndarray]:
        values = {t.id: self.arrays[name] for name, t in self.graph.persistents.items()}
        run_node(self.node, values)
        return {name: values[t.id] for name, t in self.outputs().items()}

    def on_device(
        self, device: Any, kernels: Any, tiles: TileTable | None = None, **caps: Any
    ) -> dict[str, np.ndarray]:
        options = PlanOptions(tiles=tiles or {}, keep=True)
        replay = Replay(device, make_plan({"head": self.graph}, replace(device.caps, **caps), options), kernels)
        try:
            for name, values in self.arrays.items():
                replay.write(name, values)
            replay.run("head")
            return {name: replay.read_temporary(t) for name, t in self.outputs().items()}
        finally:
            replay.close()

    def exact(self) -> dict[str, np.ndarray]:
        """The same in float64, softmax and all."""
        table = np.concatenate([self.arrays[f"w{i}"].astype(np.float64) for i in range(len(self.shards))])
        logits, goals = self.arrays["x"] @ table.T, self.arrays["targets"]
        lse = np.log(np.exp(logits).sum(axis=1))
        counted, rows = goals >= 0, np.arange(len(goals))
        wanted = np.full(logits.shape, self.smoothing / len(table))
        wanted[rows[counted], goals[counted]] += 1 - self.smoothing
        losses = lse - (wanted * logits).sum(axis=1)
        weights = self.arrays.get("weights", np.ones(len(goals))) * counted
        dscores = (np.exp(logits - lse[:, None]) - wanted) * weights[:, None]
        return {"loss": (losses * weights).sum(keepdims=True), "lse": lse * counted, "dx": dscores @ table}


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# Relative to the reference of the same arithmetic: sums of 32 products in f16 cost a product 1.2e-3 of its norm (docs/
# gemm.md). Logits have a norm of 3 and lse one of 8; of the dscores, a logit's error is a relative one.
BARS = {"loss": 1e-3, "lse": 1e-3, "dx": 5e-3}


def check(head: Head, got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    for name, value in got.items():
        assert error(value, want[name]) <= BARS[name], f"{name}: {error(value, want[name]):.1e}"


HEADS = {
    "one shard": Head(17, 64, (128,)),
    "shards, smoothed": Head(70, 128, (192, 192, 64), 0.1),
    "stored in binary16": Head(9, 64, (64, 64), dtype="half"),
    "stored in f32": Head(9, 64, (64, 64), dtype="f32"),
    "weighted": Head(70, 64, (192, 64), 0.1, weighted=True),
    "evaluation": Head(70, 64, (192, 64), wants_dx=False),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", HEADS)
def test_the_loss_and_its_gradient(name, device, kernels):
    needs(device, "f16")
    head = HEADS[name]
    check(head, head.on_device(device, kernels), head.reference())


@pytest.mark.gpu
def test_chunks_of_tokens_and_slices_of_pages(device, kernels, monkeypatch):
    """Slices of every shard are added onto those of the shard before; the last shard has fewer of them."""
    needs(device, "f16")
    head = Head(150, 64, (192, 192, 64))
    monkeypatch.setattr(loss_ops, "LOGITS_BYTES", 2 * 448 * 64)
    choice = Choice(Tile(64, 64, 32, 8, 8), 3)
    chosen = {tiles.key("f16", 64, 64, 192, "nn"): tiles.to_numbers(choice)}
    assert [t.shape[0] for t in workspace(head, device, chosen)] == [64, 150, 150, 27, 64, 3]
    check(head, head.on_device(device, kernels, tiles=chosen), head.reference())


@pytest.mark.gpu
def test_only_tokens_with_a_label_are_multiplied(device, kernels, monkeypatch):
    """70 of 150 tokens fill one chunk of 64, and 6 places of the next; where they lie changes no bit."""
    needs(device, "f16")
    monkeypatch.setattr(loss_ops, "LOGITS_BYTES", 2 * 448 * 64)
    head = Head(150, 64, (256, 192))
    x, goals = head.arrays["x"], np.random.default_rng(1).integers(0, 448, 150).astype(np.int32)
    labelled = np.random.default_rng(0).permutation(150) < 70
    first = np.argsort(~labelled, kind="stable")  # the same tokens, those with a label before all others
    plan = make_plan({"head": head.graph}, device.caps, PlanOptions(keep=True))
    replay = Replay(device, plan, kernels)
    try:
        for name, values in head.arrays.items():
            replay.write(name, values)
        results = []
        for order, targets in ((first, goals), (first, np.where(labelled, goals, ops.IGNORE)[first])):
            replay.write("x", x[order])
            replay.write("targets", targets)
            replay.run("head")
        results.append({name: replay.read_temporary(t) for name, t in head.outputs().items()})
        replay.write("x", x)
        replay.write("targets", np.where(labelled, goals, ops.IGNORE))
        replay.run("head")
        results.append({name: replay.read_temporary(t) for name, t in head.outputs().items()})
        counts = replay.read_temporary(plan.steps["head"][0].workspace[3])
    finally:
        replay.close()
    packed, spread = results
    for name in ("dx", "lse"):
        np.testing.assert_array_equal(packed[name], spread[name][first])
        assert not spread[name][~labelled].any()
    np.testing.assert_allclose(packed["loss"], spread["loss"], rtol=1e-6)
    head.arrays["targets"] = np.where(labelled, goals, ops.IGNORE).astype(np.int32)
    check(head, spread, head.reference())
    grids = np.array([launch.grid for launch in plan.steps["head"][0].launches if launch.counted is not None])
    (whole, part, none), (full, *_) = counts.reshape(3, 7, 3), grids.reshape(3, 7, 3)
    np.testing.assert_array_equal(whole, full)
    np.testing.assert_array_equal(part[:, 0], -(-full[:, 0] * 6 // 64))
    assert not none[:, 0].any()


def workspace(head: Head, device: Any, chosen: Any) -> tuple[Tensor, ...]:
    plan = make_plan({"head": head.graph}, device.caps, PlanOptions(tiles=chosen))
    return next(step.workspace for step in plan.steps["head"] if step.node is head.node)


def test_no_further_from_the_exact_loss_than_bf16_logits_are():
    """A bfloat16 keeps 8 bits, so that rounding a logit costs up to 2^-9 of it, 2^-9 / sqrt(3) on average."""
    head = Head(64, 256, (1024, 512))
    got, exact = head.reference(), head.exact()
    rounded = Head(64, 256, (1024, 512), precision="f32")
    peer = rounded.arrays["x"].astype(NUMPY_TYPES["bf16"]).astype(np.float32)
    rounded.arrays["x"] = peer
    assert error(got["lse"], exact["lse"]) < 0.5 * error(rounded.reference()["lse"], exact["lse"])
    assert 1e-5 < error(got["dx"], exact["dx"]) < 2e-3


@pytest.mark.parametrize(
    ("shards", "precision", "expected"),
    [((128, 64), "f16", "f16"), ((128, 64), "int8", "f16"), ((128, 64), "f32", "f32"), ((128, 65), "f16", "f32")],
)
def test_what_is_multiplied_in_f16(shards, precision, expected):
    assert Head(4, 64, shards, precision=precision).node.attrs["arithmetic"] == expected


def test_a_vocabulary_that_is_trained_stays_f32():
    graph = Graph("g")
    x, targets = graph.tensor("x", (4, 64), requires_grad=True), graph.tensor("targets", (4,), "i32")
    loss = ops.cross_entropy(x, targets, [graph.parameter("w", (64, 64))], precision="f16")
    assert loss.node is not None
    assert loss.node.attrs["arithmetic"] == "f32"


FAULTS = [
    ("labelled_rows", "f32(0.000244140625)", "f32(0.00024)"),
    ("labelled_rows", "dx[token", "dx[row"),
    ("labelled_rows", "x[token", "x[row"),
    ("labelled_tokens", "found[thread] - own", "found[thread]"),
    ("labelled_tokens", "* rows +", "* (rows - 1u) +"),
    ("matmul_f16", "widen_bf16(rb0_0.x)", "widen_bf16(rb0_0.y)"),
    ("matmul_f16", "k / 4u % 8u", "k / 8u % 8u"),
    ("cross_entropy", "vec4<i32>(0, 1, 2, 3)", "vec4<i32>(0, 1, 3, 2)"),
    ("cross_entropy", "4096.0", "4000.0"),
    ("cross_entropy", "exp(before - highest)", "exp(highest - before)"),
    ("cross_entropy", "[u32(goal) % 4u]", "[0]"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("shader", "old", "new"), FAULTS)
def test_a_planted_fault_is_caught(shader, old, new, device, kernels):
    needs(device, "f16")
    head = HEADS["shards, smoothed"]
    with fault(shader, old, new), pytest.raises(AssertionError, match=r"^(loss|lse|dx): "):
        check(head, head.on_device(device, kernels), head.reference())
