"""The NF4 codec against bitsandbytes itself, on its CPU backend, over shapes, distributions and state dtypes.

No width here is a multiple of 16 that is not one of 64: there the AVX-512 dequantiser of bitsandbytes 0.50.2 takes the
scales of other blocks (it counts width // 64 blocks a row), and is off by more than the largest quantisation error.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from entrenar_gpu.quant import nf4

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")

pytestmark = pytest.mark.parity

SHAPES = [(64,), (1,), (131,), (5, 30), (48, 64), (512, 256), (300, 1001)]


def weights(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(7)
    values = {
        "normal": lambda: rng.standard_normal(shape) * 0.02,
        "uniform": lambda: rng.uniform(-3, 3, shape),
        "outliers": lambda: rng.standard_normal(shape) * np.where(rng.random(shape) < 0.01, 50.0, 0.02),
        "zero": lambda: np.zeros(shape),
        "constant": lambda: np.full(shape, -0.37),
        "scales of many sizes": lambda: rng.standard_normal(shape) * np.exp(4 * rng.standard_normal((*shape[:-1], 1))),
    }
    return values[kind]().astype(np.float32)


KINDS = ["normal", "uniform", "outliers", "zero", "constant", "scales of many sizes"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_single_quantisation_is_bit_equal(kind, shape):
    values = weights(kind, shape)
    packed, state = bnb.quantize_4bit(torch.from_numpy(values), blocksize=64, quant_type="nf4")
    ours = nf4.Nf4Weight.from_dense(values, double=False)
    np.testing.assert_array_equal(ours.codes, packed.numpy().ravel())
    np.testing.assert_array_equal(ours.absmax, state.absmax.numpy())
    np.testing.assert_array_equal(ours.dequantize(), bnb.dequantize_4bit(packed, state).numpy().reshape(shape))


def quantize_double(values: np.ndarray):
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(values), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return packed.numpy().ravel(), state


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zero"])
def test_scale_codes_are_bit_equal_given_the_offset(kind, shape):
    values = weights(kind, shape)
    packed, state = quantize_double(values)
    ours, (_, absmax) = nf4.Nf4Weight.from_dense(values, double=True), nf4.quantize(values)
    codes, nested = nf4.quantize_centred(absmax - state.offset.numpy())
    np.testing.assert_array_equal(ours.codes, packed)
    np.testing.assert_array_equal(codes, state.absmax.numpy())
    np.testing.assert_array_equal(nested, state.state2.absmax.numpy())


@pytest.mark.parametrize("shape", [s for s in SHAPES if np.prod(s) > 64], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("zero", "constant")])
def test_double_quantisation(kind, shape):
    """The offset within 2 ulp of bitsandbytes' float32 mean, each 8-bit code equal or the next one."""
    values = weights(kind, shape)
    _, state = quantize_double(values)
    ours, offset = nf4.Nf4Weight.from_dense(values, double=True), state.offset.numpy()
    assert abs(ours.offset - offset) <= 2 * np.spacing(offset)
    assert np.abs(ours.absmax_codes.astype(int) - state.absmax.numpy()).max() <= 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["zero", "constant"])
def test_double_quantisation_of_equal_scales(kind, shape):
    """Equal scales less their mean are rounding errors of the mean, whose codes mean nothing; the scales come back.

    Our mean is the exact one, rounded. torch sums thousands of equal numbers in float32, in an order that depends on
    the processor, and is off by 3 ulp here.
    """
    values = weights(kind, shape)
    _, state = quantize_double(values)
    ours, (_, absmax) = nf4.Nf4Weight.from_dense(values, double=True), nf4.quantize(values)
    assert ours.offset == np.float32(math.fsum(absmax.tolist()) / absmax.size)
    theirs = nf4.expand_scales(state.absmax.numpy(), state.state2.absmax.numpy(), nf4.SCALE_CODE, state.offset.numpy())
    ulp = max(np.spacing(absmax.max()), nf4.SMALLEST_ABSMAX)  # which is the scale of a short block of zeros
    np.testing.assert_allclose(ours.scales(), absmax, rtol=0, atol=ulp)
    np.testing.assert_allclose(theirs, ours.scales(), rtol=0, atol=2 * ulp)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(5, 30), (48, 64)], ids=str)
def test_dequantisation_is_bit_equal(shape, dtype, double):
    values = torch.from_numpy(weights("outliers", shape)).to(getattr(torch, dtype))
    packed, state = bnb.quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=double)
    scales = {"absmax": state.absmax.numpy()}
    if double:
        scales = {
            "absmax_codes": state.absmax.numpy(),
            "nested_absmax": state.state2.absmax.numpy(),
            "nested_code": state.state2.code.numpy(),
            "offset": float(state.offset),
        }
    ours = nf4.Nf4Weight(shape, packed.numpy().ravel(), **scales, dtype=dtype)
    assert ours.dequantize().tobytes() == bnb.dequantize_4bit(packed, state).float().numpy().tobytes()
