"""Products of a few rows with weights as they are stored: GPU against NumPy, and a row's sums by themselves."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.fuse_rows import fuse_rows
from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.dtypes import NUMPY_TYPES
from entrenar_gpu.executors.numpy_executor import NumpyExecutor
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.caps import Caps
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.ops.quantize import Nf4Tensors, host_parts
from entrenar_gpu.quant import Nf4Weight
from tests.helpers.equivalence import check_close, fault

# (N, K) of weights: whole steps of all widths, single values, more than one fold of lanes; K of 16 is a rank's.
SIZES = {"nf4": [(70, 128), (33, 40), (9, 21), (5, 2624)], "f32": [(70, 128), (3, 21), (130, 16)], "bf16": [(70, 136)]}
SIZES |= {"nf4 double": [(70, 128), (1, 192)], "nf4 bfloat16": [(70, 128)], "half": [(70, 136), (33, 10), (9, 21)]}
CASES = [(kind, n, k, rows) for kind, sizes in SIZES.items() for n, k in sizes for rows in (3,)]


def graph_of(kind: str, n: int, k: int, rows: int, added: bool = True, own: bool = False) -> Graph:
    graph = Graph("g")
    x = graph.tensor("x", (rows, k))
    bias, residual = (graph.tensor("bias", (n,)), graph.tensor("residual", (rows, n))) if added else (None, None)
    if own:  # a temporary, which the product may overwrite
        residual = ops.scale(residual, 1.0)
    name, _, how = kind.partition(" ")
    if name == "nf4":
        rounded = how if how not in ("", "double") else "float32"
        weight = Nf4Tensors.declare(graph, "w", (n, k), how == "double", rounded)
    else:  # in two shards, the first of 64 rows where there are as many
        cut = min(64, n - 1)
        weight = [graph.tensor(f"w{i}", (m, k), name, "weight") for i, m in enumerate((cut, n - cut))]
    ops.keep(ops.gemv(x, weight, 0.5 if added else 1.0, bias, residual), "out")
    return graph


def arrays_of(kind: str, graph: Graph, rng: np.random.Generator) -> dict[str, np.ndarray]:
    arrays = {
        n: rng.standard_normal(graph.persistents[n].shape, np.float32)
        for n in ("x", "bias", "residual")
        if n in graph.persistents
    }
    name, _, how = kind.partition(" ")
    if name == "nf4":
        shape = next(node for node in graph.nodes if node.op == "gemv").attrs["shape"]
        parts = host_parts(Nf4Weight.from_dense(rng.standard_normal(shape, np.float32), how == "double"))
        names = [t.name for t in graph.persistents.values() if t.name.startswith("w.")]
        return arrays | dict(zip(names, parts, strict=True))
    shards = [t for t in graph.persistents.values() if t.name in ("w0", "w1")]
    return arrays | {t.name: rng.standard_normal(t.shape).astype(NUMPY_TYPES[name]) for t in shards}


def run(executor, arrays) -> np.ndarray:
    try:
        for name, values in arrays.items():
            executor.write(name, values)
        executor.run("g")
        return executor.read("out")
    finally:
        executor.close()


def on_device(kernels, graph, arrays, as_card: bool = False) -> np.ndarray:
    """`as_card`: with the kernels that a card gets, whatever the adapter is."""
    caps = replace(kernels.device.caps, software=False) if as_card else kernels.device.caps
    return run(Replay(kernels.device, make_plan({"g": graph}, caps), kernels), arrays)


@pytest.mark.parametrize(("kind", "n", "k", "rows"), CASES)
def test_gpu_against_numpy(kernels, rng, kind, n, k, rows):
    graph = graph_of(kind, n, k, rows, own=rows == 3)
    arrays = arrays_of(kind, graph, rng)
    want = run(NumpyExecutor({"g": graph}), arrays)
    check_close(on_device(kernels, graph, arrays), want, want, 5e-8 * math.sqrt(k) + 1e-7, "out")


@pytest.mark.parametrize("as_card", [False, True])
@pytest.mark.parametrize("kind", [*SIZES])
def test_a_row_alone_or_among_others(kernels, rng, kind, as_card):
    """Bit for bit, however many are multiplied at once; and a card's kernels against NumPy."""
    n, k = (9, 2560) if kind == "nf4 double" else SIZES[kind][0]
    many = graph_of(kind, n, k, 11, added=False)
    arrays = arrays_of(kind, many, rng)
    got, want = on_device(kernels, many, arrays, as_card), run(NumpyExecutor({"g": many}), arrays)
    check_close(got, want, want, 5e-8 * math.sqrt(k) + 1e-7, "out")
    for rows in ([5], [0, 1, 2, 9]):
        few, fewer = arrays | {"x": arrays["x"][rows]}, graph_of(kind, n, k, len(rows), added=False)
        np.testing.assert_array_equal(on_device(kernels, fewer, few, as_card), got[rows])


