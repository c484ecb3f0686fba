"""Tokens, labels and positions are data: one beyond its table must reach nothing outside it.

Dawn checks no index at all (`gpu/engines/dawn.py`), so the shaders themselves keep these in bounds. A bad one costs
what the last good one does; other rows are not touched.
"""

from __future__ import annotations

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.autodiff import backward
from entrenar_gpu.compiler.plan import PlanOptions, make_plan
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.tensor import Graph

pytestmark = pytest.mark.gpu
BAD = np.uint32(2**31 - 5)  # a negative label would be one to ignore


def outputs(device, kernels, make, arrays):
    """Every output of a graph of one op, and of its gradient, after a run with `arrays`."""
    graph = Graph("g")
    loss = make(graph)
    backward(loss, [t for t in graph.persistents.values() if t.role == "param"])
    replay = Replay(device, make_plan({"g": graph}, device.caps, PlanOptions(keep=True)), kernels)
    try:
        for name, values in arrays.items():
            replay.write(name, values)
        replay.run("g")
        kept = [t for node in graph.nodes for t in node.outputs]
        found = [replay.read_temporary(t) for t in kept if t.id in replay.plan.slices]
        grads = [replay.read(n) for n in graph.persistents if n.endswith(".grad")]
        return [a.tobytes() for a in (*found, *grads)]
    finally:
        replay.close()


@pytest.mark.parametrize("vocabulary", [31, 32], ids=["scalars", "vectors"])
def test_labels_beyond_the_vocabulary(device, kernels, rng, vocabulary):
    def make(graph):
        x, table = graph.parameter("x", (5, 8)), graph.tensor("table", (vocabulary, 8), role="weight")
        return ops.cross_entropy(x, graph.tensor("targets", (5,), "i32"), [table])

    held = {"x": rng.standard_normal((5, 8)), "table": rng.standard_normal((vocabulary, 8))}
    targets = np.array([3, vocabulary - 1, -100, 0, vocabulary - 1], np.int32)
    bad = np.where(targets == vocabulary - 1, np.int32(BAD), targets)
    runs = [outputs(device, kernels, make, held | {"targets": t}) for t in (targets, bad)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("norm", [False, True], ids=["rope", "norm_rope"])
def test_positions_beyond_the_table(device, kernels, rng, norm):
    def make(graph):
        x, table = graph.parameter("x", (4, 16)), graph.tensor("table", (6, 8), role="weight")
        positions = graph.tensor("positions", (4,), "u32")
        if norm:
            weight = graph.tensor("weight", (8,), role="weight")
            return ops.sum(ops.norm_rope(x, weight, 1e-6, table, positions))
        return ops.sum(ops.rope(x, table, positions))

    held = {"x": rng.standard_normal((4, 16)), "table": ops.rope_table([1.0, 0.5, 0.25, 0.125], 6)}
    if norm:
        held["weight"] = rng.standard_normal(8)
    positions = np.array([0, 5, 3, 5], np.uint32)
    bad = np.where(positions == 5, BAD, positions)
    runs = [outputs(device, kernels, make, held | {"positions": p}) for p in (positions, bad)]
    assert runs[0] == runs[1]


def test_tokens_beyond_the_table(device, kernels, rng):
    """No row of the table is theirs: they get what was there, and no gradient reaches the table."""

    def make(graph):
        table, ids = graph.parameter("table", (7, 8)), graph.tensor("ids", (4,), "u32")
        x = graph.tensor("x", (4, 8))
        return ops.sum(ops.mul(ops.embedding(ids, [table], graph.tensor("order", (4,), "u32")), x))

    def gradient(ids, order):
        graph = Graph("g")
        backward(make(graph), [graph.persistents["table"]])
        replay = Replay(device, make_plan({"g": graph}, device.caps), kernels)
        try:
            for name, values in (held | {"ids": ids, "order": order}).items():
                replay.write(name, values)
            replay.run("g")
            return replay.read("table.grad")
        finally:
            replay.close()

    held = {"table": rng.standard_normal((7, 8)), "x": rng.standard_normal((4, 8))}
    ids = np.array([2, BAD, 2, 6], np.uint32)
    got = gradient(ids, np.argsort(ids, kind="stable").astype(np.uint32))
    want = np.zeros((7, 8), np.float32)
    want[2], want[6] = held["x"][0].astype(np.float32) + held["x"][2].astype(np.float32), held["x"][3]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
