"""Products in int8 on matrix units, their builtins emulated in plain WGSL; and their operands, made on any device.

Codes and sums are exact, so the bar is that of the scaling and of what is added in f32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler import weight_copies
from entrenar_gpu.compiler.memory import FittedPlan
from entrenar_gpu.compiler.plan import PlanOptions, make_plan
from entrenar_gpu.compiler.recompute import Recompute
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.caps import Caps, MatrixConfig
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.ops.gemm.launches import Block, Matmul, matmul_launches, partial_shapes, whole
from entrenar_gpu.ops.gemm.low_precision import low_precision_weight
from entrenar_gpu.ops.gemm.rotated import (
    by_rows,
    laid_out,
    quantize_rotated,
    rotated,
    rotated_arrays,
    rotated_rows_launch,
    rotated_specs,
)
from entrenar_gpu.ops.gemm.tiles import (
    Choice,
    MatrixTile,
    arithmetic_on,
    choose,
    from_numbers,
    is_choice,
    key,
    matrix_tiles,
    to_numbers,
)
from entrenar_gpu.ops.quantize import Nf4Tensors, host_parts
from entrenar_gpu.quant import nf4
from tests.helpers.equivalence import fault
from tests.ops import test_matrix_units as f16
from tests.ops.test_low_precision import Layer
from tests.ops.test_matrix_units import with_rounded_adapter

# What drivers report beside their matrices of f16.
NVIDIA = (f16.NVIDIA, MatrixConfig("i8", "i32", 16, 16, 32, 32, 32))
AMD = (f16.AMD, MatrixConfig("i8", "i32", 16, 16, 16, 32, 64))
INTEL = (f16.INTEL, MatrixConfig("i8", "i32", 8, 16, 32, 8, 32))
BAR = 1e-6


def caps_with(device: Any, configs: tuple[MatrixConfig, ...]) -> Caps:
    # Not of a software adapter, so that tiles are those of a card; f16 is not needed to emulate, but planned for.
    return replace(device.caps, matrices=configs, f16=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("configs", "shape"),
    [
        (NVIDIA, (70, 128, 64, 8)),
        (INTEL, (70, 128, 64, 8)),
        (NVIDIA, (64, 192, 128, 16)),
        (NVIDIA, (65, 64, 128, 40)),
        (INTEL, (64, 64, 64, 4)),
    ],
    ids=["edges", "8x16x32, edges", "whole", "rank 40", "8x16x32, rank 4"],
)
def test_layers_are_those_of_codes(device: Any, emulated: KernelCache, configs: Any, shape: Any) -> None:
    """Forward and backward: an adapter, a bias, a residual in place, both layouts of the weight."""
    layer = Layer(shape, "int8_rows")
    got, want = layer.on_device(device, emulated, caps_with(device, configs)), with_rounded_adapter(layer)
    for name, values in want.items():
        error = np.linalg.norm(got[name] - values) / np.linalg.norm(values)
        # A P that differs from NumPy's in its last bit may be rounded the other way.
        assert error < (2e-5 if name in ("y", "dx") else BAR), name


@pytest.mark.gpu
def test_a_layer_that_is_told_the_largest_values_has_the_same_bits(device: Any, emulated: KernelCache) -> None:
    layer, caps = Layer((70, 128, 64, 8), "int8_rows"), caps_with(device, NVIDIA)
    plain, graphs = layer.on_device(device, emulated, caps), {"layer": layer.graph}
    told = weight_copies.keep_copies(FittedPlan(make_plan(graphs, caps), graphs, Recompute()), 1 << 30, fill_bytes=0)
    assert [node for node in told.graphs["layer"].nodes if "largest" in node.inputs]
    replay = Replay(device, make_plan(told.graphs, caps, PlanOptions(keep=True)), emulated)
    try:
        for name, values in layer.arrays.items():
            replay.write(name, values)
        replay.run(weight_copies.GRAPH)
        replay.run("layer")
        for name, values in plain.items():
            assert np.array_equal(replay.read_temporary(layer.results[name]), values), name
    finally:
        replay.close()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(70, 128, 64, 8), (300, 640, 1088, 16)])
def test_layers_on_matrix_units(device: Any, kernels: KernelCache, shape: Any) -> None:
    """The real ones, where the device has some."""
    if arithmetic_on("int8", device.caps) != "int8_rows":
        pytest.skip("the device has no matrix units for int8")
    layer = Layer(shape, "int8_rows")
    got, want = layer.on_device(device, kernels), with_rounded_adapter(layer)
    for name, values in want.items():
        error = np.linalg.norm(got[name] - values) / np.linalg.norm(values)
        assert error < (2e-5 if name in ("y", "dx") else BAR), name


SMALL = MatrixTile(64, 64, 64, 32, 32, MK=32)


def product(
    device: Any,
    kernels: KernelCache,
    m: int,
    n: int,
    k: int,
    slices: int = 1,
    onto: bool = False,
    tile: MatrixTile = SMALL,
) -> float:
    """Relative error of one matmul of int8 codes against int64."""
    rng, graph = np.random.default_rng(5), Graph("g")
    codes = {"a": (m, k), "b": (n, k)}
    tensors = {name: graph.tensor(name, *rotated_specs(*size)[0], role="weight") for name, size in codes.items()}
    scales = [graph.tensor(f"{name}_scale", (rows,), role="weight") for name, (rows, _) in codes.items()]
    c, choice = graph.tensor("c", (m, n), role="weight"), Choice(tile, slices)
    partial = [graph.tensor("p", *spec, role="weight") for spec in partial_shapes((m, n, k), choice)]
    ops.scale(c, 1.0)
    replay = Replay(device, make_plan({"g": graph}, device.caps), kernels)
    try:
        values = {name: rng.integers(-127, 128, size).astype(np.int8) for name, size in codes.items()}
        by = {name: rng.uniform(0.5, 2, rows).astype(np.float32) for name, (rows, _) in codes.items()}
        for name in codes:
            replay.write(name, laid_out(values[name]))
            replay.write(f"{name}_scale", by[name])
        before = rng.standard_normal((m, n)).astype(np.float32) if onto else np.full((m, n), np.nan, np.float32)
        replay.write("c", before)
        operands = whole(tensors["a"]), whole(tensors["b"]), Block(c, 0, n)
        matmul = Matmul((m, n, k), *operands, transpose_b=True, accumulate=onto, scales=(scales[0], scales[1]))
        for launch in matmul_launches(matmul, choice, partial[0] if partial else None, device.caps):
            replay.launch(launch)
        exact = (values["a"].astype(np.int64) @ values["b"].T.astype(np.int64)) * (by["a"][:, None] * by["b"])
        exact = exact + (before if onto else 0)
        return float(np.linalg.norm(replay.read("c") - exact) / np.linalg.norm(exact))
    finally:
        replay.close()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((65, 128, 192), {}),
        ((128, 64, 64), {"onto": True}),
        ((40, 64, 512), {"slices": 2, "onto": True}),
        ((64, 64, 832), {"slices": 3}),
        ((70, 96, 128), {"onto": True, "tile": MatrixTile(64, 96, 64, 32, 48, MK=32)}),
    ],
    ids=["edges", "onto C", "slices", "a short slice", "rows of three matrices"],
)
def test_products(device: Any, emulated: KernelCache, sizes: tuple[int, int, int], options: dict[str, Any]) -> None:
    assert product(device, emulated, *sizes, **options) < BAR


FAULTS = [
    ("workgroupBarrier();\n    let by_column", "let by_column"),
    ("tiles[320u + (", "tiles[321u + ("),
    ("(sm + 16u) * 5u", "(sm + 15u) * 5u"),
    ("a_scale[min(", "a_scale[max("),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("old", "new"), FAULTS)
def test_planted_faults_are_seen(device: Any, emulated: KernelCache, old: str, new: str) -> None:
    with fault("matmul_matrix_int8", old, new):
        assert not product(device, emulated, 65, 64, 128) < BAR


def rows_on(device: Any, kernels: KernelCache, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of rows as the device makes them."""
    (m, k), graph = values.shape, Graph("g")
    x, out = graph.tensor("x", (m, k)), graph.tensor("out", *rotated_specs(m, k)[0], role="weight")
    scales = graph.tensor("scales", (m,), role="weight")
    ops.scale(x, 1.0)
    ops.scale(scales, 1.0)
    replay = Replay(device, make_plan({"g": graph}, device.caps), kernels)
    try:
        replay.write("x", values)
        replay.launch(rotated_rows_launch(whole(x), m, k, out, scales, device.caps))
        return by_rows(replay.read("out"))[:m], replay.read("scales")
    finally:
        replay.close()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 64), (5, 576), (3, 4160)], ids=["a block", "several rows", "chunks"])
