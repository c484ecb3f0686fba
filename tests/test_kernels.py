"""Every kernel on the device against NumPy: forward and backward, in the middle of a program."""

from __future__ import annotations

import pytest

from tests.cases import CASES
from tests.equivalence import check_program, expected, plan_of, run_device

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_equals_the_reference(name, device, kernels):
    program, want = expected(name)
    got = run_device(program, device, kernels, plan_of(CASES[name], program, device.caps, keep=True))
    outputs = [t for node in program.graph.nodes for t in node.outputs]
    assert {t.id for t in outputs if t.updates is None} <= got.keys()
    check_program(program, got, want)
