"""Attention to a cache: GPU against NumPy, and that a token's sums have one order whatever else is in the pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.fuse_rows import fuse_rows
from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.executors.numpy_executor import NumpyExecutor
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.caps import Caps
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.ops.cached_attention import SPLIT_ROWS
from tests.helpers.equivalence import check_close, fault

BAR = 4e-6  # of `attention` in helpers/equivalence.py: two products and a softmax
SLOTS, CONTEXT = 3, 150  # three runs of keys, the last cut short


def graph_of(tokens, heads, kv_heads, head, dtype="f32", **options) -> Graph:
    """One pass: k and v go into the cache, and q attends to it."""
    graph = Graph("g")
    q, k, v = (graph.tensor(n, (tokens, h * head)) for n, h in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
    keys, values = (graph.tensor(n, (SLOTS, CONTEXT, kv_heads * head), dtype, "state") for n in ("keys", "values"))
    slots, positions = (graph.tensor(n, (tokens,), "u32") for n in ("slots", "positions"))
    keys, values = ops.cache_write(keys, values, k, v, slots, positions)
    ops.keep(ops.cached_attention(q, keys, values, slots, positions, heads, kv_heads, **options), "out")
    return graph


def arrays_of(graph: Graph, rng: np.random.Generator) -> dict[str, np.ndarray]:
    arrays = {n: rng.standard_normal(graph.persistents[n].shape) for n in ("q", "k", "v", "keys", "values")}
    tokens = len(arrays["q"])
    # The last token of a slot and the first, those around the seams of runs, and one that fills up the pass.
    places = [(1, 149), (0, 0), (2, 63), (2, 64), (1, 148), (SLOTS, 0), (0, 127)] + [(0, 1 + i) for i in range(11)]
    slots, positions = zip(*places[:tokens], strict=True)
    return arrays | {"slots": np.array(slots), "positions": np.array(positions)}


def run(executor, arrays) -> dict[str, np.ndarray]:
    try:
        for name, values in arrays.items():
            executor.write(name, values)
        executor.run("g")
        return {name: executor.read(name) for name in ("out", "keys", "values")}
    finally:
        executor.close()


def on_device(kernels, graph, arrays, as_card: bool = False) -> dict[str, np.ndarray]:
    """`as_card`: with the kernels that a card gets, whatever the adapter is."""
    caps = replace(kernels.device.caps, software=False) if as_card else kernels.device.caps
    return run(Replay(kernels.device, make_plan({"g": graph}, caps), kernels), arrays)


SHAPES = [(5, 4, 2, 24), (2, 1, 1, 6), (7, 8, 2, 64), (1, 12, 1, 130), (18, 4, 2, 24)]
OPTIONS = [{}, {"window": 70}, {"softcap": 1.5, "scale": 0.3}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "window", "softcap"])
@pytest.mark.parametrize("shape", SHAPES, ids=["x".join(map(str, s)) for s in SHAPES])
def test_gpu_against_numpy(kernels, rng, shape, options):
    graph = graph_of(*shape, **options)
    arrays = arrays_of(graph, rng)
    got, want = on_device(kernels, graph, arrays), run(NumpyExecutor({"g": graph}), arrays)
    for name in ("keys", "values"):
        np.testing.assert_array_equal(got[name], want[name])
    check_close(got["out"], want["out"], want["out"], BAR, "out")
    if shape == SHAPES[2]:
        got = on_device(kernels, graph, arrays, as_card=True)
        check_close(got["out"], want["out"], want["out"], BAR, "out of a card's kernel")


def test_a_cache_in_f16(kernels, rng):
    if not kernels.device.caps.f16:
        pytest.skip("no f16")
    graph = graph_of(5, 4, 2, 24, "f16")
    arrays = arrays_of(graph, rng)
    got, want = on_device(kernels, graph, arrays), run(NumpyExecutor({"g": graph}), arrays)
    np.testing.assert_allclose(got["keys"], want["keys"], atol=0, rtol=2**-10)  # WGSL leaves open which way it rounds
    held = {**arrays, **{name: got[name] for name in ("keys", "values")}, "slots": arrays["slots"]}
    want = run(NumpyExecutor({"g": graph}), held)
    check_close(got["out"], want["out"], want["out"], 1e-3, "out")


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "window", "softcap"])
@pytest.mark.parametrize("shape", [(18, 4, 2, 24), (9, 24, 1, 68), (18, 3, 1, 128)])
def test_prompts_share_a_reading_of_keys(kernels, rng, shape, options):
    """Tokens of several slots in one workgroup; and each alone, bit for bit."""
    if not kernels.device.caps.f16:
        pytest.skip("no f16")
    graph = graph_of(*shape, "f16", low_precision=True, **options)
    arrays = arrays_of(graph, rng)
    got = on_device(kernels, graph, arrays)
    held = {**arrays, **{name: got[name] for name in ("keys", "values")}}
    want = run(NumpyExecutor({"g": graph_of(*shape, "f16", **options)}), held)
    check_close(got["out"], want["out"], want["out"], 1e-3, "out")
    for tokens in ([4], [2, 3, 7, 8]):
        few = {name: held[name][tokens] for name in ("q", "k", "v", "slots", "positions")}
        fewer = graph_of(len(tokens), *shape[1:], "f16", low_precision=True, **options)
        np.testing.assert_array_equal(on_device(kernels, fewer, held | few)["out"], got["out"][tokens])


def test_numpy_against_plain_attention(rng):
    """A whole sequence in one pass is what causal attention makes of it."""
    graph = graph_of(20, 4, 2, 24, window=9)
    arrays = arrays_of(graph, rng) | {"slots": np.full(20, 1), "positions": np.arange(20)}
    plain = Graph("g")
    q, k, v = (plain.tensor(n, arrays[n].shape) for n in "qkv")
    start = plain.tensor("start", (20,), "u32")
    ops.keep(ops.attention(q, k, v, start, 1, 4, 2), "out")
    seen = {name: arrays[name] for name in "qkv"}
    want = NumpyExecutor({"g": plain})
    for name, values in seen.items():
        want.write(name, values)
    want.run("g")
    windowless = run(NumpyExecutor({"g": graph_of(20, 4, 2, 24)}), arrays)["out"]
    np.testing.assert_allclose(windowless, want.read("out"), rtol=0, atol=1e-5)
    assert np.abs(run(NumpyExecutor({"g": graph}), arrays)["out"] - windowless).max() > 0.1


@pytest.mark.parametrize(("options", "as_card"), [(OPTIONS[0], True), (OPTIONS[1], False), (OPTIONS[2], True)])
def test_a_token_alone_or_among_others(kernels, rng, options, as_card):
    """Bit for bit: alone, among a few, and in a pass so long that one workgroup takes all runs of keys."""
    shape = (4, 2, 24)
    many = graph_of(SPLIT_ROWS + 2, *shape, **options)
    arrays = arrays_of(many, rng)
    want = on_device(kernels, many, arrays, as_card)
    held = {name: want[name] for name in ("keys", "values")}
    for rows in ([0], [6], [2, 3, 6, 4]):
        few = {name: arrays[name][rows] for name in ("q", "k", "v", "slots", "positions")} | held
        got = on_device(kernels, graph_of(len(rows), *shape, **options), few, as_card)
        np.testing.assert_array_equal(got["out"], want["out"][rows])


FAULTS = [
    ("cached_attention", "fma(sum, vec4<f32>(fresh), total * old)", "sum + total"),
    ("cached_attention", "min(positions[t], 149u) + 1u", "min(positions[t], 149u)"),
    ("cached_attention_join", "run += 1u", "run += 2u"),
    ("cached_attention_block", "total *= shrink;", ""),
    ("cached_attention_block", "&& at0 < end_0", "&& at0 <= end_0"),
    ("cache_write", "slot >= 3u", "slot >= 2u"),
    ("cache_heads", "slot < 3u", "slot < 2u"),
]


@pytest.mark.parametrize(("shader", "old", "new"), FAULTS)
def test_planted_errors_are_seen(device, rng, shader, old, new):
    from entrenar_gpu.gpu.kernel import KernelCache

    graph = graph_of(18 if shader == "cached_attention" else 5, 4, 2, 24)
    if shader == "cached_attention_block":
        if not device.caps.f16:
            pytest.skip("no f16")
        graph = graph_of(18, 4, 2, 24, "f16", low_precision=True)
    if shader == "cache_heads":
        graph = heads_graph(normed=False)
        fuse_rows(graph, device.caps)
    arrays = {"table": rng.uniform(-1, 1, (CONTEXT, 24))} if shader == "cache_heads" else {}
    arrays |= arrays_of(graph, rng)
    want = run(NumpyExecutor({"g": graph}), arrays)
    with fault(shader, old, new):
        got = on_device(KernelCache(device), graph, arrays)
    wrong = max(np.abs(got[name] - want[name]).max() for name in want)
    assert not wrong <= (2e-2 if shader == "cached_attention_block" else 1e-3)  # f16 rounds the cache itself by 2e-3


def heads_graph(normed: bool, tokens: int = 7, head: int = 24) -> Graph:
    """Queries and keys rotated, after a norm or not, and a cache written: before fusing, three nodes."""
    graph = Graph("g")
    positions, slots = (graph.tensor(n, (tokens,), "u32") for n in ("positions", "slots"))
    table = graph.tensor("table", (CONTEXT, head), role="weight")
    turned = []
    for name, heads in (("q", 4), ("k", 2)):
        x = ops.scale(graph.tensor(name, (tokens, heads * head)), 1.25)
        weight = graph.tensor(f"{name}_weight", (head,), role="weight") if normed else None
        turned.append((x, weight))
    (q, q_weight), (k, k_weight) = turned
    v = ops.scale(graph.tensor("v", (tokens, 2 * head)), 1.25)
    if q_weight is not None and k_weight is not None:
        q = ops.norm_rope(q, q_weight, 1e-6, table, positions, 1.0)
        k = ops.norm_rope(k, k_weight, 1e-6, table, positions, 1.0)
    else:
        q, k = ops.rope(q, table, positions), ops.rope(k, table, positions)
    keys, values = (graph.tensor(n, (SLOTS, CONTEXT, 2 * head), role="state") for n in ("keys", "values"))
    ops.cache_write(keys, values, k, v, slots, positions)
    ops.keep(ops.scale(q, 1.0), "out")
    return graph


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("head", [24, 130])
def test_heads_and_their_cache_in_one_launch(kernels, rng, normed, head):
    graph, fused = heads_graph(normed, head=head), heads_graph(normed, head=head)
    fuse_rows(fused, replace(kernels.device.caps, max_storage_buffers=11))
    assert [node.op for node in fused.nodes] == ["scale"] * 3 + ["cache_heads", "scale"]
    untouched = heads_graph(normed, head=head)
    fuse_rows(untouched, Caps())
    assert len(untouched.nodes) == 7
    arrays = arrays_of(graph, rng) | {"table": rng.uniform(-1, 1, (CONTEXT, head))}
    arrays |= {name: rng.uniform(-0.5, 0.5, head) for name in ("q_weight", "k_weight") if normed}
    want = run(NumpyExecutor({"g": graph}), arrays)
    for got in (run(NumpyExecutor({"g": fused}), arrays), on_device(kernels, fused, arrays)):
        for name, values in want.items():
            check_close(got[name], values, values, 2e-6, name)
