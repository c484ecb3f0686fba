"""Attention in f16, in every blocking, and with its backward pass cut into parts, against the references."""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.graph.caps import Caps
from tests.helpers.cases import CASES, Case, segment_starts, x
from tests.helpers.equivalence import build, expected, fault, needs, plan_of, run_device, run_reference, size_of
from tests.ops.test_kernels import check_on

pytestmark = pytest.mark.gpu
attention_ops = importlib.import_module("entrenar_gpu.ops.attention")  # `ops.attention` is the function
grad_ops = importlib.import_module("entrenar_gpu.ops.attention_grad")

# Rounding the operands of a product costs 2^-12 to 2^-11 of each, and adding 32 products in f16 as much again
# (docs/attention.md); less would mean that nothing was rounded.
F16 = (5e-5, 2e-3)
WORST = 4e-3  # of the largest element


def errors_in_f16(name: str, device: Any, kernels: Any, caps: Caps | None = None) -> dict[str, tuple[float, float]]:
    """(relative Frobenius error, worst element against the largest) of each output of attention's ops."""
    case = CASES[name]
    narrow = Case(name, case.inputs, functools.partial(case.apply, precision="f16"))
    program = build(narrow)
    want = run_reference(program)
    got = run_device(program, device, kernels, plan_of(narrow, program, caps or device.caps, keep=True))
    found = {}
    for node in program.graph.nodes:
        for number, tensor in enumerate(node.outputs if node.op.startswith("attention") else ()):
            exact, error = want[tensor.id], np.abs(got[tensor.id].astype(np.float64) - want[tensor.id])
            size = size_of(node, want, {}, exact)
            found[f"{node.op} {number}"] = (np.linalg.norm(error) / np.linalg.norm(size), error.max() / size.max())
    return found


def check_f16(name: str, device: Any, kernels: Any, caps: Caps | None = None) -> None:
    needs(device, "f16")
    for output, (error, worst) in errors_in_f16(name, device, kernels, caps).items():
        assert F16[0] <= error <= F16[1], f"{output}: {error:.1e}"
        assert worst <= WORST, f"{output}: worst element {worst:.1e}"


F16_CASES = ["short", "packed-across", "packed-long", "four-tiles-and-one", "head-6", "head-80", "head-96", "head-128"]
F16_CASES += ["window-long", "window-softcap-scale"]


@pytest.mark.parametrize("name", F16_CASES)
def test_f16_is_off_by_its_rounding(name, device, kernels):
    check_f16(f"attention-{name}", device, kernels)


def test_f16_fits_default_limits(device, kernels):
    check_f16("attention-head-128", device, kernels, replace(device.caps, max_workgroup_bytes=16 << 10))


def test_without_f16_nothing_is_rounded(limited_device, limited_kernels):
    for output, (error, _) in errors_in_f16("attention-short", limited_device, limited_kernels).items():
        assert error <= 8e-6, output


@pytest.mark.parametrize(
    ("shader", "old", "new", "name"),
    [
        ("attention", "step = 0u;", "step = 1u;", "head-96"),
        ("attention", "o0_0 += vec4<f32>(half0_0)", "o0_0 = vec4<f32>(half0_0)", "four-tiles-and-one"),
        ("attention_dscores", "/ 4u * 2u", "/ 4u * 3u", "head-96"),
        ("attention_grad", "at_a0 + 1u", "at_a0", "packed-across"),
    ],
)
def test_a_fault_in_f16_is_caught(shader, old, new, name, device, kernels):
    with fault(shader, old, new), pytest.raises(AssertionError, match="attention"):
        check_f16(f"attention-{name}", device, kernels)


@pytest.mark.parametrize("blocking", attention_ops.BLOCKINGS, ids=repr)
@pytest.mark.parametrize("name", ["packed-across", "head-96", "head-128"])
def test_every_blocking_that_may_be_chosen(name, blocking, device, kernels, monkeypatch):
    monkeypatch.setattr(attention_ops, "BLOCKINGS", (blocking,))
    check_on(CASES[f"attention-{name}"], device, kernels, replace(device.caps, max_workgroup_bytes=48 << 10))


