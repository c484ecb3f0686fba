"""Every kernel on the device against NumPy: forward and backward, in the middle of a program."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar_gpu import ops
from entrenar_gpu.graph.caps import Caps
from entrenar_gpu.ops.gemm.tiles import CANDIDATES, Choice, Tile, software_tile
from tests.helpers.cases import CASES, Case, frozen, matmul_shape, param, segment_starts, x
from tests.helpers.equivalence import (
    WORST,
    build,
    check_close,
    check_program,
    expected,
    fault,
    plan_of,
    run_device,
    run_reference,
    tolerance,
)

pytestmark = pytest.mark.gpu
matmul_ops = importlib.import_module("entrenar_gpu.ops.gemm.matmul")  # `ops.matmul` is the function

# (shader, text of it, fault, a case that must notice)
FAULTS = [
    ("elementwise", "i >= 255u", "i >= 254u", "add-15x17"),
    ("elementwise", "= value0;", "= value0 * 1.00001;", "swish-15x17"),
    ("elementwise", "in_b[i % 33u]", "in_b[i % 32u]", "add-broadcast-33"),
    ("elementwise", "1.0 - sigmoid(x)", "sigmoid(x)", "swish-3x5"),
    ("elementwise", "if (y < 1.0)", "if (y < 3.0)", "gelu-wide"),
    ("elementwise", "0.044715 *", "0.0447 *", "gelu_tanh-15x17"),
    ("elementwise", "out1[i] = value1", "out1[i] = value0", "swiglu-3x5"),
    ("elementwise", "+ (middle >> 16u)", "", "dropout-0.1"),
    ("elementwise", "round < 10u", "round < 9u", "dropout-0.9"),
    ("elementwise", "rstd[i / 24u]", "rstd[i / 72u]", "rms_norm-by-head"),
    ("elementwise", "let b = four_b.w;", "let b = four_b.z;", "mul-16x16"),
    ("elementwise", "i >= 64u", "i >= 63u", "add-16x16"),
    ("reduce", "l += 64u", "l += 65u", "sum-65"),
    ("reduce", "total * f32", "f32", "mean-17x33"),
    ("reduce", "at % 65u", "at % 64u", "sum_rows-129x65"),
    ("reduce", "(first + 1u)", "first", "sum_rows-129x65"),
    ("reduce", "half > 0u", "half > 1u", "sum-63"),
    ("softmax", "/ total", "/ (total + 0.001)", "softmax-17x33"),
    ("softmax", "- dot", "+ dot", "softmax-17x33"),
    ("softmax", "half > 0u", "half > 1u", "softmax-17x33"),
    ("norm", "+ f32(", "- f32(", "layer_norm-17x33"),
    ("norm", "(x[start + i] - mean) * scale * weight[i]", "x[start + i] * scale * weight[i]", "layer_norm-17x33"),
    ("norm", "* scale * along", "* along", "rms_norm-17x33"),
    ("norm", "along - total)", "along)", "layer_norm-17x33"),
    ("norm", "+ bias[i]", "", "layer_norm-17x33"),
    ("norm", "residual[start + i] + grad", "grad", "layer_norm-residual"),
    ("norm_rope", "- second * sine", "+ second * sine", "norm_rope-5x2x24"),
    ("norm_rope", "row / 3u", "row / 2u", "norm_rope-17x3x6"),
    ("norm_rope", "* scale * along", "* along", "norm_rope-33x2x64"),
    ("norm_rope", "* weight[8u + i];\n    part", "* weight[i];\n    part", "norm_rope-33x2x64"),
    ("rope", "- second * sine", "+ second * sine", "rope-5x2x24"),
    ("rope", "-table[", "table[", "rope-5x2x24"),
    ("rope", "at / 48u", "at / 24u", "rope-5x2x24"),
    ("attention", "key >= vec4<u32>(segment)", "key + vec4<u32>(1u) >= vec4<u32>(segment)", "attention-packed"),
    ("attention", "key <= vec4<u32>(query)", "key <= vec4<u32>(query + 1u)", "attention-short"),
    ("attention", "o0_0 *= shrink0[0]", "o0_0 *= 1.0", "attention-four-tiles-and-one"),
    ("attention", "total0 *= shrink0;", "", "attention-four-tiles-and-one"),
    ("attention", "/ 32u * 32u;", "/ 32u * 32u + 32u;", "attention-packed-long"),
    ("attention", "k0 < last_segment", "false", "attention-packed-long"),
    ("attention", "highest0 + log2(total0)", "highest0", "attention-short"),
    ("attention", "let kv_head = head / 2u", "let kv_head = head % 2u", "attention-short"),
    ("attention", "token < 33u", "token < 32u", "attention-tile-and-one"),
    ("attention", "k0 <= last", "k0 < last", "attention-two-tiles-and-one"),
    ("attention_statistics", "e < 2u", "e < 1u", "attention-short"),
    ("attention_statistics", "x < 8u", "x < 2u", "attention-head-128"),
    ("attention_statistics", "= lse[row]", "= 0.0", "attention-short"),
    ("attention_dscores", "- vec4<f32>(delta)", "", "attention-short"),
    ("attention_dscores", "key >= vec4<u32>(segment)", "key > vec4<u32>(segment)", "attention-packed"),
    ("attention_dscores", "> k0 || last", "> k0 + 128u || last", "attention-packed-across"),
    ("attention_dscores", "vec4<bool>(query < 65u)", "vec4<bool>(true)", "attention-two-tiles-and-one"),
    ("attention_dscores", "group.x - short - 1u", "group.x - short", "attention-two-tiles-and-one"),
    ("attention_grad", "head / 2u", "head % 2u", "attention-short"),
    ("attention_grad", "stop = select(2u,", "stop = select(1u,", "attention-packed-across"),
    ("attention_grad", "select(1024u, 0u, group.y == 2u)", "1024u", "attention-short"),
    ("attention_grad", "/ 64u;", "/ 64u + 1u;", "attention-packed-long"),
    ("attention_group_sum", "member < 2u", "member < 1u", "attention-short"),
    ("attention_group_sum", "dv[at] = v", "dv[at] = k", "attention-short"),
    ("embedding", "[at & 1u]", "[0]", "embedding-bf16"),
    ("embedding", "row >= 23u", "row >= 22u", "embedding-f32"),
    ("embedding", "t > 0u &&", "t > 9u &&", "embedding-learn-repeats-param"),
    ("embedding", "id_at(n) != id", "id_at(n) == id", "embedding-learn-repeats-param"),
    ("cross_entropy", "dscore -=", "dscore -= 0.001 +", "cross_entropy-plain-weight"),
    ("cross_entropy", "* factor", "", "cross_entropy-ignored-param"),
    ("cross_entropy", "= loss * weight", "= loss", "cross_entropy-weighted-weight"),
    ("cross_entropy", "upstream[0] * weight", "upstream[0]", "cross_entropy-weighted-param"),
    ("cross_entropy", "lse[token] = top", "lse[token] = highest", "cross_entropy-plain-weight"),
    ("cross_entropy", "* (top - mean)", "* top", "cross_entropy-smoothed-weight"),
    ("cross_entropy", "order[8u + min", "order[min", "cross_entropy-chunks-weight"),
    ("labelled_tokens", "found[thread] - own", "found[thread]", "cross_entropy-ignored-weight"),
    ("labelled_rows", "dx[token", "dx[row", "cross_entropy-ignored-weight"),
    ("matmul", "bias[", "0.5 * bias[", "matmul-nt-pair-bias-residual-17x33x20"),
    ("matmul", "residual[at", "0.5 * residual[at", "matmul-nt-pair-bias-residual-17x33x20"),
    ("matmul", "f32(-0.7)", "f32(0.7)", "matmul-alpha"),
    ("matmul", "f32(-1.5)", "f32(1.5)", "matmul-nn-pair-bias-residual-64x64x32"),
    ("matmul", "<< 16u", "<< 15u", "matmul-nt-bf16-33x64x96"),
    ("nf4_dequantize", ">> 4u) & 15u", ">> 5u) & 15u", "nf4_dequantize-single"),
    ("nf4_dequantize", "word >> 3u", "word >> 4u", "nf4_dequantize-single"),
    ("nf4_dequantize", "+ table[256]", "", "nf4_dequantize-double"),
    ("nf4_dequantize", "0x7fffu", "0xffffu", "nf4_dequantize-odd"),
    ("nf4_low_precision_transposed", "word0 >> 28u", "word0 >> 24u", "nf4_dequantize_transposed-transposed"),
]


# By case and not by test: software adapters throw compiled kernels away once there are many.
EVERY_CASE = pytest.mark.parametrize("name", CASES, scope="module")


def check_on(case: Case, device, kernels, caps: Caps | None = None, keep: bool = True) -> None:
    """Runs a case on both executors and compares every tensor that can be read afterwards."""
    known = CASES.get(case.name) is case
    program, want = expected(case.name) if known else ((p := build(case)), run_reference(p))
    got = run_device(program, device, kernels, plan_of(case, program, caps or device.caps, keep))
    if keep:
        assert {t.id for n in program.graph.nodes for t in n.outputs if t.updates is None} <= got.keys()
    check_program(program, got, want)


@EVERY_CASE
def test_every_tensor_equals_the_reference(name, device, kernels):
    check_on(CASES[name], device, kernels)


@EVERY_CASE
def test_so_it_does_on_a_device_with_default_limits_and_no_features(name, limited_device, limited_kernels):
    check_on(CASES[name], limited_device, limited_kernels)


@EVERY_CASE
def test_sharing_storage_changes_no_bit(name, device, kernels):
    program, _ = expected(name)
    apart = run_device(program, device, kernels, plan_of(CASES[name], program, device.caps, keep=True))
    shared = run_device(program, device, kernels, plan_of(CASES[name], program, device.caps, keep=False))
    compared = apart.keys() & shared.keys()
    assert compared & {g.id for g in program.gradients.values()} or not program.leaves
    for key in compared:
        assert apart[key].tobytes() == shared[key].tobytes()


FOLDED = ["add-2x31x33", "sum-129x65", "sum_rows-300x17", "softmax-17x33", "layer_norm-17x33", "rope-33x2x64"]
FOLDED += ["embedding-learn-pages-param", "cross_entropy-ignored-param", "nf4_dequantize-double"]


@pytest.mark.parametrize("name", FOLDED)
def test_a_grid_folded_in_two_dimensions_covers_everything(name, device, kernels):
    """As where a device's 65,535 workgroups a dimension do not suffice; products and attention do not fold."""
    caps = replace(device.caps, max_workgroups=7)
    check_on(CASES[name], device, kernels, caps)


