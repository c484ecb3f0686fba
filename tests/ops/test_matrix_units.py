"""Products on matrix units, with their builtins emulated in plain WGSL: staging, edges, slices, what is added to sums.

No software adapter has such units: `make gpu-test` runs the real ones. Sums are f32, so the bar is that of f32 sums of
the operands rounded to f16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.caps import Caps, MatrixConfig
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.ops.gemm.launches import Block, Matmul, matmul_launches, partial_shapes, whole
from entrenar_gpu.ops.gemm.tiles import (
    Choice,
    MatrixTile,
    choose,
    from_numbers,
    is_choice,
    key,
    matrix_tiles,
    to_numbers,
)
from tests.helpers.equivalence import fault
from tests.ops.test_low_precision import Layer

# What drivers report (VkCooperativeMatrixPropertiesKHR): component, result, M, N, K, smallest and largest subgroup.
NVIDIA = MatrixConfig("f16", "f32", 16, 16, 16, 32, 32)
AMD = MatrixConfig("f16", "f32", 16, 16, 16, 32, 64)
INTEL = MatrixConfig("f16", "f32", 8, 16, 16, 8, 32)
APPLE = MatrixConfig("f32", "f32", 8, 8, 8, 32, 32)
BAR = 1e-6


def caps_with(device: Any, config: MatrixConfig) -> Caps:
    # Not of a software adapter, so that tiles are those of a card; f16 is not needed to emulate, but planned for.
    return replace(device.caps, matrices=(config,), f16=True)


def with_rounded_adapter(layer: Layer) -> dict[str, np.ndarray]:
    """The reference of a layer whose adapter's products are made of 0.3 P and Q rounded to f16."""
    v, want = layer.arrays, layer.reference()
    for name, p, q in (("y", v["x"] @ v["A"].T, v["B"].T), ("dx", v["up"] @ v["B"], v["A"])):
        scaled = np.float32(0.3) * p
        rounded = scaled.astype(np.float16).astype(np.float32) @ q.astype(np.float16).astype(np.float32)
        want[name] = want[name] + rounded - scaled @ q
    return want


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (NVIDIA, (70, 128, 64, 8)),
        (INTEL, (70, 128, 64, 8)),
        (NVIDIA, (64, 192, 128, 16)),
        (NVIDIA, (64, 64, 64, 4)),
        (INTEL, (65, 64, 64, 40)),
        (APPLE, (70, 128, 64, 8)),
        (APPLE, (65, 64, 64, 6)),
    ],
    ids=["edges", "8x16x16, edges", "whole", "rank 4", "8x16x16, rank 40", "of f32, edges", "of f32, rank 6"],
)
def test_layers_are_those_of_rounded_operands(device: Any, emulated: KernelCache, config: Any, shape: Any) -> None:
    """Forward and backward: an adapter, a bias, a residual in place, both layouts of the weight."""
    if not device.caps.f16:
        pytest.skip("f16 copies of operands need the feature")
    layer = Layer(shape, "f16")
    want = layer.reference() if config is APPLE else with_rounded_adapter(layer)
    got = layer.on_device(device, emulated, caps_with(device, config))
    for name, values in want.items():
        error = np.linalg.norm(got[name] - values) / np.linalg.norm(values)
        # A P that differs from NumPy's in its last bit may be rounded the other way.
        assert error < (2e-5 if name in ("y", "dx") else BAR), name


@pytest.mark.gpu
def test_layers_in_f32_are_the_references(device: Any, emulated: KernelCache) -> None:
    """On matrices of f32: forward by rows of W dequantised turned, backward by W's own, an adapter with each."""
    layer, caps = Layer((70, 128, 64, 8), "f32"), caps_with(device, APPLE)
    got = layer.on_device(device, emulated, caps)
    for name, values in layer.reference().items():
        assert np.linalg.norm(got[name] - values) / np.linalg.norm(values) < BAR, name
    (steps,) = make_plan({"layer": layer.graph}, caps).steps.values()
    on_units = [step for step in steps if any(launch.shader == "matmul_matrix" for launch in step.launches)]
    assert len(on_units) == 2


