"""Sums as long as a model makes them, also of data with means, outliers and a wide range: the error must not grow.

The bar is that of a sum of SUMMED_AT_ONCE terms, however many there are (docs/equality.md). Where terms cancel, it is
relative to the sum of their sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.autodiff import backward
from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.tensor import Graph, Tensor
from entrenar_gpu.ops.gemm import tiles
from tests.helpers.cases import Case, segment_starts, x
from tests.ops.test_kernels import check_on

LONG = 32_768
BAR = 5e-8 * tiles.SUMMED_AT_ONCE**0.5 + 1e-7


def noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def with_mean(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Columns that share a mean of three deviates, as rows of a pretrained embedding do."""
    return rng.standard_normal(shape) + 3 * rng.standard_normal(shape[-1])


def outliers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """One row in five hundred a hundred times as large, as activations of pretrained models have them."""
    return rng.standard_normal(shape) * np.where(rng.random((shape[0], 1)) < 0.002, 100, 1)


def wide(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Six decades of magnitude."""
    return rng.standard_normal(shape) * 10 ** rng.uniform(-3, 3, shape)


DATA = {f.__name__: f for f in (noise, with_mean, outliers, wide)}
Values = dict[str, np.ndarray]


def run(device, kernels, build: Callable[[Graph, Values], Tensor], values: Values) -> np.ndarray:
    """What a graph computes of `values` on the GPU."""
    graph = Graph("long")
    out = ops.keep(build(graph, values), "result")
    plan = make_plan({"long": graph}, device.caps)
    replay = Replay(device, plan, kernels)
    try:
        for name, value in values.items():
            replay.write(name, value)
        replay.run("long")
        return replay.read("result").reshape(out.shape).astype(np.float64)
    finally:
        replay.close()


def error(got: np.ndarray, exact: np.ndarray, size: np.ndarray | None = None) -> float:
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact if size is None else size))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("ta", "tb"), [(False, False), (True, False), (False, True)])
def test_matmul(device, kernels, data, ta, tb):
    rng = np.random.default_rng(1)
    a, b = DATA[data](rng, (LONG, 12)).astype(np.float32), DATA[data](rng, (LONG, 20)).astype(np.float32)
    values = {"a": a if ta else np.ascontiguousarray(a.T), "b": np.ascontiguousarray(b.T) if tb else b}

    def build(graph: Graph, given: Values) -> Tensor:
        tensors = [graph.tensor(name, value.shape) for name, value in given.items()]
        return ops.matmul(*tensors, transpose_a=ta, transpose_b=tb)

    assert error(run(device, kernels, build, values), a.astype(np.float64).T @ b) <= BAR


@pytest.mark.parametrize("data", DATA)
def test_matmul_adds_to_what_is_there(device, kernels, data):
    """Bias, residual and an adapter's product join one block of the sum, and only one."""
    rng = np.random.default_rng(2)
    shapes = {"a": (24, 5000), "b": (5000, 32), "p": (24, 8), "q": (8, 32), "bias": (1, 32), "residual": (24, 32)}
    values = {name: DATA[data](rng, shape).astype(np.float32) for name, shape in shapes.items()}

    def build(graph: Graph, given: Values) -> Tensor:
        a, b, p, q, bias, residual = (graph.tensor(name, value.shape) for name, value in given.items())
        return ops.matmul(a, b, alpha=0.5, low_rank=(p, q, 300.0), bias=bias, residual=residual)

    v = {name: value.astype(np.float64) for name, value in values.items()}
    exact = 0.5 * v["a"] @ v["b"] + 300 * v["p"] @ v["q"] + v["bias"] + v["residual"]
    assert error(run(device, kernels, build, values), exact) <= BAR


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("axis", ["all", "last", "leading"])
def test_sums(device, kernels, data, axis):
    rng = np.random.default_rng(3)
    x = DATA[data](rng, {"all": (700, 600), "last": (2, 140_000), "leading": (140_000, 3)}[axis]).astype(np.float32)
    op = {"all": ops.sum, "last": ops.sum_columns, "leading": ops.sum_rows}[axis]
    over = {"all": None, "last": -1, "leading": 0}[axis]
    got = run(device, kernels, lambda graph, given: op(graph.tensor("x", x.shape)), {"x": x})
    assert error(got, x.sum(over, np.float64), np.abs(x).sum(over, np.float64)) <= BAR


@pytest.mark.parametrize("data", DATA)
def test_embedding_gradient(device, kernels, data):
    """One id that fills most of a batch, as padding or a newline does, and ends in the middle of a block."""
    rng = np.random.default_rng(4)
    ids = np.sort(np.where(rng.random(LONG) < 0.7, 3, rng.integers(0, 7, LONG))).astype(np.uint32)
    order = rng.permutation(LONG)
    ids = ids[np.argsort(order)]  # not sorted as they stand
    values = {"ids": ids, "order": np.argsort(ids, kind="stable").astype(np.uint32), "dy": DATA[data](rng, (LONG, 5))}
    values["dy"] = values["dy"].astype(np.float32)

    def build(graph: Graph, given: Values) -> Tensor:
        table = graph.tensor("table", (7, 5), requires_grad=True)
        out = ops.embedding(graph.tensor("ids", (LONG,), "u32"), [table], graph.tensor("order", (LONG,), "u32"))
        return backward(out, [table], graph.tensor("dy", (LONG, 5)))[table]

    exact = np.zeros((7, 5))
    np.add.at(exact, ids, values["dy"].astype(np.float64))
    size = np.zeros((7, 5))
    np.add.at(size, ids, np.abs(values["dy"]).astype(np.float64))
    assert error(run(device, kernels, build, values), exact, size) <= BAR


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_gradient_of_a_large_vocabulary(device, kernels, trainable):
    """dscores sum to zero over a vocabulary, so that a mean that its rows share cancels: but not on the way there.

    The bar is that of a model's gradients.
    """
    rng = np.random.default_rng(5)
    tokens, width, vocabulary = 8, 576, 49_152
    x = 2 * rng.standard_normal((tokens, width)).astype(np.float32)
    w = 0.05 * with_mean(rng, (vocabulary, width)).astype(np.float32)
    targets = rng.integers(0, vocabulary, tokens).astype(np.int32)
    values = {"x": x, "targets": targets, "w": w, "upstream": np.ones(1, np.float32)}

    def build(graph: Graph, given: Values) -> Tensor:
        hidden = graph.tensor("x", x.shape, requires_grad=True)
        table = graph.tensor("w", w.shape, role="param" if trainable else "weight", requires_grad=trainable)
        loss = ops.cross_entropy(hidden, graph.tensor("targets", (tokens,), "i32"), [table], 0.0)
        return backward(loss, [hidden, table], graph.tensor("upstream", (1,)))[hidden]

    logits = x.astype(np.float64) @ w.T.astype(np.float64)
    dscores = np.exp(logits - logits.max(-1, keepdims=True))
    dscores /= dscores.sum(-1, keepdims=True)
    dscores[np.arange(tokens), targets] -= 1
    assert error(run(device, kernels, build, values), dscores @ w) <= 2e-5


def test_attention_over_more_keys_than_are_summed_at_once(device, kernels):
    """Sums are emptied on the way, in the forward pass while the running maximum still grows."""
    lengths, heads, size = [[30, 1060]], 2, 8
    tokens = sum(lengths[0])
    inputs = (x(tokens, heads * size), x(tokens, size), x(tokens, size), segment_starts(lengths))
    apply = functools.partial(ops.attention, rows=1, heads=heads, kv_heads=1)
    check_on(Case("attention-long", inputs, apply), device, kernels)