# Shapes for which a GPU is given more parallel work than a software adapter: products split along K.
SPLIT = {
    "matmul-long-odd": "matmul_sum",
    "matmul-long-fours": "matmul_sum",
}


def check_split(name: str, device, kernels) -> None:
    caps = replace(device.caps, software=False)
    plan = plan_of(CASES[name], expected(name)[0], caps, keep=True)
    assert any(launch.shader == SPLIT[name] for step in plan.steps[name] for launch in step.launches)
    check_on(CASES[name], device, kernels, caps)


@pytest.mark.parametrize("name", SPLIT)
def test_work_split_to_fill_a_gpu_adds_up(name, device, kernels):
    check_split(name, device, kernels)


@pytest.mark.parametrize(
    ("shader", "old", "new", "name"),
    [
        ("matmul_sum", "+= bias[", "-= bias[", "matmul-long-odd"),
        ("matmul_sum", "sum += partial[i + ", "sum += partial[0u * ", "matmul-long-fours"),
    ],
)
def test_a_fault_in_adding_up_is_caught(shader, old, new, name, device, kernels):
    with fault(shader, old, new), pytest.raises(AssertionError, match=name):
        check_split(name, device, kernels)


def test_a_fault_in_the_folding_is_caught(device, kernels):
    with pytest.raises(AssertionError), fault("elementwise", "group.y * count.x", "group.y * 2u"):
        check_on(CASES["add-2x31x33"], device, kernels, replace(device.caps, max_workgroups=3))


