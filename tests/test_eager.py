"""Eager use: values, gradients, and both ways to compute them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from entrenar_gpu import eager, ops
from entrenar_gpu.errors import UserError
from entrenar_gpu.graph.tensor import Graph, Node, Tensor
from tests import ROOT


@pytest.fixture(params=["numpy", pytest.param("gpu", marks=pytest.mark.gpu)], autouse=True)
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    device = None
    if request.param == "gpu":
        device = request.getfixturevalue("device"), request.getfixturevalue("kernels")
    monkeypatch.setattr(eager, "_device", lambda: device)


def test_arithmetic(rng):
    a, b = rng.standard_normal((3, 5)).astype(np.float32), rng.standard_normal((5, 4)).astype(np.float32)
    x, w = eager.tensor(a), eager.tensor(b)
    np.testing.assert_allclose((x @ w).numpy(), a @ b, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal((x + x - x * 0.5).numpy(), a + a - a * np.float32(0.5))
    np.testing.assert_allclose((x * x).mean().numpy(), [np.square(a).mean()], rtol=1e-6)
    np.testing.assert_array_equal(x.numpy(), a)


def test_gradients_of_a_small_model(rng):
    a, b = rng.standard_normal((7, 5)), rng.standard_normal((4, 5))
    x, w = eager.tensor(a), eager.tensor(b, requires_grad=True)
    loss = ops.relu(ops.matmul(x, w, transpose_b=True)).sum() * 0.25
    loss.backward()
    y = a @ b.T
    np.testing.assert_allclose(loss.numpy(), [0.25 * np.maximum(y, 0).sum()], rtol=1e-5)
    np.testing.assert_allclose(w.grad.numpy(), 0.25 * (y > 0).T @ a, rtol=1e-4, atol=1e-5)
    assert x.grad is None


def test_a_leaf_used_twice_gets_both_gradients():
    x = eager.tensor(np.array([1.0, -2.0, 3.0]), requires_grad=True)
    (x * x + x).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [3, -3, 7])


def test_the_rows_of_an_embedding_that_were_looked_up_get_gradients(rng):
    table = eager.tensor(rng.standard_normal((6, 3)), requires_grad=True)
    ids = np.array([4, 1, 4], np.uint32)
    order = np.argsort(ids, kind="stable").astype(np.uint32)
    ops.embedding(eager.tensor(ids), [table], eager.tensor(order)).sum().backward()
    np.testing.assert_array_equal(table.grad.numpy(), np.array([[0], [1], [0], [0], [2], [0]]) * np.ones(3))


def test_scalars_become_tensors_of_one_element():
    x = eager.tensor(2.0, requires_grad=True)
    (x * x).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [4])


def test_arrays_that_no_tensor_holds_are_refused():
    with pytest.raises(UserError, match="complex128"):
        eager.tensor(np.array([1j]))


def box(*shape: int) -> np.ndarray:
    """Values in (0.5, 2), no two alike."""
    return np.random.default_rng(7).uniform(0.5, 2, shape).astype(np.float32)


EXPRESSIONS: dict[str, Callable[[Any], Any]] = {
    "number * x": lambda x: 2.0 * x,
    "x - number": lambda x: x - 1.0,
    "number - x": lambda x: 1 - x,
    "x / number": lambda x: x / 3,
    "number / x": lambda x: 1 / x,
    "numpy's number * x": lambda x: np.float32(0.3) * x,
    "-x": lambda x: -x,
    "x / x": lambda x: x / x[::-1],
    ".T": lambda x: x.T,
    "larger + smaller": lambda x: x + x[0],
    "smaller - larger": lambda x: x[0] - x,
    "smaller / larger": lambda x: x[:, :1] / x,
    "outer": lambda x: x[:, :, :1] * x[:1, :1],
    "both repeated": lambda x: x[:, :1, :1] - x[:1, :, :1],
    "an index": lambda x: x[1],
    "an index from the end": lambda x: x[-1, 2],
    "slices": lambda x: x[:, 1:3, ::2],
    "slices backwards": lambda x: x[::-1, 2:0:-1, -1:-4:-2],
    "dots": lambda x: x[..., 0],
    "new axes": lambda x: x[None, 0, :, None],
    "sum over an axis": lambda x: x.sum(1),
    "sum over axes": lambda x: x.sum((0, 2), keepdims=True),
    "mean over an axis": lambda x: x.mean(-1),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_mean_what_they_mean_in_numpy(name):
    """Values, and gradients by central differences in float64 of the same expression over NumPy's arrays."""
    f, values = EXPRESSIONS[name], box(2, 3, 5)
    x = eager.tensor(values, requires_grad=True)
    y = f(x)
    want = f(values)
    assert y.shape == want.shape
    np.testing.assert_allclose(y.numpy(), want, rtol=1e-6)
    weights = np.random.default_rng(1).standard_normal(want.shape).astype(np.float32)
    (y * eager.tensor(weights)).sum().backward()
    exact, step = values.astype(np.float64), 1e-5
    gradient = np.zeros(values.shape)
    for place in np.ndindex(values.shape):
        up, down = exact.copy(), exact.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = ((f(up) - f(down)) * weights).sum() / (2 * step)
    np.testing.assert_allclose(x.grad.numpy(), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("left", "right"), [((3, 5), (5, 4)), ((5,), (5, 4)), ((3, 5), (5,)), ((2, 3, 5), (5, 4))])
