"""The references' gradient rules against central differences, all in float64, with the op mid-graph.

The objective is sum(upstream * op(1.25 x)) with random `upstream`, so a rule that forgets its upstream gradient fails.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.cases import CASES, Case
from tests.helpers.equivalence import Program, build, run_reference

EPSILON = 1e-5
BAR = 1e-6  # of the slope plus the largest gradient (docs/equality.md); the truncation error is about 1e-10
DIFFERENTIATED = [c.name for c in CASES.values() if any(i.role in ("temp", "param") for i in c.inputs)]


def objective(program: Program, arrays: dict[str, np.ndarray]) -> float:
    values = run_reference(program, np.float64, **arrays)
    return float((values[program.output.id] * program.arrays["upstream"]).sum())


def float64_program(case: Case) -> Program:
    program = build(case)
    for leaf in program.leaves:  # rules add to gradients that persist: from zero here
        if leaf.grad is not None:
            program.arrays[leaf.grad.name] = np.zeros(leaf.shape)
    return program


def directions(rng: np.random.Generator, slopes: np.ndarray) -> list[np.ndarray]:
    """Two random directions over all elements, then single elements: that of the largest slope and three others."""
    found = [rng.standard_normal(slopes.shape) / np.sqrt(slopes.size) for _ in range(2)]
    for place in (np.abs(slopes).argmax(), *rng.integers(slopes.size, size=3)):
        one = np.zeros(slopes.shape)
        one.flat[place] = 1
        found.append(one)
    return found


def check_gradients(case: Case, rng: np.random.Generator, error: float = 0.0) -> None:
    """Raises AssertionError where a gradient, times 1 + `error`, is not the slope of the objective."""
    program = float64_program(case)
    analytic = run_reference(program, np.float64)
    assert set(program.gradients) == set(program.leaves)
    program.graph.nodes = [node for node in program.graph.nodes if node.phase == "forward"]
    for leaf, gradient in program.gradients.items():
        slopes = analytic[gradient.id] * (1 + error)
        assert slopes.dtype == np.float64
        assert slopes.shape == leaf.shape
        at = program.arrays[leaf.name].astype(np.float64)
        for direction in directions(rng, slopes):
            ends = [objective(program, {leaf.name: at + sign * EPSILON * direction}) for sign in (1, -1)]
            measured, ruled = (ends[0] - ends[1]) / (2 * EPSILON), (slopes * direction).sum()
            assert abs(measured - ruled) <= BAR * (abs(measured) + np.abs(slopes).max() + 1e-3), f"{case.name}: {leaf}"


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradient_rules_equal_central_differences(name, rng):
    check_gradients(CASES[name], rng)


@pytest.mark.parametrize("name", {CASES[name].op: name for name in reversed(DIFFERENTIATED)}.values())
def test_a_gradient_that_is_off_by_a_few_times_the_bar_is_caught(name, rng):
    with pytest.raises(AssertionError, match=name):
        check_gradients(CASES[name], rng, error=4 * BAR)
