"""Eager use: values, gradients, and both ways to compute them."""

from __future__ import annotations

import numpy as np
import pytest

from entrenar_gpu import eager, ops
from entrenar_gpu.errors import UserError


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
