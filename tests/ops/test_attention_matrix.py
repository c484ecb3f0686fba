"""Attention on matrix units, with their builtins emulated in plain WGSL: staging, masks, rescaling, edges, parts.

No software adapter has such units: `make gpu-test` runs the real ones.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.gpu import kernel
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.graph.caps import Caps, MatrixConfig
from entrenar_gpu.ops import attention_grad
from entrenar_gpu.ops.attention_matrix import BLOCK, matrices_for
from tests.helpers.cases import Case, segment_starts, x
from tests.helpers.equivalence import build, fault, needs, plan_of, run_device, run_reference
from tests.ops.test_matrix_units import AMD, APPLE, INTEL, NVIDIA

# Operands are rounded to f16, 2^-12 to 2^-11 of each, weights and dscores once more; sums are f32.
ERROR, WORST = (2e-5, 1e-3), 3e-3


def case_of(lengths: list[list[int]], heads: int, kv_heads: int, e: int, size: float = 1.0, **options: Any) -> Case:
    """Rows of packed segments of these lengths; queries and keys are `size` times normal deviates."""
    tokens = sum(map(sum, lengths))
    apply = functools.partial(
        ops.attention, rows=len(lengths), heads=heads, kv_heads=kv_heads, precision="f16", **options
    )

    def scaled(q: Any, k: Any, v: Any, starts: Any) -> Any:
        return apply(ops.scale(q, size), ops.scale(k, size), v, starts)

    inputs = (x(tokens, heads * e), x(tokens, kv_heads * e), x(tokens, kv_heads * e), segment_starts(lengths))
    return Case(f"attention-{lengths}-{e}-{size}-{options}", inputs, scaled)


def errors(case: Case, device: Any, kernels: KernelCache, caps: Caps) -> dict[str, tuple[float, float]]:
    """(relative Frobenius error, worst element against the largest) of each output of attention's ops."""
    program = build(case)
    want, plan = run_reference(program), plan_of(case, program, caps, keep=True)
    shaders = {launch.shader for step in plan.steps[case.name] for launch in step.launches}
    assert {"attention_matrix", "attention_dscores_matrix", "attention_grad_matrix"} <= shaders
    got = run_device(program, device, kernels, plan)
    found = {}
    for node in program.graph.nodes:
        for number, tensor in enumerate(node.outputs if node.op in ("attention", "attention_grad") else ()):
            exact = want[tensor.id]
            error = np.abs(got[tensor.id].astype(np.float64) - exact)
            found[f"{node.op} {number}"] = (
                np.linalg.norm(error) / np.linalg.norm(exact),
                error.max() / np.abs(exact).max(),
            )
    return found


def caps_with(device: Any, config: MatrixConfig, kibibytes: int) -> Caps:
    # Emulation keeps queries in workgroup memory too: so much less is planned with.
    return replace(device.caps, matrices=(config,), f16=True, max_workgroup_bytes=kibibytes << 10)


CASES = {
    "one block": (case_of([[64]], 2, 1, 16), NVIDIA, 20),
    "edges, packed": (case_of([[70], [9, 61]], 2, 2, 16), NVIDIA, 20),
    "several blocks": (case_of([[200]], 2, 1, 16), NVIDIA, 20),
    "sixteen keys at a time": (case_of([[100, 40]], 1, 1, 32), NVIDIA, 19),
    "maxima that grow": (case_of([[130, 62]], 1, 1, 16, 2.5), NVIDIA, 20),
    "a window": (case_of([[150, 20]], 1, 1, 16, window=40, scale=0.3), NVIDIA, 20),
    "8x16x16": (case_of([[90, 40]], 2, 1, 16), INTEL, 24),
    "subgroups of 64": (case_of([[65]], 1, 1, 16), AMD, 24),
}


# On large cards a workgroup of the products owns two blocks: of an odd number; in launches of as many blocks as scratch
# has room for, here one query block or, where the row before left its own there, a row whose segments leave one of a
# pair out.
LARGE = {
    "two blocks": (case_of([[200]], 2, 1, 16), NVIDIA, 24),
    "two of three, a window": (case_of([[150, 20]], 1, 1, 32, window=40, scale=0.3), NVIDIA, 24),
    "two, in parts": (case_of([[180]], 2, 1, 16), NVIDIA, 24),
    "two, a row at a time": (case_of([[190], [64, 126]], 1, 1, 16), NVIDIA, 24),
}


