"""Sums inside the ops that make their terms: the same values, fewer nodes, and nothing lost that somebody reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar_gpu import ops
from entrenar_gpu.compiler.autodiff import backward, differentiate
from entrenar_gpu.compiler.fuse import fuse_sums
from entrenar_gpu.executors.numpy_executor import run_node
from entrenar_gpu.graph.tensor import Graph, Tensor
from tests.helpers.made_graphs import random_graph


def values_of(graph: Graph, arrays: dict[str, np.ndarray]) -> dict[int, np.ndarray]:
    values = {t.id: arrays[name].copy() for name, t in graph.persistents.items()}
    for node in graph.nodes:
        assert {t.id for t in node.inputs.values()} <= values.keys(), f"{node.label()} reads what is not made yet"
        run_node(node, values)
    return values


def sums_of(graph: Graph, phase: str = "backward") -> int:
    return sum(node.op == "add" and node.phase == phase for node in graph.nodes)


@given(st.integers(0, 2**32 - 1))
def test_random_graphs_compute_the_same(seed):
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, 30, differentiate=False)
    leaves = [t for t in graph.persistents.values() if t.requires_grad]
    gradients = differentiate(ops.sum(graph.nodes[-1].output), leaves)
    arrays = {name: rng.uniform(-1, 1, t.shape) for name, t in graph.persistents.items()}
    apart, before = values_of(graph, arrays), len(graph.nodes)
    fuse_sums(graph, gradients.values())
    fused = values_of(graph, arrays)
    assert len(graph.nodes) <= before
    for tensor, gradient in gradients.items():
        size = np.abs(apart[gradient.id]).max(initial=1.0)
        np.testing.assert_allclose(
            fused[gradient.id], apart[gradient.id], rtol=0, atol=1e-10 * size, err_msg=str(tensor)
        )


def two_products(graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
    """A loss whose gradient with respect to x is a sum of two products, and both factors' weights."""
    x = graph.tensor("x", (4, 8), requires_grad=True)
    v, w = graph.parameter("v", (8, 3)), graph.parameter("w", (8, 3))
    return ops.sum(ops.mul(ops.matmul(x, v), ops.matmul(x, w))), x, v


def test_the_walk_itself_records_plain_sums():
    graph = Graph()
    loss, x, v = two_products(graph)
    differentiate(loss, [x, v])
    assert sums_of(graph) == 2  # of x, and onto what v's gradient holds already


def test_the_sum_keeps_its_tensor():
    """Whoever holds the gradient need not know of the pass."""
    graph = Graph()
    loss, x, v = two_products(graph)
    gradients = differentiate(loss, [x, v])
    fuse_sums(graph, gradients.values())
    assert sums_of(graph) == 0
    for gradient in gradients.values():
        assert gradient.node in graph.nodes
        assert gradient.node.op == "matmul"
    assert "low_rank.0" in gradients[x].node.inputs
    assert gradients[v].node.inputs["residual"] is v.grad


def test_what_is_kept_is_made_as_it_was():
    graph = Graph()
    loss, x, _ = two_products(graph)
    total = differentiate(loss, [x])[x]
    terms = list(total.node.inputs.values())
    fuse_sums(graph, [total, *terms])
    made = {t for node in graph.nodes for t in node.outputs}
    assert made >= {total, *terms}
    assert total.node.op == "add"


def test_a_term_with_another_reader_stays():
    graph = Graph()
    x, w = graph.tensor("x", (5, 8), requires_grad=True), graph.parameter("w", (8, 8))
    hidden = ops.matmul(ops.swish(x), w)
    gradients = differentiate(ops.sum(ops.add(hidden, ops.swish(hidden))), [x, w])
    read = gradients[x].node.inputs["dy"]  # the product that swish's gradient reads
    with graph.within(phase="backward"):
        total = ops.add(read, x)
    fuse_sums(graph, [*gradients.values(), total])
    assert read.node in graph.nodes
    assert total.node.op == "add"


@pytest.mark.parametrize("start", [0, None])
def test_the_forward_pass_and_earlier_walks_are_left_alone(start):
    graph = Graph()
    loss, x, v = two_products(graph)
    forward = ops.add(ops.matmul(x, v), ops.matmul(x, v))
    first = differentiate(loss, [x])
    start = len(graph.nodes) if start is None else start
    second = differentiate(ops.sum(forward), [x])
    fuse_sums(graph, [*first.values(), *second.values()], start)
    assert sums_of(graph, "forward") == 1
    assert first[x].node.op == ("add" if start else "matmul")
    assert second[x].node.op == "matmul"


def test_backward_fuses_what_it_records_and_nothing_else():
    """A second walk over the same tape leaves the gradients of the first as they are."""
    graph = Graph()
    loss, x, _ = two_products(graph)
    kept = backward(loss, [x])[x]
    with graph.within(phase="backward"):
        later = ops.add(kept, ops.scale(x, 1.0))
    backward(ops.sum(ops.mul(x, x)), [x])
    assert kept.node in graph.nodes
    assert later.node.op == "add"


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_an_upstream_gradient_made_earlier_stays_where_it_was_made(phase):
    """It is a term of the sum with what the parameter's gradient holds, and nobody else reads it."""
    graph = Graph()
    x, a = graph.parameter("x", (4, 4)), graph.tensor("a", (4, 4))
    with graph.within(phase=phase):
        upstream = ops.matmul(a, a)
    loss, start = ops.add(x, a), len(graph.nodes)
    gradient = differentiate(loss, [x], upstream)[x]
    fuse_sums(graph, [gradient], start if phase == "backward" else 0)
    assert upstream.node in graph.nodes
    assert gradient.node.op == "add"


def test_every_contribution_to_a_parameter_adds_onto_it_in_place():
    graph = Graph()
    x, w = graph.tensor("x", (4, 3)), graph.parameter("w", (3, 3))
    gradient = differentiate(ops.sum(ops.matmul(ops.matmul(x, w), w)), [w])[w]
    fuse_sums(graph, [gradient])
    updating = [node for node in graph.nodes if node.output.updates is w.grad]
    assert [list(node.inputs) for node in updating] == [["a", "b", "residual"]] * 2
