"""Dropout's masks: Philox as published, a function of its counters alone, and of the stated probability."""

from __future__ import annotations

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.executors.numpy_executor import NumpyExecutor
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.ops.dropout import philox

# Known answers for Philox4x32-10 from kat_vectors of Random123 1.14: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_words(counter, key, result):
    assert tuple(int(word) for word in philox(counter, key)) == result


def masked(rng_words: tuple[int, int, int], probability: float, key: int = 3, size: int = 100_000) -> np.ndarray:
    graph = Graph("g")
    x, words = graph.tensor("x", (size,)), graph.tensor("words", (3,), "u32")
    y = ops.dropout(x, words, probability, key)
    executor = NumpyExecutor({"g": graph}, keep=(y,))
    executor.write("x", np.ones(size))
    executor.write("words", np.array(rng_words))
    executor.run("g")
    return executor.read_temporary(y)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.95])
def test_the_stated_share_is_dropped_and_the_mean_kept(probability):
    """Of 100,000 draws the share is within five standard deviations."""
    y = masked((1, 2, 3), probability)
    deviation = np.sqrt(probability * (1 - probability) / y.size)
    assert abs((y == 0).mean() - probability) < 5 * deviation
    np.testing.assert_array_equal(np.unique(y), np.array([0, np.float32(1 / (1 - probability))], np.float32))


def test_nothing_is_dropped_at_probability_zero():
    assert (masked((1, 2, 3), 0.0) == 1).all()


@pytest.mark.parametrize(
    "other", [{"rng_words": (2, 2, 3)}, {"rng_words": (1, 3, 3)}, {"rng_words": (1, 2, 4)}, {"key": 4}]
)
def test_each_of_seed_step_micro_batch_and_node_gives_a_mask_of_its_own(other):
    """Independent masks at one half agree on half of the elements."""
    arguments = {"rng_words": (1, 2, 3), "probability": 0.5} | other
    same = (masked((1, 2, 3), 0.5) == masked(**arguments)).mean()
    assert abs(same - 0.5) < 5 * 0.5 / np.sqrt(100_000)


@pytest.mark.gpu
@pytest.mark.parametrize("words", [(0, 0, 0), (123, 7, 1), (2**32 - 1, 2**31, 65_537)])
def test_the_device_draws_the_same_mask(words, device, kernels):
    graph = Graph("g")
    x = graph.tensor("x", (100_000,))
    y = ops.dropout(x, graph.tensor("words", (3,), "u32"), 0.3, 9)
    replay = Replay(device, make_plan({"g": graph}, device.caps), kernels)
    replay.write("x", np.ones(100_000))
    replay.write("words", np.array(words, np.uint32))
    replay.run("g")
    np.testing.assert_array_equal(replay.read_temporary(y), masked(words, 0.3, 9))
    replay.close()