@pytest.mark.parametrize(("shader", "old", "new", "name"), FAULTS)
def test_a_planted_fault_is_caught(shader, old, new, name, device, kernels):
    with fault(shader, old, new), pytest.raises(AssertionError, match=name.replace(".", r"\.")):
        check_on(CASES[name], device, kernels)


def test_every_op_has_a_bar_that_catches_a_few_times_itself(rng):
    """Of noise at four times the bar, and of one element at twice what the worst may be."""
    for case in CASES.values():
        program, want = expected(case.name)
        node = program.output.node
        good = want[program.output.id]
        bar = tolerance(node)
        noise = rng.standard_normal(good.shape) * 4 * bar * np.sqrt((good.astype(np.float64) ** 2).mean())
        one = np.zeros(good.shape)
        one.flat[0] = 2 * WORST * bar * np.abs(good).max()
        for error in (noise, one):
            if good.size > 8 and np.abs(error).max() > 0:
                with pytest.raises(AssertionError):
                    check_close(good + error, good, good, bar, case.name)
        check_close(good, good, good, bar, case.name)


LENGTHS = st.integers(1, 70)


@settings(max_examples=5)
@given(LENGTHS, LENGTHS, LENGTHS, st.booleans(), st.booleans(), st.sampled_from(["f32", "bf16", "half"]))
def test_matmuls_of_any_shape(device, kernels, m, n, k, ta, tb, dtype):
    a, b = matmul_shape(m, n, k, ta, tb)

    def apply(*operands):
        return ops.matmul(*operands, transpose_a=ta, transpose_b=tb)

    check_on(Case("matmul", (x(*a), frozen(*b, dtype=dtype)), apply), device, kernels)


