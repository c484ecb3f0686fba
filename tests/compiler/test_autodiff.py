"""The reverse walk: what is summed, what is left out, what is folded, and that nothing shared is spoilt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar_gpu import ops
from entrenar_gpu.compiler.autodiff import backward
from entrenar_gpu.executors.numpy_executor import NumpyExecutor, run_node
from entrenar_gpu.graph.tensor import Graph, Tensor
from entrenar_gpu.ops.registry import record
from tests.helpers.made_graphs import random_graph


def computed(graph: Graph, arrays: dict[str, np.ndarray], nodes=None) -> dict[int, np.ndarray]:
    values = {t.id: arrays[name].copy() for name, t in graph.persistents.items()}
    for node in graph.nodes if nodes is None else nodes:
        run_node(node, values)
    return values


def ops_of(graph: Graph, phase: str = "backward") -> list[str]:
    return [node.op for node in graph.nodes if node.phase == phase]


def leaf(graph: Graph, name: str, *shape: int) -> Tensor:
    return graph.tensor(name, shape, requires_grad=True)


@given(st.integers(0, 2**32 - 1))
def test_gradients_of_random_graphs_equal_central_differences(seed):
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, 20, differentiate=False)
    loss = ops.sum(graph.nodes[-1].output)
    forward = list(graph.nodes)
    leaves = [t for t in graph.persistents.values() if t.requires_grad]
    gradients = backward(loss, leaves)
    arrays = {name: rng.uniform(-1, 1, t.shape) for name, t in graph.persistents.items()}
    start = {name: array for name, array in arrays.items() if name.endswith(".grad")}
    values = computed(graph, arrays)
    for tensor, gradient in gradients.items():
        slope = values[gradient.id] - start.get(f"{tensor.name}.grad", 0.0)
        direction = rng.standard_normal(tensor.shape)
        ends = []
        for sign in (1, -1):
            moved = arrays | {tensor.name: arrays[tensor.name] + sign * 1e-6 * direction}
            ends.append(computed(graph, moved, [n for n in graph.nodes if n in forward])[loss.id][0])
        measured = (ends[0] - ends[1]) / 2e-6
        # products of many factors in a row curve strongly: the truncation error is larger than for a single op
        size = np.linalg.norm(slope) * np.linalg.norm(direction)
        assert abs((slope * direction).sum() - measured) <= 1e-5 * (size + abs(measured)) + 1e-7, tensor
    left_out = [t for t in leaves if t not in gradients]
    assert not any(depends(loss, t) for t in left_out)


def depends(result: Tensor, on: Tensor) -> bool:
    reached = {on.id}
    for node in result.graph.nodes:
        if any(t.id in reached for t in node.inputs.values()):
            reached.update(t.id for t in node.outputs)
    return result.id in reached


def test_contributions_of_every_reader_are_summed():
    graph = Graph()
    x = leaf(graph, "x", 3)
    loss = ops.sum(ops.add(ops.mul(x, x), ops.scale(x, 5.0)))
    gradient = backward(loss, [x])[x]
    assert computed(graph, {"x": np.array([1.0, 2.0, -3.0])})[gradient.id].tolist() == [7, 9, -1]


def test_upstream_scales_the_gradient():
    graph = Graph()
    x, upstream = leaf(graph, "x", 3), graph.tensor("upstream", (1,))
    gradient = backward(ops.sum(x), [x], upstream)[x]
    values = computed(graph, {"x": np.ones(3), "upstream": np.array([0.25])})
    assert values[gradient.id].tolist() == [0.25] * 3


def test_a_frozen_branch_costs_nothing():
    """No gradient is computed for a frozen weight, nor for what only frozen tensors lead to."""
    graph = Graph()
    x = graph.tensor("x", (4, 8))
    frozen = graph.tensor("frozen", (8, 8), role="weight")
    w = graph.parameter("w", (8, 3))
    hidden = ops.swish(ops.matmul(x, frozen))
    backward(ops.sum(ops.matmul(hidden, w)), [w])
    assert ops_of(graph) == ["fill", "expand", "matmul"]


def test_a_tensor_without_influence_is_left_out():
    graph = Graph()
    x, y = leaf(graph, "x", 3), leaf(graph, "y", 3)
    assert list(backward(ops.sum(x), [x, y])) == [x]


def test_what_was_computed_beside_the_loss_is_not_differentiated():
    graph = Graph()
    x = leaf(graph, "x", 3)
    ops.softmax(x)
    backward(ops.sum(x), [x])
    assert ops_of(graph) == ["fill", "expand"]


def test_a_sum_is_not_folded_into_what_was_made_before_it():
    """The product with an adapter stays where it is, as others read its second output."""
    graph = Graph()
    x, a, b = leaf(graph, "x", 5, 64), graph.parameter("a", (8, 64)), graph.parameter("b", (64, 8))
    weight = ops.Nf4Tensors.declare(graph, "w", (64, 64), False, "float32")
    first = ops.swish(x)
    loss = ops.sum(ops.add(first, ops.linear(x, weight, precision="int8", lora=(a, b, 0.5))))
    backward(loss, [x, a, b])
    made = {t.id for t in graph.persistents.values()}
    for node in graph.nodes:
        assert {t.id for t in node.inputs.values()} <= made, node.label()
        made |= {t.id for t in node.outputs}


def test_gradients_of_intermediate_tensors_survive():
    """The gradient of `hidden` is asked for, so that folding it into another product would lose it."""
    graph = Graph()
    x = leaf(graph, "x", 2, 3)
    w = graph.parameter("w", (3, 3))
    hidden = ops.scale(x, 1.0)
    loss = ops.sum(ops.mul(ops.matmul(hidden, w), ops.matmul(ops.add(hidden, x), w)))
    gradients = backward(loss, [x, hidden, w])
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3)), rng.standard_normal((3, 3))
    values = computed(graph, {"x": a, "w": b, "w.grad": np.zeros((3, 3))})
    # loss = (h w) . ((h + x) w), h = x
    np.testing.assert_allclose(values[gradients[hidden].id], 2 * a @ b @ b.T + a @ b @ b.T, rtol=1e-12)
    np.testing.assert_allclose(values[gradients[x].id], 4 * a @ b @ b.T, rtol=1e-12)


def test_parameters_accumulate_over_runs():
    graph = Graph("g")
    x, w = graph.tensor("x", (4, 8)), graph.parameter("w", (8, 3))
    backward(ops.sum(ops.matmul(x, w)), [w])
    executor = NumpyExecutor({"g": graph})
    executor.write("x", np.ones((4, 8)))
    for run in (1, 2, 3):
        executor.run("g")
        assert (executor.read("w.grad") == 4 * run).all()
    assert ops_of(graph)[-1] == "matmul"  # onto the gradient itself: no sum beside it


def test_two_paths_into_a_parameter_add_onto_it_twice():
    graph = Graph()
    x, w = graph.tensor("x", (4, 3)), graph.parameter("w", (3, 3))
    gradient = backward(ops.sum(ops.matmul(ops.matmul(x, w), w)), [w])[w]
    assert gradient.updates is w.grad
    a, b, start = (np.random.default_rng(i).standard_normal(s) for i, s in enumerate([(4, 3), (3, 3), (3, 3)]))
    ones = np.ones((4, 3))
    got = computed(graph, {"x": a, "w": b, "w.grad": start})[gradient.id]
    np.testing.assert_allclose(got, start + (a @ b).T @ ones + a.T @ (ones @ b.T), rtol=1e-12)


def test_an_adapter_costs_one_product_for_the_input_gradient():
    """d(x) of x W^T + (x A^T) B^T is one product with the adapter's as its low rank, and no sum."""
    graph = Graph()
    x, weight = leaf(graph, "x", 5, 40), graph.tensor("weight", (30, 40), role="weight")
    down, up = graph.parameter("down", (8, 40)), graph.parameter("up", (30, 8))
    hidden = ops.matmul(x, down, transpose_b=True)
    y = ops.matmul(x, weight, transpose_b=True, low_rank=(hidden, up, 2.0))
    gradients = backward(ops.sum(y), [x, down, up])
    assert "add" not in ops_of(graph)
    assert "low_rank.0" in gradients[x].node.inputs