def test_blockings_follow_workgroup_memory():
    chosen = {}
    for name, kibibytes in [("head-128", 16), ("head-128", 32), ("head-128", 48), ("head-96", 48), ("head-256", 16)]:
        program, _ = expected(f"attention-{name}")
        node = next(n for n in program.graph.nodes if n.op == "attention")
        blocking = attention_ops._blocking(node, replace(Caps(), max_workgroup_bytes=kibibytes << 10))
        chosen[name, kibibytes] = [blocking[key] for key in ("BQ", "CE", "CV")]
    assert chosen == {
        ("head-128", 16): [32, 16, 8],
        ("head-128", 32): [64, 32, 16],
        ("head-128", 48): [64, 64, 32],
        ("head-96", 48): [64, 32, 16],
        ("head-256", 16): [32, 16, 4],
    }


def test_some_blocking_fits_default_limits_at_any_size():
    for e in range(1, attention_ops.LONGEST_HEAD + 1):
        smallest = attention_ops._blocked(e, attention_ops.BLOCKINGS[-1])
        assert attention_ops._elements(e, smallest) * 4 <= Caps().max_workgroup_bytes
        for f16 in (False, True):
            assert grad_ops._steps(e, f16) * (64 + attention_ops.padded(e)) * (2 if f16 else 4) <= 16 << 10


def test_heads_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match="attention: heads of 264 columns, above 256"):
        build(
            Case(
                "long",
                (x(3, 264), x(3, 264), x(3, 264), segment_starts([[3]])),
                functools.partial(ops.attention, rows=1, heads=1, kv_heads=1),
            )
        )


def test_inner_loops_written_out_as_for_a_gpu(device, kernels):
    check_on(CASES["attention-short"], device, kernels, replace(device.caps, software=False))


# Case, blocks of P that the scratch holds of one key/value head, and how many parts that makes of its problem.
PARTS = [
    ("tile", 1, 2),  # rows apart; offsets of bindings
    ("packed-long", 6, 2),  # rows apart; odd lengths, so that offsets are constants
    ("short", 1, 4),  # heads apart
    ("packed-across", 1, 2),  # queries apart, one block too long for the scratch
    ("four-tiles-and-one", 3, 2),  # queries apart, keys met by both
]


def check_parts(name: str, blocks: int, parts: int, device: Any, kernels: Any, monkeypatch: Any) -> None:
    case = CASES[f"attention-{name}"]
    program, _ = expected(case.name)
    node = next(n for n in program.graph.nodes if n.op == "attention_grad")
    group = node.attrs["heads"] // node.attrs["kv_heads"]
    monkeypatch.setattr(grad_ops, "SCRATCH_BYTES", blocks * group * 2 * 64 * 64 * 4)
    plan = plan_of(case, program, device.caps, keep=True)
    shaders = [launch.shader for step in plan.steps[case.name] for launch in step.launches]
    assert shaders.count("attention_dscores") == shaders.count("attention_grad") == parts
    check_on(case, device, kernels)


@pytest.mark.parametrize(("name", "blocks", "parts"), PARTS)
def test_parts_of_the_backward_pass_add_up(name, blocks, parts, device, kernels, monkeypatch):
    check_parts(name, blocks, parts, device, kernels, monkeypatch)


@pytest.mark.parametrize(
    ("shader", "old", "new", "part"),
    [
        ("attention_grad", "vec4<f32>(), dk[", "vec4<f32>(), 0.5 * dk[", PARTS[4]),
        ("attention_dscores", "- 3u + j", "- 2u + j", PARTS[4]),
        ("attention_grad", "2128u + ((row_start", "2120u + ((row_start", PARTS[1]),
        ("attention_group_sum", "dk[1064u + at]", "dk[at]", PARTS[1]),
    ],
)
def test_a_fault_in_the_parts_is_caught(shader, old, new, part, device, kernels, monkeypatch):
    with fault(shader, old, new), pytest.raises(AssertionError, match="attention"):
        check_parts(*part, device, kernels, monkeypatch)
