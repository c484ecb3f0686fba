"""The NF4 codec against what bitsandbytes recorded in tests/golden (made by make_nf4.py), and its own properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from entrenar_gpu.errors import UserError
from entrenar_gpu.quant import nf4
from tests import ROOT

GOLDEN = load_file(ROOT / "tests" / "golden" / "nf4.safetensors")
CASES = sorted({name.split(".")[0] for name in GOLDEN if name.endswith(".input")})


def golden_input(case: str) -> np.ndarray:
    values = GOLDEN[f"{case}.input"]
    return np.repeat(values, 64, axis=1) if case == "many_blocks" else values


def test_tables_are_those_of_bitsandbytes():
    np.testing.assert_array_equal(nf4.CODEBOOK, GOLDEN["codebook"])
    np.testing.assert_array_equal(nf4.SCALE_CODE, GOLDEN["dynamic_map"])


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_equal_bitsandbytes(case):
    weight = nf4.Nf4Weight.from_dense(golden_input(case), double=False)
    np.testing.assert_array_equal(weight.codes, GOLDEN[f"{case}.single.codes"])
    np.testing.assert_array_equal(weight.absmax, GOLDEN[f"{case}.single.absmax"])


@pytest.mark.parametrize("case", CASES)
def test_double_quantised_scales_match_bitsandbytes(case):
    """Its mean is a float32 sum in an order of its own: the offset may differ by 2 ulp, and a code by one step."""
    weight = nf4.Nf4Weight.from_dense(golden_input(case), double=True)
    offset = GOLDEN[f"{case}.double.offset"][0]
    assert abs(weight.offset - offset) <= 2 * np.spacing(offset)
    np.testing.assert_array_equal(weight.codes, GOLDEN[f"{case}.double.codes"])
    steps = weight.absmax_codes.astype(int) - GOLDEN[f"{case}.double.absmax"]
    assert np.abs(steps).max() <= 1
    nested = GOLDEN[f"{case}.double.nested_absmax"]
    np.testing.assert_allclose(weight.nested_absmax, nested, rtol=0, atol=2 * np.spacing(offset))


@pytest.mark.parametrize("case", [case for case in CASES if case != "many_blocks"])
@pytest.mark.parametrize("kind", ["single", "double"])
def test_recorded_states_dequantise_to_the_same_bits(case, kind):
    values, absmax = golden_input(case), GOLDEN[f"{case}.{kind}.absmax"]
    state = {"absmax": absmax}
    if kind == "double":
        nested, offset = GOLDEN[f"{case}.double.nested_absmax"], float(GOLDEN[f"{case}.double.offset"][0])
        state = {"absmax_codes": absmax, "nested_absmax": nested, "nested_code": nf4.SCALE_CODE, "offset": offset}
    weight = nf4.Nf4Weight(values.shape, GOLDEN[f"{case}.{kind}.codes"], **state)
    assert weight.dequantize().tobytes() == GOLDEN[f"{case}.{kind}.values"].tobytes()


def test_scale_codes_equal_bitsandbytes_on_more_than_one_group():
    """Given the same offset, every code and nested scale agrees exactly."""
    offset = GOLDEN["many_blocks.double.offset"][0]
    codes, nested = nf4.quantize_centred(GOLDEN["many_blocks.single.absmax"] - offset)
    np.testing.assert_array_equal(codes, GOLDEN["many_blocks.double.absmax"])
    np.testing.assert_array_equal(nested, GOLDEN["many_blocks.double.nested_absmax"])


def test_first_code_is_in_the_high_nibble():
    weight = np.zeros(64, np.float32)
    weight[0], weight[1], weight[3] = 1.0, -1.0, 1.0
    packed, _ = nf4.quantize(weight)
    assert packed[:3].tolist() == [0xF0, 0x7F, 0x77]
    assert nf4.unpack(packed, 4).tolist() == [15, 0, 7, 15]


def test_a_value_on_a_midpoint_takes_the_lower_code():
    just_above = np.nextafter(nf4.MIDPOINTS, np.float32(2))
    np.testing.assert_array_equal(nf4.nearest_code(nf4.MIDPOINTS), np.arange(15))
    np.testing.assert_array_equal(nf4.nearest_code(just_above), np.arange(1, 16))


def test_scale_codes_are_within_a_step_of_the_nearest():
    values = np.random.default_rng(0).uniform(-1, 1, 20_000).astype(np.float32)
    codes = nf4.nearest_scale_code(values)
    nearest = np.abs(nf4.SCALE_CODE[None] - values[:, None]).argmin(axis=1)
    assert np.abs(codes.astype(int) - nearest).max() == 1
    assert (codes != nearest).mean() < 0.005


@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.floats(1e-20, 1e20), st.booleans())
def test_error_is_bounded_by_the_widest_gap(seed, count, size, double):
    """Half the widest gap between codes (0.152 of absmax), plus what 8-bit scales add: see the bound below."""
    values = (np.random.default_rng(seed).standard_normal(count) * size).astype(np.float32)
    weight = nf4.Nf4Weight.from_dense(values, double)
    _, absmax = nf4.quantize(values)
    # the widest step of the 8-bit map is 1/64 of the group's range, the grid adds 1/65536, and rounding the rest
    scale_error = (1 / 64 + 1 / 65536) * np.ptp(absmax) + 1e-6 * absmax.max() if double else 0.0
    bound = np.repeat(0.1520 * absmax + scale_error, 64)[:count] * (1 + 1e-5)
    assert (np.abs(weight.dequantize() - values) <= bound).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_state_dtype_rounds_what_is_dequantised(dtype):
    values = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    exact = nf4.Nf4Weight.from_dense(values, double=True)
    rounded = nf4.Nf4Weight.from_dense(values, double=True, dtype=dtype)
    wanted = exact.dequantize().astype(nf4.ROUNDED_TYPES[dtype]).astype(np.float32)
    np.testing.assert_array_equal(rounded.dequantize(), wanted)
    assert (rounded.dequantize() != exact.dequantize()).any()


def test_chunks_do_not_show():
    """More elements than one chunk holds, ending in a partial block, equal the same blocks quantised one by one."""
    values = np.random.default_rng(2).standard_normal(3 * 2**16 + 64 * 3 + 17).astype(np.float32)
    packed, absmax = nf4.quantize(values)
    pieces = [nf4.quantize(values[start : start + 64]) for start in range(0, values.size, 64)]
    np.testing.assert_array_equal(packed, np.concatenate([piece[0] for piece in pieces]))
    np.testing.assert_array_equal(absmax, np.concatenate([piece[1] for piece in pieces]))
    weight = nf4.Nf4Weight(values.shape, packed, absmax)
    scaled = nf4.CODEBOOK[nf4.unpack(packed, values.size)] * np.repeat(absmax, 64)[: values.size]
    np.testing.assert_array_equal(weight.dequantize(), scaled)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [3, 70])
def test_values_that_are_not_finite_are_refused(bad, place):
    values = np.zeros(75, np.float32)
    values[place] = bad
    with pytest.raises(UserError, match="NaN or an infinity"):
        nf4.quantize(values)


def test_bytes_of_a_weight():
    values = np.zeros((32, 1024), np.float32)
    assert nf4.Nf4Weight.from_dense(values, double=False).nbytes == 32 * 512 + 512 * 4
    assert nf4.Nf4Weight.from_dense(values, double=True).nbytes == 32 * 512 + 512 + 2 * 4 + 256 * 4