def product(device: Any, kernels: KernelCache, m: int, n: int, k: int, tile: MatrixTile, **options: Any) -> float:
    """Relative error of one matmul of A f16, or as B f32, with B f16, f32 or bf16, [N, K] or [K, N], and P op(Q) of
    rank `r` where that is given."""
    rng, by_columns = np.random.default_rng(5), options.pop("transpose_b", True)
    dtype, slices, r = options.pop("dtype", "f16"), options.pop("slices", 1), options.pop("r", 0)
    graph, of_f32 = Graph("g"), options.pop("of_f32", False)
    a = graph.tensor("a", (m, k), "f32" if of_f32 else "f16", role="weight")
    b = graph.tensor("b", (n, k) if by_columns else (k, n), dtype, role="weight")
    c = graph.tensor("c", (m, n), role="weight")
    if r:
        p, q = graph.tensor("p", (m, r), role="weight"), graph.tensor("q", (r, n), role="weight")
    choice = Choice(tile, slices)
    partial = [graph.tensor("partial", *spec, role="weight") for spec in partial_shapes((m, n, k), choice)]
    ops.scale(c, 1.0)
    replay = Replay(device, make_plan({"g": graph}, device.caps), kernels)
    try:
        low_rank = (whole(p), whole(q), 0.5, r) if r else None
        matmul = Matmul(
            (m, n, k), whole(a), whole(b), Block(c, 0, n), transpose_b=by_columns, low_rank=low_rank, **options
        )
        left, right = (rng.standard_normal(t.shape).astype(np.float32) for t in (a, b))
        if not of_f32:
            left = left.astype(np.float16)
        if dtype == "bf16":
            right = (right.view(np.uint32) & 0xFFFF0000).view(np.float32)
        added = np.zeros((m, n))
        if r:
            factors = {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in (p, q)}
            for name, values in factors.items():
                replay.write(name, values)
            added = 0.5 * factors["p"].astype(np.float64) @ factors["q"]
        replay.write("a", left)
        replay.write("b", right)
        before = rng.standard_normal((m, n)).astype(np.float32) if options.get("accumulate") else np.zeros((m, n))
        replay.write("c", before if options.get("accumulate") else np.full((m, n), np.nan, np.float32))
        for launch in matmul_launches(matmul, choice, partial[0] if partial else None, device.caps):
            replay.launch(launch)
        right = right if of_f32 else right.astype(np.float16)
        exact = left.astype(np.float64) @ (right.T if by_columns else right).astype(np.float64) + added
        got = (replay.read("c") - before) / options.get("alpha", 1.0)
        return np.linalg.norm(got - exact) / np.linalg.norm(exact)
    finally:
        replay.close()


SMALL = MatrixTile(64, 64, 32, 32, 32)
# Of four matrices a subgroup: llvmpipe ends a shader after 65,535 rounds of its loops, and emulated matrices take many.
OF_F32 = MatrixTile(32, 32, 16, 16, 16, MM=8, MN=8, MK=8, BYTES=4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((128, 128, 64), {}),
        ((65, 192, 96), {}),
        ((128, 64, 64), {"transpose_b": False}),
        ((64, 128, 96), {"transpose_b": False, "dtype": "bf16"}),
        ((64, 64, 64), {"dtype": "f32"}),
        ((128, 64, 96), {"accumulate": True}),
        ((70, 64, 64), {"accumulate": True}),
        ((70, 64, 64), {"dtype": "bf16", "alpha": 0.25}),
        ((70, 96, 64), {"accumulate": True, "tile": MatrixTile(64, 96, 32, 32, 48, MM=8)}),
        ((64, 128, 256), {"slices": 2}),
        ((40, 64, 512), {"slices": 3, "transpose_b": False, "dtype": "f32"}),
    ],
    ids=[
        "whole",
        "edges",
        "rows",
        "rows of bf16",
        "f32",
        "onto C",
        "onto C, edges",
        "scaled",
        "rows of three matrices",
        "slices",
        "slices, rows, edges",
    ],
)
def test_products(device: Any, emulated: KernelCache, sizes: tuple[int, int, int], options: dict[str, Any]) -> None:
    if not device.caps.f16:
        pytest.skip("f16 tensors need the feature")
    given = dict(options)
    assert product(device, emulated, *sizes, given.pop("tile", SMALL), **given) < BAR


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((65, 128, 48), {"dtype": "f16"}),
        ((64, 72, 32), {"dtype": "bf16", "transpose_b": False}),
        ((64, 64, 2064), {"of_f32": True, "dtype": "f32"}),
        ((65, 68, 2064), {"of_f32": True, "dtype": "f32", "transpose_b": False, "accumulate": True, "r": 6}),
        ((40, 64, 2080), {"of_f32": True, "dtype": "f32", "slices": 2, "transpose_b": False}),
    ],
    ids=["f16 widened", "bf16 widened", "blocks of K", "blocks onto C, rank 6", "slices of blocks"],
)
def test_products_of_f32_matrices(
    device: Any, emulated: KernelCache, sizes: tuple[int, int, int], options: dict[str, Any]
) -> None:
    """Apple's, of which f16 operands are widened on their way in."""
    if not device.caps.f16 and not options.get("of_f32"):
        pytest.skip("f16 tensors need the feature")
    assert product(device, emulated, *sizes, OF_F32, **options) < BAR


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("workgroupBarrier();\n    var acc", "var acc"),
        ("(sm + 8u) * 5u", "(sm + 7u) * 5u"),
        ("if (first) {", "if (!first) {"),
        ("  sums0_0 = array<f32, 2>();", ""),
        ("  if (first) {\n    for (var r0", "  {\n    for (var r0"),
    ],
)
def test_planted_faults_in_products_of_f32_are_seen(device: Any, emulated: KernelCache, old: str, new: str) -> None:
    with fault("matmul_matrix", old, new):
        options = {"of_f32": True, "dtype": "f32", "transpose_b": False, "r": 6}
        assert not product(device, emulated, 65, 68, 2064, OF_F32, **options) < BAR


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("workgroupBarrier();\n    {", "{"),
        ("tile_b[((thread", "tile_b[1u + ((thread"),
        ("(sm + 16u) * 5u", "(sm + 15u) * 5u"),
        ("min(m0", "max(m0"),
    ],
)
def test_planted_faults_are_seen(device: Any, emulated: KernelCache, old: str, new: str) -> None:
    if not device.caps.f16:
        pytest.skip("f16 tensors need the feature")
    with fault("matmul_matrix", old, new):
        assert not product(device, emulated, 65, 64, 96, SMALL) < BAR