def test_matmuls_of_vectors_matrices_and_batches(left, right):
    a, b = box(*left), box(*right)
    x, y = eager.tensor(a, requires_grad=True), eager.tensor(b, requires_grad=True)
    np.testing.assert_allclose((x @ y).numpy(), a @ b, rtol=1e-5)
    (x @ y).sum().backward()
    ones = np.ones_like(a @ b)
    np.testing.assert_allclose(x.grad.numpy(), ones @ b.T if b.ndim == 2 else ones[..., None] * b, rtol=1e-5)


def test_a_single_element_is_a_float():
    assert float(eager.tensor([[3.5]])) == 3.5
    with pytest.raises(TypeError, match=r"float\(leaf.*: it has 2 elements"):
        float(eager.tensor([1.0, 2.0]))


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "text": (lambda x: x + "a", r"leaf.*f32\[2, 3\] \+ 'a' \(str\)"),
    "nothing": (lambda x: x - None, r"f32\[2, 3\] - None"),
    "nothing on the left": (lambda x: None - x, r"None \(NoneType\) - leaf.*f32\[2, 3\]"),
    "complex": (lambda x: 1j * x, r"1j \(complex\) \* leaf"),
    "infinite": (lambda x: x * float("inf"), r"f32\[2, 3\] \* inf"),
    "beyond f32": (lambda x: x + 1e39, r"f32\[2, 3\] \+ 1e\+39"),
    "an array": (lambda x: x + np.ones(3), r"f32\[2, 3\] \+ ndarray:float64\[3\]: .* tensor\(\.\.\.\)"),
    "an array on the left": (lambda x: np.ones(3) + x, r"ndarray:float64\[3\] \+ leaf"),
    "shapes": (lambda x: x * eager.tensor(np.ones(2)), r"f32\[2, 3\] \* leaf.*f32\[2\]"),
    "integers": (lambda x: x + eager.tensor([1, 2, 3]), r"f32\[2, 3\] \+ leaf.*i32\[3\]"),
    "a number in a matmul": (lambda x: x @ 2.0, r"f32\[2, 3\] @ 2.0"),
    "inner lengths": (lambda x: x @ x, r"f32\[2, 3\] @ leaf.*f32\[2, 3\]"),
    "another graph": (lambda x: x + Graph("g").tensor("t", (2, 3)), r"f32\[2, 3\] \+ t:f32\[2, 3\]"),
    "an index of text": (lambda x: x["a"], r"f32\[2, 3\]\['a' \(str\)\]"),
    "an index of lists": (lambda x: x[[0, 1]], r"an index is made of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_operands_are_named_and_poison_nothing(name):
    """And before anything is recorded: what was computed with the same tensors before and after is right."""
    apply, message = WRONG[name]
    x = eager.tensor(box(2, 3), requires_grad=True)
    half = x * 0.5
    with pytest.raises(TypeError, match=message):
        apply(x)
    (half * x).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), box(2, 3))
    assert eager._tape.nodes == []


