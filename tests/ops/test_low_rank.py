"""Adapters' products: every layout and rank, sizes around a workgroup's, gradients added where they lie."""

from __future__ import annotations

import functools

import pytest

from entrenar_gpu import ops
from tests.helpers.cases import Case, frozen, matmul_shape, param, x
from tests.helpers.equivalence import build, check_program, fault, plan_of, run_device, run_reference

pytestmark = pytest.mark.gpu

# M, N, K of a forward product and whether its second operand is transposed. The gradients of a parameter there are
# products over the rows, of which one has the rank first and one last; those of x are products of the other layout.
SIZES = {
    "down": (17, 16, 36, True),
    "up": (17, 16, 36, False),
    "one-row": (1, 8, 1028, True),
    "rank-4": (33, 4, 64, True),
    "rank-64": (9, 64, 68, True),
    "rank-64-up": (9, 64, 68, False),
    "long": (130, 16, 1100, True),
    "many-rows": (1501, 16, 68, True),  # slices of 301 rows, the last of 297
    "many-rows-up": (1501, 16, 68, False),
}

# (shader, text of it, fault, a size that must notice)
FAULTS = [
    ("low_rank", "k += 128u", "k += 129u", "long"),
    ("low_rank", "t += 128u", "t += 129u", "long"),
    ("low_rank", "half >= 4u", "half > 4u", "long"),
    ("low_rank", "min(row + 0u, 16u)", "min(row + 0u, 15u)", "down"),
    ("low_rank", "at < 17u", "at < 16u", "down"),
    ("low_rank", "n < 9u", "n < 8u", "down"),
    ("low_rank", "b0_3 = b[(own * 4u + 3u)", "b0_3 = b[(own * 4u + 2u)", "down"),
    ("low_rank", "p0.y * x0", "p0.x * x0", "long"),
    ("low_rank", "* 16u + r] += sum.w", "* 16u + r] = sum.w", "up"),
    ("low_rank", "f32(0.7)", "f32(0.70001)", "rank-64"),
    ("low_rank", "z * 301u + 301u", "z * 301u + 300u", "many-rows"),
    ("low_rank", "z * 272u + r", "z * 271u + r", "many-rows"),
]


def case(name: str) -> Case:
    m, n, k, transposed = SIZES[name]
    a, b = matmul_shape(m, n, k, False, transposed)
    return Case(f"matmul-{name}", (x(*a), param(*b)), functools.partial(ops.matmul, transpose_b=transposed, alpha=0.7))


def adapted() -> Case:
    """x W^T + 2 (x A^T) B^T, all four kinds of product in one gradient."""

    def lora(a, weight, down, up):
        return ops.matmul(a, weight, transpose_b=True, low_rank=(ops.matmul(a, down, transpose_b=True), up, 2.0))

    return Case("matmul-lora", (x(37, 40), frozen(36, 40), param(8, 40), param(36, 8)), lora)


def check(made: Case, device, kernels, least: int) -> None:
    program = build(made)
    plan = plan_of(made, program, device.caps, keep=True)
    shaders = [launch.shader for step in plan.steps[made.name] for launch in step.launches]
    assert shaders.count("low_rank") >= least, shaders
    check_program(program, run_device(program, device, kernels, plan), run_reference(program))


@pytest.mark.parametrize("name", SIZES)
def test_every_layout_and_rank(name, device, kernels):
    check(case(name), device, kernels, 2)


def test_a_whole_adapter(device, kernels):
    check(adapted(), device, kernels, 4)


def test_on_a_device_with_default_limits(limited_device, limited_kernels):
    check(adapted(), limited_device, limited_kernels, 4)


@pytest.mark.parametrize(("shader", "old", "new", "name"), FAULTS)
def test_planted_faults_are_noticed(shader, old, new, name, device, kernels):
    with fault(shader, old, new), pytest.raises(AssertionError, match="matmul"):
        check(case(name), device, kernels, 2)