@settings(max_examples=3)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from([(1, 1), (2, 1), (4, 2)]), st.integers(1, 3)
)
def test_attention_over_any_segments(device, kernels, lengths, heads, eights):
    tokens, size = sum(lengths), 8 * eights
    inputs = (x(tokens, heads[0] * size), x(tokens, heads[1] * size), x(tokens, heads[1] * size))

    def apply(q, k, v, starts):
        return ops.attention(q, k, v, starts, 1, *heads)

    check_on(Case("attention", (*inputs, segment_starts([lengths])), apply), device, kernels)


@settings(max_examples=5)
@given(st.integers(1, 9), st.integers(8, 200))
def test_normalisation_and_softmax_of_any_shape(device, kernels, rows, columns):
    def apply(a, weight, bias):
        return ops.softmax(ops.rms_norm(ops.layer_norm(a, weight, bias, 1e-5), weight, 1e-6))

    check_on(Case("softmax", (x(rows, columns), param(columns), param(columns)), apply), device, kernels)


TILES = [c.tile for c in CANDIDATES["f32"]] + [
    software_tile("f32", m, n) for m, n in ((16, 64), (64, 16), (32, 32), (999, 999))
]


@pytest.mark.parametrize("tile", TILES, ids=repr)
@pytest.mark.parametrize(("name", "slices"), [("matmul-tt-127x63x31", 1), ("matmul-tt-pair-bias-residual-64x64x32", 2)])
def test_every_tile_that_may_be_chosen(tile: Tile, name, slices: int, device, kernels, monkeypatch):
    """Also those meant for sizes and devices that a test cannot afford."""
    if tile.workgroup_bytes("f32") > device.caps.max_workgroup_bytes:
        pytest.skip(f"{device.caps.name} has too little workgroup memory")
    if device.caps.software:  # takes seconds to compile a long inner loop
        tile = replace(tile, unroll=1)
    monkeypatch.setattr(matmul_ops, "choose", lambda *product: Choice(tile, slices))
    check_on(CASES[name], device, kernels)
