"""Activations as binary16 with a power of two a row: 11 bits whatever the row's size, and nothing overflows."""

from __future__ import annotations

import numpy as np
import pytest

from entrenar_gpu.compiler.plan import PlanOptions, make_plan
from entrenar_gpu.executors.numpy_executor import run_node
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.ops.half import from_half, half_bytes, halvable, to_half
from tests.helpers.equivalence import fault

SHAPES = [(1, 2), (5, 6), (3, 7, 4), (130, 64), (17, 130), (9, 1028)]

FAULTS = [
    ("half", "- 14, 1", "- 13, 1"),
    ("half", "max(pair.x, pair.y)", "pair.x"),
    ("half", "value.zw", "value.xy"),
    ("half", "i / 257u", "i / 256u"),
]


def rows(shape: tuple[int, ...]) -> np.ndarray:
    """Rows of sizes from 1e-30 to 1e30, one of zeros, each with elements of very different sizes."""
    rng = np.random.default_rng(list(shape))
    values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 0, shape)
    values *= 10.0 ** np.linspace(-30, 30, shape[-2])[:, None]
    values[..., -1, :] *= shape[-2] < 3
    return values.astype(np.float32)


def program(shape: tuple[int, ...]) -> tuple[Graph, list]:
    graph = Graph("g")
    codes, scales = to_half(graph.tensor("x", shape))
    return graph, [codes, scales, from_half(codes, scales)]


def on_host(graph: Graph, tensors: list, x: np.ndarray) -> list[np.ndarray]:
    values = {graph.persistents["x"].id: x}
    for node in graph.nodes:
        run_node(node, values)
    return [values[t.id] for t in tensors]


def on_device(graph: Graph, tensors: list, x: np.ndarray, device, kernels) -> list[np.ndarray]:
    replay = Replay(device, make_plan({"g": graph}, device.caps, PlanOptions(keep=True)), kernels)
    try:
        replay.write("x", x)
        replay.run("g")
        return [replay.read_temporary(t) for t in tensors]
    finally:
        replay.close()


def check(x: np.ndarray, codes: np.ndarray, scales: np.ndarray, back: np.ndarray) -> None:
    largest = np.abs(x).max(axis=-1).reshape(-1)
    assert (np.exp2(np.rint(np.log2(scales))) == scales).all(), "scales are powers of two"
    normal = largest > 1e-30
    assert (largest / scales < 2**15).all()
    assert (largest[normal] / scales[normal] >= 2**14).all()
    assert np.isfinite(codes.astype(np.float32)).all()
    # Half a unit in the last of 11 bits, a whole one where a device rounds towards zero; below 2^-28 of the row's
    # largest element binary16 has ever fewer bits, the last worth 2^-24 of the scale.
    bound = np.abs(x) * 2.0**-10 + 2.0**-24 * scales.reshape(x.shape[:-1])[..., None]
    assert (np.abs(back.astype(np.float64) - x) <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_eleven_bits_in_rows_of_any_size(shape):
    graph, tensors = program(shape)
    check(rows(shape), *on_host(graph, tensors, rows(shape)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_the_device_does_as_the_reference(shape, device, kernels):
    graph, tensors = program(shape)
    got, want = on_device(graph, tensors, rows(shape), device, kernels), on_host(graph, tensors, rows(shape))
    check(rows(shape), *got)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[2], want[2], rtol=2.0**-10, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("shader", "old", "new"), FAULTS)
def test_planted_faults_are_noticed(shader, old, new, device, kernels):
    shape = SHAPES[-1]
    graph, tensors = program(shape)
    with fault(shader, old, new), pytest.raises(AssertionError):
        check(rows(shape), *on_device(graph, tensors, rows(shape), device, kernels))


def test_what_is_halved_and_what_it_takes():
    graph = Graph("g")
    tensor = graph.tensor("x", (3, 5, 8))
    assert halvable(tensor)
    assert half_bytes(tensor) == sum(t.nbytes for t in to_half(tensor)) == 3 * 5 * (8 * 2 + 4)
    assert not halvable(graph.tensor("odd", (3, 5)))
    assert not halvable(graph.tensor("one row", (8,)))
    assert not halvable(graph.tensor("codes", (3, 8), "u32"))