def test_rows_on_a_device_are_numpys(device: Any, kernels: KernelCache, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    values = (rng.standard_normal(shape) * rng.uniform(0.01, 100, (shape[0], 1))).astype(np.float32)
    values[1] = 0
    codes, scales = rows_on(device, kernels, values)
    want_codes, want_scales = quantize_rotated(values)
    assert np.array_equal(codes, want_codes)
    assert np.array_equal(scales, want_scales)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_an_overflow_is_not_lost(device: Any, kernels: KernelCache, bad: float) -> None:
    values = np.ones((3, 128), np.float32)
    values[1, 77] = bad
    assert np.isnan(rows_on(device, kernels, values)[1]).tolist() == [False, True, False]


@pytest.mark.gpu
def test_planted_faults_in_rows_are_seen(device: Any, kernels: KernelCache) -> None:
    values = np.random.default_rng(1).standard_normal((5, 576)).astype(np.float32)
    for old, new in (
        ("+ 4u + quarter]", "+ 8u + quarter]"),
        ("i < 36u", "i < 20u"),
        ("thread & 252u", "thread & 248u"),
    ):
        with fault("rotated_rows", old, new):
            assert not np.array_equal(rows_on(device, kernels, values)[0], quantize_rotated(values)[0]), old


def weight_on(device: Any, kernels: KernelCache, transposed: bool, rounded: Any) -> tuple[np.ndarray, float]:
    """By how much codes of a weight's copy differ from NumPy's, and the largest relative error of a scale."""
    rng, (n, k) = np.random.default_rng(2), (192, 128)
    weight = nf4.Nf4Weight.from_dense(rng.standard_normal((n, k)).astype(np.float32), True, rounded)
    graph = Graph("g")
    held = Nf4Tensors.declare(graph, "w", (n, k), True, rounded)
    made = [ops.keep(t, f"copy{i}") for i, t in enumerate(low_precision_weight(held, "int8_rows", transposed))]
    replay = Replay(device, make_plan({"g": graph}, device.caps), kernels)
    try:
        for tensor, values in zip(held.parts, host_parts(weight), strict=True):
            replay.write(tensor.name, values)
        replay.run("g")
        codes, scales = (replay.read(f"copy{i}") for i in range(len(made)))
    finally:
        replay.close()
    attrs = {"shape": (n, k), "rounded": rounded, "transposed": transposed}
    want_codes, want_scales = rotated_arrays(attrs, host_parts(weight))
    apart = by_rows(codes).astype(int) - by_rows(want_codes)
    return apart, float(np.abs(scales / want_scales - 1).max())


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rounded", ["float32", "bfloat16"])
def test_weights_on_a_device_are_numpys(device: Any, kernels: KernelCache, transposed: bool, rounded: Any) -> None:
    """But for what a device rounds once, of a product and the sum that it goes into: 3 ulp, and codes on the edge."""
    apart, off = weight_on(device, kernels, transposed, rounded)
    assert off <= 4e-7
    assert np.abs(apart).max() <= 1
    assert np.count_nonzero(apart) <= apart.size // 1000


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shader", "old", "new", "transposed"),
    [
        ("nf4_panels", "place % 8u;", "place % 4u;", False),
        ("nf4_panels", "words1[3] >> 28u", "words1[3] >> 24u", False),
        ("nf4_panels", "parts[thread + 128u]", "parts[thread + 64u]", True),
        ("nf4_panels", "+ 4u - thread % 2u * 4u", "+ thread % 2u * 4u", True),
    ],
)
def test_planted_faults_in_weights_are_seen(
    device: Any, kernels: KernelCache, shader: str, old: str, new: str, transposed: bool
) -> None:
    with fault(shader, old, new):
        apart, off = weight_on(device, kernels, transposed, "float32")
    assert off > 4e-7 or np.abs(apart).max() > 1