def test_what_is_not_there_is_an_index_error():
    x = eager.tensor(box(2, 3))
    for key in (2, (0, -4), (0, 0, 0), (..., ...), slice(1, 1)):
        with pytest.raises(IndexError, match=r"f32\[2, 3\]"):
            x[key]
    assert [row.shape for row in x] == [(3,), (3,)]
    with pytest.raises(ZeroDivisionError):
        x / 0


def test_gradients_add_up_as_in_pytorch():
    x = eager.tensor([1.0, -2.0], requires_grad=True)
    loss = (x * x).sum()
    loss.backward()
    np.testing.assert_array_equal(x.grad.numpy(), [2, -4])
    loss.backward()
    (3.0 * x).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [7, -5])
    x.grad = None
    loss.backward()
    np.testing.assert_array_equal(x.grad.numpy(), [2, -4])
    with pytest.raises(TypeError, match="only of a tensor of one element"):
        (x * x).backward()
    with pytest.raises(TypeError, match="depends on no tensor with requires_grad"):
        eager.tensor(1.0).backward()


def test_a_value_that_is_known_does_not_cut_off_gradients():
    x = eager.tensor([3.0], requires_grad=True)
    y = x * x
    y.numpy()
    (y * x).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [27])


def test_arrays_are_copied_in_and_out():
    values = box(3)
    x = eager.tensor(values)
    values[0] = 9
    got = x.numpy()
    got[1] = 9
    y = x * 2
    y.numpy()[2] = 9
    np.testing.assert_array_equal(x.numpy(), box(3))
    np.testing.assert_array_equal(y.numpy(), 2 * box(3))
    z = x
    z += 1.0
    np.testing.assert_array_equal(x.numpy(), box(3))


def test_what_no_tensor_can_hold_is_refused():
    for array, message in [
        (np.zeros((0, 3)), "no elements"),
        ([2**31], "beyond 32 bits"),
        (["a"], "not supported"),
    ]:
        with pytest.raises(UserError, match=message):
            eager.tensor(array)
    with pytest.raises(UserError, match="gradients are of floats"):
        eager.tensor([1, 2], requires_grad=True)
    with pytest.raises(TypeError, match="a tensor of the traced graph 'g' has no value"):
        Graph("g").tensor("t", (2,)).numpy()


def alive() -> dict[str, int]:
    """Tensors, nodes and graphs that somebody holds, and the bytes on the device."""
    gc.collect()
    found = {kind.__name__: 0 for kind in (Tensor, Node, Graph)}
    for thing in gc.get_objects():
        if isinstance(thing, (Tensor, Node, Graph)):
            found[type(thing).__name__.strip("_").replace("Tape", "Graph")] += 1
    device = eager._device()
    return found | {"bytes": 0 if device is None else device[0].allocated_bytes}


def test_a_loop_of_steps_leaves_nothing_behind(monkeypatch):
    """Nor does it plan anew, or compile a shader for each learning rate: a few hundred steps are as good as three."""
    planned: list[int] = []
    executor = eager._executor
    monkeypatch.setattr(eager, "_executor", lambda graph: planned.append(1) or executor(graph))
    inputs, targets = eager.tensor(box(4, 3)), eager.tensor(box(4, 1))
    w, moving = eager.tensor(np.zeros((3, 1)), requires_grad=True), eager.tensor(0.0)
    before, losses = {}, []
    for step in range(300):
        difference = inputs @ w - targets
        loss = (difference * difference).mean()
        loss.backward()
        losses.append(float(loss))
        w = eager.tensor((w - (0.2 / (1 + step)) * w.grad).numpy(), requires_grad=True)
        moving = 0.9 * moving + 0.1 * step  # a tensor made of itself: known, it holds on to nothing
        moving.numpy()
        if step == 3:
            before = alive()
            made = len(planned)
    assert alive() == before
    assert len(planned) == made
    assert losses[-1] < losses[0]


def test_the_page_on_tensors_runs_as_printed(capsys):
    page = (ROOT / "docs" / "eager.md").read_text()
    blocks = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    exec("\n".join(blocks), {})
    assert "[[" in capsys.readouterr().out
