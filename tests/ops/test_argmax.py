"""Where rows are largest: GPU against NumPy, equal values, both zeros and values that are not finite among them."""

from __future__ import annotations

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.executors.numpy_executor import NumpyExecutor
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.ops.argmax import CHUNK, NOT_FINITE
from tests.helpers.equivalence import fault


def rows_of(n: int, rng: np.random.Generator) -> np.ndarray:
    x = np.round(rng.standard_normal((9, n)), 1).astype(np.float32)  # many values are equal
    x[1] = -np.abs(x[1]) - 1
    x[2] = -1
    x[2, n // 2], x[2, -1] = -0.0, 0.0
    x[3], x[4, n // 3] = -np.inf, np.inf
    x[5, n // 2] = np.nan
    x[6, : n - 1] = -np.inf
    x[7], x[8] = np.float32(1e-42), np.finfo(np.float32).min  # as small as can be told from zero
    return x


def graph_of(rows: int, n: int) -> Graph:
    graph = Graph("g")
    ops.keep(ops.argmax(graph.tensor("x", (rows, n))), "out")
    return graph


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2, 257, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
def test_gpu_against_numpy(kernels, rng, n):
    x = rows_of(n, rng)
    graph = graph_of(*x.shape)
    found = []
    for executor in (
        NumpyExecutor({"g": graph}),
        Replay(kernels.device, make_plan({"g": graph}, kernels.device.caps), kernels),
    ):
        executor.write("x", x)
        executor.run("g")
        found.append(executor.read("out"))
        executor.close()
    want = [int(np.argmax(row)) if np.isfinite(row.max()) else NOT_FINITE for row in x]
    assert found[0].tolist() == want
    assert found[1].tolist() == want


FAULTS = [
    ("argmax", "places[thread + half] < places[thread]", "places[thread + half] > places[thread]"),
    ("argmax", "if (size == 0u) { return 0x80000000u; }", ""),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("shader", "old", "new"), FAULTS)
def test_planted_errors_are_seen(device, rng, shader, old, new):
    x = rows_of(CHUNK + 1, rng)
    graph = graph_of(*x.shape)
    want = [int(np.argmax(row)) if np.isfinite(row.max()) else NOT_FINITE for row in x]
    with fault(shader, old, new):
        executor = Replay(device, make_plan({"g": graph}, device.caps), KernelCache(device))
        executor.write("x", x)
        executor.run("g")
        found = executor.read("out")
        executor.close()
    assert found.tolist() != want
