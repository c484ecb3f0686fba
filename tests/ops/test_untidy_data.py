"""Ops on data as real models have it: means that are not zero, a few huge elements, rows of very different size.

Zero-mean noise hides how a sum was made: its rounding errors cancel as its terms do. The bars are those of tidy data
(docs/equality.md), and what they are held against is the reference in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.graph.tensor import Tensor
from tests.helpers.cases import CASES, Case, Input, frozen, normal, param, targets, x
from tests.helpers.equivalence import build, check_program, plan_of, run_device, run_reference

pytestmark = pytest.mark.gpu


def mean(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Noise around 3: rows share a mean, as rows of a vocabulary do."""
    return normal(rng, shape) + np.float32(3)


def outliers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Noise in which one element of fifty is a hundred times as large."""
    return normal(rng, shape) * np.where(rng.random(shape) < 0.02, 100, 1).astype(np.float32)


def ranges(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Noise whose rows differ by up to a factor of a million."""
    sizes = 2.0 ** rng.uniform(-10, 10, (*shape[:-1], 1))
    return (normal(rng, shape) * sizes).astype(np.float32)


def small(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """So that logits stay below a hundred, as models keep them: exp of more multiplies what rounding did to them."""
    return normal(rng, shape) * np.float32(0.02)


KINDS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "mean": mean,
    "outliers": outliers,
    "ranges": ranges,
}
# One of each op that sums, with the longest sums among its cases.
NAMES = [
    "sum-129x65",
    "sum-4097",
    "mean-2x4097",
    "sum_rows-300x17",
    "sum_columns-3x129",
    "softmax-2x3x129",
    "rms_norm-2x3x129",
    "layer_norm-2x3x129",
    "rms_norm-many-rows",
    "norm_rope-33x2x64",
    "matmul-nn-65x33x129",
    "matmul-tn-32x64x128",
    "matmul-tt-127x63x31",
    "matmul-long-odd",
    "matmul-long-fours",
    "matmul-lora",
    "embedding-learn-repeats-param",
]


def _cross_entropy(a: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    return ops.cross_entropy(a, ids, [w])


# Sums as long as a model's width, its feed-forward layer or its vocabulary make them.
LONG = [
    Case("rms_norm-wide", (x(3, 4096), param(4096)), lambda a, w: ops.rms_norm(a, w, 1e-6)),
    Case("sum_rows-many", (x(4096, 5),), ops.sum_rows),
    Case("matmul-deep", (x(5, 8192), frozen(8192, 8)), ops.matmul),
    Case("cross_entropy-vocabulary", (x(5, 16, make=small), targets(5, 49152, 0.2), frozen(49152, 16)), _cross_entropy),
]
EVERY = {case.name: case for case in [*(CASES[name] for name in NAMES), *LONG]}


def untidy(case: Case, kind: str) -> Case:
    """The case on other data. Norms' weights stay near one, as models have them."""

    def make(spec: Input) -> Input:
        kept = spec.make is not normal or (case.op.endswith(("norm", "rope")) and len(spec.shape) == 1)
        return spec if kept else replace(spec, make=KINDS[kind])

    return replace(case, name=f"{case.name}-{kind}", inputs=tuple(make(i) for i in case.inputs))


def check(case: Case, device, kernels) -> None:
    program = build(case)
    want = {key: np.asarray(v, np.float32) if v.dtype == np.float64 else v for key, v in exact(program).items()}
    check_program(program, run_device(program, device, kernels, plan_of(case, program, device.caps, keep=True)), want)


def exact(program) -> dict[int, np.ndarray]:
    return run_reference(program, np.float64)


# Of a softmax over outliers one weight is 1, and nothing of a gradient is left to compare.
WITHOUT_A_GRADIENT = ("softmax-2x3x129", "outliers")
PAIRS = [pair for pair in product(EVERY, KINDS) if pair != WITHOUT_A_GRADIENT]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_bars_hold(name, kind, device, kernels):
    check(untidy(EVERY[name], kind), device, kernels)