def check(name: str, device: Any, kernels: KernelCache) -> None:
    needs(device, "f16")
    case, config, kibibytes = (CASES | LARGE)[name]
    caps = caps_with(device, config, kibibytes)
    if name in LARGE:
        caps = replace(caps, flops_per_second=1e14)
        assert caps.large
    # Scores of 6 times the size are off by 6 times as much, and so are weights.
    slack = 6 if name == "maxima that grow" else 1
    blocks = {"two, in parts": 2, "two, a row at a time": 6}.get(name)  # that scratch has room for
    room = blocks * 2 * BLOCK * BLOCK * 2 if blocks else attention_grad.SCRATCH_BYTES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_grad, "SCRATCH_BYTES", room)
        found = errors(case, device, kernels, caps)
    for output, (error, worst) in found.items():
        assert ERROR[0] <= error <= slack * ERROR[1], f"{output}: {error:.1e}"
        assert worst <= slack * WORST, f"{output}: worst element {worst:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_both_passes(name: str, device: Any, emulated: KernelCache) -> None:
    check(name, device, emulated)


FAULTS = [
    ("attention_matrix", "total *= shrink", "total *= 1.0", "maxima that grow"),
    ("attention_matrix", "> highest + 8.0", "> highest + 800.0", "maxima that grow"),
    ("attention_matrix", "key >= vec2<u32>(earliest)", "key >= vec2<u32>(0u)", "edges, packed"),
    ("attention_dscores_matrix", "|| k0 + 40u", "|| k0 + 80u", "a window"),
    ("attention_dscores_matrix", "- vec4<f32>(delta)", "- vec4<f32>(lse)", "one block"),
    ("attention_dscores_matrix", "j * 64u + step", "j * 64u", "several blocks"),
    ("attention_grad_matrix", "512u, 0u", "0u, 512u", "one block"),
    ("attention_grad_matrix", "other <= own + 0u", "other <= own + 9u", "two blocks"),
    ("attention_grad_matrix", "own + 1u <= other &&", "", "two blocks"),
    ("attention_grad_matrix", "&& other >= earliest1", "", "two, a row at a time"),
    ("attention_grad_matrix", "&& own + 0u >= earliest_of_other", "", "two, a row at a time"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("shader", "old", "new", "name"), FAULTS)
def test_planted_faults_are_seen(
    shader: str, old: str, new: str, name: str, device: Any, emulated: KernelCache
) -> None:
    with fault(shader, old, new), pytest.raises(AssertionError, match="attention"):
        check(name, device, emulated)


@pytest.mark.parametrize("e", [64, 80, 128, 256])
def test_arrays_that_matrices_lie_in_begin_at_16_bytes(e: int) -> None:
    """A driver lays arrays of workgroup memory end to end, and multiplies garbage from between 16 bytes."""
    case = case_of([[70]], 2, 1, e)
    program = build(case)
    caps = Caps(max_workgroup_bytes=49152, max_invocations=1024, matrices=(NVIDIA,), f16=True)
    sizes = {"f32": 4, "u32": 4, "atomic<u32>": 4, "vec4<u32>": 16}
    for step in plan_of(case, program, caps, keep=True).steps[case.name]:
        for launch in step.launches:
            if launch.shader.endswith("_matrix"):
                arrays = re.findall(r"var<workgroup> \w+: array<(.+), (\d+)>;", kernel.render(launch))
                assert len(arrays) == kernel.render(launch).count("var<workgroup>") > 1
                assert all(sizes[element] * int(count) % 16 == 0 for element, count in arrays)


@pytest.mark.parametrize(
    ("config", "e", "kibibytes", "fits"),
    [
        (NVIDIA, 128, 48, True),
        (NVIDIA, 256, 48, True),
        (NVIDIA, 80, 48, True),
        (NVIDIA, 100, 48, False),
        (NVIDIA, 64, 32, True),
        (NVIDIA, 128, 16, False),
        (INTEL, 128, 64, True),
        (AMD, 128, 64, True),
        (APPLE, 128, 64, False),
    ],
)
def test_heads_that_are_multiplied_by_matrices(config: MatrixConfig, e: int, kibibytes: int, fits: bool) -> None:
    caps = Caps(max_workgroup_bytes=kibibytes << 10, max_invocations=1024, matrices=(config,), f16=True)
    assert (matrices_for(e, caps) is not None) == fits