def merged_graph(double: bool, rows: int = 3) -> Graph:
    """Three products of one x, then two with a gate, before they are merged."""
    graph = Graph("g")
    x, bias = graph.tensor("x", (rows, 128)), graph.tensor("bias", (40,))
    shapes = [(n, 128) for n in (70, 40, 9, 33, 33)]
    weights = [Nf4Tensors.declare(graph, f"w{i}", shape, double, "float32") for i, shape in enumerate(shapes)]
    outs = [ops.gemv(x, w, bias=bias if w.shape[0] == 40 else None) for w in weights[:3]]
    other = ops.scale(x, 0.5)
    gated = ops.swiglu(*(ops.gemv(other, w) for w in weights[3:]))
    for number, out in enumerate((*outs, gated)):
        ops.keep(out, f"out{number}")
    return graph


@pytest.mark.parametrize("as_card", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_merged_products(kernels, rng, double, as_card):
    """What one launch makes is what each makes by itself: bit for bit, but for a gate's last digits."""
    graph, merged = merged_graph(double), merged_graph(double)
    fuse_rows(merged, replace(Caps(), max_storage_buffers=17))
    assert [node.op for node in merged.nodes] == ["gemv_group", "scale", "gemv_group"]
    few = merged_graph(double)
    fuse_rows(few, Caps())
    assert [node.op for node in few.nodes].count("gemv_group") == (0 if double else 2)
    arrays = {name: rng.standard_normal(graph.persistents[name].shape, np.float32) for name in ("x", "bias")}
    for i, n in enumerate((70, 40, 9, 33, 33)):
        parts = host_parts(Nf4Weight.from_dense(rng.standard_normal((n, 128), np.float32), double))
        arrays |= dict(zip([t for t in graph.persistents if t.startswith(f"w{i}.")], parts, strict=True))
    caps = replace(kernels.device.caps, software=kernels.device.caps.software and not as_card)
    executors = [NumpyExecutor({"g": graph}), NumpyExecutor({"g": merged})]
    executors += [Replay(kernels.device, make_plan({"g": g}, caps), kernels) for g in (graph, merged, few)]
    outs = []
    for executor in executors:
        for name, values in arrays.items():
            executor.write(name, values)
        executor.run("g")
        outs.append([executor.read(f"out{i}") for i in range(4)])
        executor.close()
    for number in range(4):
        want, *others = (out[number] for out in outs)
        for got in others:
            check_close(got, want, want, 2e-6, f"out{number}")
        if number < 3:
            np.testing.assert_array_equal(others[2], others[1])
            np.testing.assert_array_equal(others[3], others[1])


FAULTS = [
    ("gemv", "bits >> shift", "bits >> (shift ^ 4u)"),
    ("gemv", ") / 4u);", ") / 8u);"),  # the block of a scale
    ("gemv", "p < 8u", "p < 7u"),
    ("gemv", "fma(w0_1_0, x0_1_0", "fma(w0_0_0, x0_1_0"),
]


@pytest.mark.parametrize(("shader", "old", "new"), FAULTS)
def test_planted_errors_are_seen(device, rng, shader, old, new):
    graph = graph_of("nf4", 70, 128, 2)
    arrays = arrays_of("nf4", graph, rng)
    want = run(NumpyExecutor({"g": graph}), arrays)
    with fault(shader, old, new):
        got = on_device(KernelCache(device), graph, arrays)
    assert not np.abs(got - want).max() <= 1e-3