@pytest.mark.parametrize(
    ("config", "limits", "blocks"),
    [
        (NVIDIA, (49152, 1024), [(128, 160, 64, 80, 32, 0), (128, 128, 64, 64, 32, 0), (64, 64, 32, 32, 32, 0)]),
        (AMD, (65536, 1024), [(128, 160, 64, 80, 64, 1), (128, 128, 64, 64, 64, 1), (64, 64, 32, 32, 64, 1)]),
        (INTEL, (32768, 1024), [(64, 160, 32, 80, 32, 1), (64, 128, 32, 64, 32, 1), (32, 64, 16, 32, 32, 1)]),
        (NVIDIA, (16384, 256), [(64, 64, 32, 32, 32, 0)]),
        (APPLE, (32768, 1024), [(64, 64, 32, 32, 32, 0), (32, 32, 16, 16, 32, 0)]),
        (replace(NVIDIA, result="f16"), (49152, 1024), []),
    ],
    ids=["NVIDIA", "AMD", "Intel", "small", "Apple", "f16 sums"],
)
def test_tiles_are_made_of_what_devices_report(config: MatrixConfig, limits: Any, blocks: Any) -> None:
    caps = Caps(max_workgroup_bytes=limits[0], max_invocations=limits[1], matrices=(config,), f16=True)
    tiles = matrix_tiles("f16", caps)
    assert [(t.BM, t.BN, t.TM, t.TN, t.SUBGROUP, t.pinned) for t in tiles] == blocks
    for tile in tiles:
        assert (config.m, config.n, config.k) == (tile.MM, tile.MN, tile.MK)
        assert tile.workgroup_bytes("f16") <= limits[0]
        assert tile.threads <= limits[1]
        assert tile.threads % config.max_subgroup == 0
    assert matrix_tiles("f32", caps) == (tiles if config is APPLE else ())
    assert not matrix_tiles("int8", caps)


def test_choices_are_kept_and_give_way_where_there_are_no_matrix_units() -> None:
    card = Caps(max_workgroup_bytes=49152, max_invocations=1024, matrices=(NVIDIA,), f16=True, flops_per_second=2e12)
    choice = choose("f16", 2048, 9728, 2560, "nt", card)
    assert (choice.tile.BM, choice.slices) == (128, 1)
    numbers, name = to_numbers(choice), key("f16", 2048, 9728, 2560, "nt")
    assert from_numbers(numbers) == choice
    assert is_choice(name, numbers)
    assert not is_choice(name, (*numbers[:7], 1000, *numbers[8:]))
    assert not is_choice(key("f32", 64, 64, 64, "nt"), (*numbers[:2], 31, *numbers[3:]))
    assert is_choice(name, (*numbers[:-3], *numbers[-2:])), "as earlier versions kept it"
    few = choose("f16", 512, 9728, 2560, "nt", card)
    assert (few.tile.BN, few.slices) == (160, 1), "304 workgroups of 128 columns would be a wave of 264 and a bit"
    without = replace(card, matrices=())
    assert not isinstance(choose("f16", 2048, 9728, 2560, "nt", without).tile, MatrixTile)
    assert choose("f16", 64, 64, 4096, "nt", card).slices > 1


def test_matrices_of_f32_take_products_whose_rows_are_whole_words() -> None:
    apple = Caps(max_workgroup_bytes=32768, max_invocations=1024, matrices=(APPLE,), f16=True)

    def on_units(*asked: Any, **options: Any) -> bool:
        return isinstance(choose("f32", *asked, apple, **options).tile, MatrixTile)

    assert on_units(70, 132, 64, "nn")
    assert on_units(70, 132, 64, "nt", split=False)
    assert not on_units(70, 132, 64, "tn")
    assert not on_units(70, 130, 64, "nn")
    assert not on_units(70, 132, 72, "nn")
    assert not on_units(70, 132, 64, "nn", matrices=False)
    choice = choose("f32", 512, 1024, 2560, "nn", apple)
    assert is_choice(key("f32", 512, 1024, 2560, "nn"), to_numbers(choice))
    assert choice.tile.workgroup_bytes("f32") <= 32768
    both = replace(apple, matrices=(APPLE, NVIDIA))
    assert choose("f16", 512, 1024, 2560, "nt", both).tile.MM == 16
