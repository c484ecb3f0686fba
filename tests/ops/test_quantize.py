"""NF4 on the device against the host's codec (nf4.py, itself held to bitsandbytes), bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.plan import PlanOptions, make_plan
from entrenar_gpu.dtypes import NUMPY_TYPES
from entrenar_gpu.gpu.kernel import SHADER_FOLDER
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.ops.elementwise import elementwise_launch
from entrenar_gpu.ops.quantize import host_parts
from entrenar_gpu.ops.registry import OPS, Op, record, same_as
from entrenar_gpu.quant import nf4
from tests.helpers.equivalence import fault

pytestmark = pytest.mark.gpu


def draw(kind: str, size: int) -> np.ndarray:
    rng = np.random.default_rng(11)
    values = rng.standard_normal(size)
    if kind == "uniform":
        values = rng.uniform(-0.1, 0.1, size)
    elif kind == "outliers":
        values[rng.random(size) < 0.01] *= 1000
    elif kind == "zeros":
        values[:] = 0
    elif kind == "constant":
        values[:] = -0.37
    elif kind == "tiny":
        values *= 1e-36
    elif kind == "far-apart":  # quotients far below what a float can hold
        values *= 10.0 ** rng.integers(-36, 30, size)
    elif kind in ("midpoints", "thirds"):  # quotients on midpoints: exactly, and where 1/absmax is rounded
        points = np.array([1.0, *nf4.MIDPOINTS, *np.nextafter(nf4.MIDPOINTS, np.float32(1))], np.float32)
        values = np.float32(4 if kind == "midpoints" else 3) * np.resize(points, size)
    return values.astype(np.float32)


KINDS = ["normal", "uniform", "outliers", "zeros", "constant", "tiny", "far-apart", "midpoints", "thirds"]
SIZES = [1, 63, 64, 65, 64 * 300 + 17, 64 * 257]


def run(device, kernels, graph: Graph, arrays: dict[str, np.ndarray], results) -> list[np.ndarray]:
    replay = Replay(device, make_plan({"g": graph}, device.caps, PlanOptions(keep=True)), kernels)
    try:
        for name, array in arrays.items():
            replay.write(name, array)
        replay.run("g")
        return [replay.read_temporary(t) for t in results]
    finally:
        replay.close()


def quantise_on(device, kernels, values: np.ndarray, dtype: str) -> list[np.ndarray]:
    graph = Graph()
    weight = graph.tensor("weight", values.shape, dtype, "weight")
    results = ops.nf4_quantize(weight)
    return run(device, kernels, graph, {"weight": values}, results)


def check_quantisation(device, kernels, kind: str, size: int, dtype: str) -> None:
    with np.errstate(over="ignore"):  # outliers beyond what a half holds are cut
        values = np.clip(draw(kind, size), -6e4, 6e4).astype(NUMPY_TYPES[dtype])
    codes, absmax = quantise_on(device, kernels, values, dtype)
    want_codes, want_absmax = nf4.quantize(values)
    np.testing.assert_array_equal(absmax, want_absmax)  # a block of zeros may have either zero
    np.testing.assert_array_equal(codes, want_codes)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "half"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_equal_the_codec(kind, size, dtype, device, kernels):
    check_quantisation(device, kernels, kind, size, dtype)


def test_codes_equal_on_a_device_with_default_limits(limited_device, limited_kernels):
    check_quantisation(limited_device, limited_kernels, "outliers", SIZES[-2], "bf16")


def double_quantise_on(device, kernels, absmax: np.ndarray) -> list[np.ndarray]:
    graph = Graph()
    tensors = [
        graph.tensor("absmax", absmax.shape, role="weight"),
        graph.tensor("code", (256,), role="weight"),
        graph.tensor("steps", (65536,), "u8", "weight"),
    ]
    results = ops.nf4_quantize_scales(*tensors)
    arrays = {"absmax": absmax, "code": nf4.SCALE_CODE, "steps": nf4.SCALE_STEPS}
    return run(device, kernels, graph, arrays, results)


def check_double_quantisation(device, kernels, absmax: np.ndarray) -> None:
    """The mean is summed in float32 on the device: it may be 2 ulp off, and codes then move by one at most."""
    codes, nested, table = double_quantise_on(device, kernels, absmax)
    _, _, offset = nf4.quantize_scales(absmax)
    np.testing.assert_array_equal(table[:256], nf4.SCALE_CODE)
    assert table[257] == 0
    assert abs(table[256] - offset) <= 2 * np.spacing(offset)
    # with the device's own offset, the rest follows to the bit, but for a contracted product (see the shader)
    want_codes, want_nested = nf4.quantize_centred(absmax - table[256])
    np.testing.assert_array_equal(nested, want_nested)
    steps = np.abs(codes.astype(int) - want_codes)
    assert steps.max() <= 1
    assert (steps > 0).mean() <= 0.01
    _, exact_nested, _ = nf4.quantize_scales(absmax)
    np.testing.assert_allclose(nested, exact_nested, rtol=0, atol=2 * np.spacing(offset))


@pytest.mark.parametrize("kind", ["normal", "uniform", "outliers", "constant", "zeros"])
@pytest.mark.parametrize("blocks", [1, 255, 257, 4097, 100_003])
def test_double_quantised_scales_equal_the_codec(kind, blocks, device, kernels):
    check_double_quantisation(device, kernels, np.abs(draw(kind, blocks)))


@pytest.mark.parametrize("rounded", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (33, 64), (257, 72)])
def test_dequantised_values_are_bit_equal(shape, double, rounded, device, kernels):
    check_dequantisation(device, kernels, draw("outliers", shape[0] * shape[1]).reshape(shape), double, rounded)


@pytest.mark.parametrize("scale", [1e-9, 1e-7, 1e-5, 3e3])
def test_values_at_the_ends_of_half_precision_round_as_they_should(scale, device, kernels):
    """Below 6e-5 a half has fewer bits; above 65,504 it is infinite."""
    values = draw("outliers", 64 * 40).reshape(40, 64) * np.float32(scale)
    check_dequantisation(device, kernels, values, False, "float16")


def check_dequantisation(device, kernels, values: np.ndarray, double: bool, rounded) -> None:
    weight = nf4.Nf4Weight.from_dense(values, double, rounded)
    graph = Graph()
    tensors = ops.Nf4Tensors.declare(graph, "w", values.shape, double, rounded)
    arrays = dict(zip([t.name for t in tensors.parts], host_parts(weight), strict=True))
    (got,) = run(device, kernels, graph, arrays, [tensors.dequantize()])
    np.testing.assert_array_equal(got.view(np.uint32), weight.dequantize().view(np.uint32))


# (text of the shader, fault, values, how many) that must notice
FAULTS = [
    ("y > midpoints[i]", "y >= midpoints[i]", "midpoints", 640),
    ("max(partial[thread], ", "max(0.0, ", "normal", 640),
    ("(i & 1u) == 0u", "(i & 1u) == 1u", "normal", 640),
    ("if (!whole)", "if (false)", "thirds", 63),
    ("select(clamped, highest, whole)", "highest", "zeros", 63),
    ("exponent < 1", "exponent < -200", "far-apart", 63),
]


@pytest.mark.parametrize(("old", "new", "kind", "size"), FAULTS)
def test_a_planted_fault_in_quantising_is_caught(old, new, kind, size, device, kernels):
    with fault("nf4_quantize", old, new), pytest.raises(AssertionError, match="not equal"):
        check_quantisation(device, kernels, kind, size, "f32")


def test_division_is_rounded_to_nearest(device, kernels, rng, monkeypatch):
    """lib/divide.wgsl by itself: random quotients, and some close to halfway between two floats."""
    a, b = (np.ldexp(rng.uniform(1, 2, 100_000), rng.integers(-60, 60, 100_000)).astype(np.float32) for _ in range(2))
    a[:20_000] = rng.integers(2**23, 2**24, 20_000)
    b[:20_000] = 2**24 - rng.integers(1, 9, 20_000)
    a[0] = 0
    assert divided(device, kernels, monkeypatch, a, b).tobytes() == (a / b).tobytes()


def divided(device, kernels, monkeypatch, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    source = (SHADER_FOLDER / "lib" / "divide.wgsl").read_text()

    def launch(node, caps, placed):
        return elementwise_launch(node, caps, placed, ["divide(a, b)"], functions=source)

    monkeypatch.setitem(OPS, "divide", Op("divide", same_as("a"), lambda node, a, b: [a / b], launch))
    graph = Graph()
    (quotient,) = record("divide", a=graph.tensor("a", a.shape), b=graph.tensor("b", b.shape))
    return run(device, kernels, graph, {"a": a, "b": b}, [quotient])[0]


@pytest.mark.parametrize(("old", "new"), [("+ (quotient & 1u)", ""), ("bit < 25u", "bit < 24u")])
def test_a_planted_fault_in_division_is_caught(old, new, device, kernels, rng, monkeypatch):
    with fault("elementwise", old, new), pytest.raises(AssertionError):
        test_division_is_rounded_to_nearest(device, kernels, rng, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [("- mean[0]", ""), ("place >> 2u", "place >> 3u"), ("<< (8u * i)", "<< (4u * i)"), ("+ 1.0)", "+ 0.9)")],
)
def test_a_planted_fault_in_double_quantising_is_caught(old, new, device, kernels):
    with fault("nf4_quantize_scales", old, new), pytest.raises(AssertionError):
        check_double_quantisation(device, kernels, np.abs(draw("normal", 257)))


def test_a_planted_fault_in_the_mean_is_caught(device, kernels):
    """Without what rounding took, the mean of many equal scales is off."""
    with fault("nf4_mean", "a.y + b.y + lost", "0.0"), pytest.raises(AssertionError):
        check_double_quantisation(device, kernels, np.abs(draw("constant", 100_003)))


def test_bf16_weights_widen_to_the_same_codes_as_their_f32_values(device, kernels):
    values = draw("normal", 640).astype(ml_dtypes.bfloat16)
    for packed, wide in zip(
        quantise_on(device, kernels, values, "bf16"),
        quantise_on(device, kernels, values.astype(np.float32), "f32"),
        strict=True,
    ):
        np.testing.assert_array_equal(packed, wide)