def test_a_residual_stream_needs_no_sums_for_its_products():
    """d(x) of x + f(x) is the product of f with the upstream gradient as its residual."""
    graph = Graph()
    x, w = leaf(graph, "x", 5, 8), graph.parameter("w", (8, 8))
    gradients = backward(ops.sum(ops.add(x, ops.matmul(x, w))), [x, w])
    assert "add" not in ops_of(graph)
    assert "residual" in gradients[x].node.inputs


def test_an_op_without_a_rule_is_an_error():
    graph = Graph()
    x = leaf(graph, "x", 3)
    (squares,) = record("sum_of_squares", page=x)
    with pytest.raises(ValueError, match="sum_of_squares has no gradient rule"):
        backward(ops.sum(squares), [x])


def test_a_constant_has_no_gradient():
    graph = Graph()
    x = leaf(graph, "x", 3)
    assert backward(ops.sum(ops.fill(x, 3.0)), [x]) == {}


def test_backward_nodes_keep_the_scope_and_layer_of_their_forward_node():
    graph = Graph()
    x = leaf(graph, "x", 3)
    with graph.within("layers.0", layer=0):
        y = ops.swish(x)
    backward(ops.sum(y), [x])
    last = graph.nodes[-1]
    assert (last.op, last.scope, last.layer, last.phase) == ("swish_grad", "layers.0", 0, "backward")
    assert (graph.scope, graph.layer, graph.phase) == ("", None, "forward")