def test_a_rotation_leaves_products_as_they_are_and_spreads_an_outlier() -> None:
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((4, 256)), rng.standard_normal((8, 256))
    x[:, 100] *= 100
    np.testing.assert_allclose(rotated(x) @ rotated(w).T / 64, x @ w.T, rtol=1e-10)

    def error(values: np.ndarray, of: np.ndarray) -> float:
        """Of rounding rows to 127 steps either way."""
        step = np.abs(values).max(axis=1, keepdims=True) / 127
        return float(np.linalg.norm(np.rint(values / step) * step - values) / np.linalg.norm(of))

    small = np.delete(x, 100, axis=1)
    assert error(rotated(x), 8 * small) < error(x, small) / 3


@pytest.mark.parametrize(
    ("configs", "limits", "blocks"),
    [
        (NVIDIA, (49152, 1024), [(128, 160, 64, 80, 32, 0), (128, 128, 64, 64, 32, 0), (64, 64, 32, 32, 32, 0)]),
        (AMD, (65536, 1024), [(128, 128, 64, 64, 64, 1), (64, 64, 32, 32, 64, 1)]),
        (INTEL, (32768, 1024), [(64, 160, 32, 80, 32, 1), (64, 128, 32, 64, 32, 1), (32, 64, 16, 32, 32, 1)]),
        (NVIDIA, (16384, 256), [(64, 64, 32, 32, 32, 0)]),
        (NVIDIA[1:], (49152, 1024), []),
        ((NVIDIA[0], INTEL[1]), (49152, 1024), []),
        ((f16.APPLE,), (32768, 1024), []),
    ],
    ids=["NVIDIA", "AMD", "Intel", "small", "no f16", "other sizes in f16", "Apple"],
)
def test_tiles_are_made_of_what_devices_report(configs: Any, limits: Any, blocks: Any) -> None:
    caps = Caps(max_workgroup_bytes=limits[0], max_invocations=limits[1], matrices=configs, f16=True)
    tiles = matrix_tiles("int8_rows", caps)
    assert [(t.BM, t.BN, t.TM, t.TN, t.SUBGROUP, t.pinned) for t in tiles] == blocks
    assert arithmetic_on("int8", caps) == ("int8_rows" if blocks else "int8")
    assert arithmetic_on("f16", caps) == "f16"
    for tile in tiles:
        assert (configs[1].m, configs[1].n, configs[1].k) == (tile.MM, tile.MN, tile.MK)
        assert tile.workgroup_bytes("int8_rows") <= limits[0]
        assert tile.threads <= limits[1]
        assert tile.threads % configs[1].max_subgroup == 0
        for low_rank in (False, True):  # the lanes of a subgroup share rows of sums evenly
            groups = tile.stored_groups("int8_rows", low_rank)
            assert sum(count for _, count in groups) == tile.TN // tile.MN
            for lanes in (count * tile.MN // 4 for _, count in groups):
                assert tile.SUBGROUP % lanes == 0
                assert tile.MM % (tile.SUBGROUP // lanes) == 0


def test_choices_are_kept_and_told_from_others() -> None:
    card = Caps(max_workgroup_bytes=49152, max_invocations=1024, matrices=NVIDIA, f16=True, flops_per_second=2e12)
    choice, name = choose("int8_rows", 2048, 9728, 2560, "nt", card), key("int8_rows", 2048, 9728, 2560, "nt")
    numbers = to_numbers(choice)
    assert (choice.tile.BM, choice.tile.BK, choice.slices) == (128, 64, 1)
    assert from_numbers(numbers) == choice
    assert is_choice(name, numbers)
    assert not is_choice(key("f16", 2048, 9728, 2560, "nt"), numbers)
    assert not is_choice(name, (64, 64, 64, 8, 8, 4, 1, 1, 0))
    assert choose("int8_rows", 64, 64, 4096, "nt", card).slices > 1
    with pytest.raises(ValueError, match="no matrix units for int8"):
        choose("int8_rows", 64, 64, 64, "nt", replace(card, matrices=()))
