"""Prints, as JSON, the WGSL of every op and of matmuls on matrix units: [[shader, text], ...], for Tint to type.

`make wgsl` gives it to scripts/wgsl_check.mjs. Devices are made up, so that no GPU is needed: WebGPU's guaranteed
limits, a desktop card, and what NVIDIA, AMD, Intel and Apple report of matrix units (tests/ops/test_matrix_units.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

from entrenar_gpu import ops
from entrenar_gpu.compiler import make_plan
from entrenar_gpu.compiler.autodiff import backward
from entrenar_gpu.gpu.engines.dawn import Dawn
from entrenar_gpu.gpu.kernel import render
from entrenar_gpu.gpu.measure import MatmulCase, Program
from entrenar_gpu.graph import Caps, Graph, MatrixConfig
from entrenar_gpu.ops.gemm.tiles import Arithmetic, arithmetic_on
from entrenar_gpu.session.plan_report import PROFILES
from tests.helpers.cases import CASES
from tests.helpers.equivalence import build

LARGE_PACE = 1e14  # of a card that is taken for a large one
MATRICES = (
    (MatrixConfig("f16", "f32", 16, 16, 16, 32, 32), MatrixConfig("i8", "i32", 16, 16, 32, 32, 32)),
    (MatrixConfig("f16", "f32", 16, 16, 16, 32, 64), MatrixConfig("i8", "i32", 16, 16, 16, 32, 64)),
    (MatrixConfig("f16", "f32", 8, 16, 16, 8, 32), MatrixConfig("i8", "i32", 8, 16, 32, 8, 32)),
    (MatrixConfig("f32", "f32", 8, 8, 8, 32, 32),),
)


def graphs() -> Iterator[tuple[Graph, Caps]]:
    """Every case of every op, forward and backward; then matmuls in low precision by kind of device."""
    for case in CASES.values():
        for caps in PROFILES.values():
            yield build(case).graph, caps
    card = PROFILES["desktop"]
    low = [card, *(replace(card, matrices=c, max_workgroup_bytes=49152, max_invocations=1024) for c in MATRICES)]
    for caps in low:
        for arithmetic in ("f32", "f16", "int8"):
            for m in (2048, 70):
                for by_columns in (True, False):
                    case = MatmulCase(
                        "", arithmetic_on(arithmetic, caps), m, 9728, 2560, transpose_b=by_columns, weight=True
                    )
                    yield Program(case).graph, replace(caps, f16=True)
    for caps in low:
        for rank in (16, 40):
            yield layer_graph(arithmetic_on("int8", caps), rank), replace(caps, f16=True)
            yield gradient_graph(rank), caps
            if caps.matrices:
                yield layer_graph("f16", rank), replace(caps, f16=True)
                yield layer_graph("f32", rank), caps
        for e in (64, 80, 128):
            yield attention_graph(e), replace(caps, f16=True)
            yield attention_graph(e), replace(caps, f16=True, flops_per_second=LARGE_PACE)


def layer_graph(arithmetic: Arithmetic, rank: int) -> Graph:
    """Both passes of a projection with an adapter, a bias and a residual, whole tiles and edges."""
    graph, (n, k) = Graph("g"), (320, 4160)
    for t in (128, 70):
        with graph.within(str(t)):
            sizes = {"x": (t, k), "a": (rank, k), "b": (n, rank)}
            x, a, b = (graph.tensor(f"{name}{t}", size, requires_grad=True) for name, size in sizes.items())
            added = graph.tensor(f"bias{t}", (n,)), graph.tensor(f"residual{t}", (t, n))
            weight = ops.Nf4Tensors.declare(graph, f"w{t}", (n, k), True, "bfloat16")
            out = ops.linear(x, weight, None, *added, arithmetic, (a, b, 0.5))
            backward(out, [x, a, b], graph.tensor(f"upstream{t}", out.shape))
    return graph


def gradient_graph(rank: int) -> Graph:
    """An adapter's gradients over more rows than are summed in one launch."""
    graph, rows = Graph("g"), 1500
    wide, thin = graph.tensor("wide", (rows, 320)), graph.tensor("thin", (rows, rank))
    ops.matmul(wide, thin, transpose_a=True)
    ops.matmul(thin, wide, transpose_a=True)
    return graph


def attention_graph(e: int) -> Graph:
    """Both passes of attention in f16, whole blocks and edges, with heads of `e` columns."""
    graph = Graph("g")
    for rows, length in ((2, 256), (1, 70)):
        with graph.within(str(length)):
            tokens = rows * length
            sizes = {"q": 4 * e, "k": 2 * e, "v": 2 * e}
            q, k, v = (graph.tensor(f"{n}{length}", (tokens, size), requires_grad=True) for n, size in sizes.items())
            starts = graph.tensor(f"segment_start{length}", (tokens,), "u32")
            out = ops.attention(q, k, v, starts, rows, 4, 2, "f16")
            backward(out, [q, k, v], graph.tensor(f"upstream{length}", out.shape))
    return graph


def texts() -> dict[str, str]:
    """Shader names by WGSL text."""
    found = {}
    for graph, caps in graphs():
        for step in make_plan({"g": graph}, caps).steps["g"]:
            for launch in step.launches:
                found[Dawn.complete(None, render(launch))] = launch.shader  # type: ignore[arg-type]
    return found


if __name__ == "__main__":
    json.dump([[shader, text] for text, shader in texts().items()], sys.stdout)
