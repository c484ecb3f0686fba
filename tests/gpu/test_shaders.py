"""Shader templates on paper: every kernel of every case renders, and stays within what WebGPU guarantees."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace

import jinja2
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.fuse_rows import fuse_rows
from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.dtypes import ELEMENT_BYTES
from entrenar_gpu.gpu.kernel import render, shader_files
from entrenar_gpu.graph.caps import Caps
from entrenar_gpu.graph.launch import Launch
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.ops.half import from_half, to_half
from tests.helpers.cases import CASES
from tests.helpers.equivalence import build, plan_of
from tests.ops import (
    test_argmax,
    test_attention_matrix,
    test_cached_attention,
    test_gemv,
    test_half,
    test_kernels,
    test_low_precision,
    test_low_rank,
    test_optimizer,
)

LARGE = replace(
    Caps("large"),
    max_binding_bytes=2**31 - 4,
    max_workgroup_bytes=48 << 10,
    max_invocations=1024,
    max_storage_buffers=32,
    f16=True,
    subgroups=True,
)
BYTES = {"f32": 4, "u32": 4, "i32": 4, "vec2<f32>": 8, "vec4<f32>": 16, "vec2<u32>": 8, "vec4<u32>": 16, "vec4<f16>": 8}
# `random` fills weights for benchmarks: nothing depends on its values.
TEMPLATES = sorted(shader_files().keys() - {"random"})

# Kernels for optional features, in test_low_precision.py and test_matrix_*.py, and one that binds many buffers.
NEED_FEATURES = {
    "cache_heads",
    "matmul_f16",
    "matmul_matrix",
    "matmul_matrix_int8",
    "rotated_rows",
    "nf4_panels",
    "attention_matrix",
    "attention_dscores_matrix",
    "attention_grad_matrix",
    "cached_attention_block",
}


def other_graphs() -> dict[str, Graph]:
    """The ops that are never differentiated."""
    graphs = {f"optimizer {kind}": row.graph() for kind, row in test_optimizer.KINDS.items()}
    for size in (640, 77):
        graph = graphs[f"quantise {size}"] = Graph()
        _, absmax = ops.nf4_quantize(graph.tensor("weight", (size,), "bf16"))
        ops.nf4_quantize_scales(absmax, graph.tensor("code", (256,)), graph.tensor("steps", (65536,), "u8"))
    graphs["half"] = Graph()
    from_half(*to_half(graphs["half"].tensor("x", (7, 66))))
    for tokens in (5, 18):
        graphs[f"cache {tokens}"] = test_cached_attention.graph_of(tokens, 4, 2, 24, window=70, softcap=1.5)
    for kind, sizes in test_gemv.SIZES.items():
        graphs |= {f"rows {kind} {n}x{k}": test_gemv.graph_of(kind, n, k, 3) for n, k in sizes}
    for double in (False, True):
        for rows in (3, 40):
            merged = graphs[f"rows merged {rows} {double}"] = test_gemv.merged_graph(double, rows)
            fuse_rows(merged, Caps())
    graphs["argmax"] = test_argmax.graph_of(3, 5000)
    graphs["linear"] = test_low_precision.Layer((65, 128, 192, 8), "int8").graph
    return graphs


@functools.cache
def launches(caps: Caps) -> list[tuple[str, Launch, str]]:
    """(case, launch, rendered text) of everything the tests know."""
    plans = {name: plan_of(case, build(case), caps, keep=False) for name, case in CASES.items()}
    plans |= {name: make_plan({name: graph}, caps) for name, graph in other_graphs().items()}
    for name in ("heads normed", "heads"):
        graph = test_cached_attention.heads_graph(normed="normed" in name)
        fuse_rows(graph, caps)
        plans[name] = make_plan({name: graph}, caps)
    every = [(name, launch) for name, plan in plans.items() for s in plan.steps[name] for launch in s.launches]
    return [(name, launch, render(launch)) for name, launch in every]


def workgroup_bytes(code: str) -> int:
    total = 0
    for declared in re.findall(r"var<workgroup> \w+: ([^;]+);", code):
        array = re.fullmatch(r"array<([\w<>]+), (\d+)>", declared.strip())
        total += BYTES[array[1]] * int(array[2]) if array else BYTES[declared.strip()]
    return total


def invocations(code: str) -> int:
    (size,) = re.findall(r"@compute @workgroup_size\(([\d, ]+)\)", code)
    return math.prod(int(n) for n in size.split(","))


@pytest.mark.parametrize("caps", [Caps(), LARGE], ids=lambda caps: caps.name)
def test_kernels_stay_within_the_limits(caps):
    for name, launch, code in launches(caps):
        assert workgroup_bytes(code) <= caps.max_workgroup_bytes, (name, launch.shader)
        assert invocations(code) <= caps.max_invocations, (name, launch.shader)
        assert len(launch.bindings) <= caps.max_storage_buffers, (name, launch.shader)
        assert max(launch.grid) <= caps.max_workgroups, (name, launch.shader)


def test_portable_kernels_need_no_optional_feature():
    for name, _, code in launches(Caps()):
        assert not re.search(r"\b(f16|subgroup\w*|enable|requires)\b", re.sub("//.*", "", code)), name


@pytest.mark.parametrize("caps", [Caps(), LARGE], ids=lambda caps: caps.name)
def test_kernels_declare_what_they_use_and_use_what_they_declare(caps):
    for name, launch, code in launches(caps):
        names = [b.name for b in launch.bindings]
        assert len(set(names)) == len(names), (name, launch.shader)
        body = code.split("\n", len(names))[-1]
        for binding in launch.bindings:
            assert re.search(rf"\b{binding.name}\[", body), f"{name}: {launch.shader} never uses {binding.name}"
            written = re.search(rf"\b{binding.name}\[[^=;]*\] (=|\+=|-=|\*=) ", body)
            assert bool(written) == binding.write, f"{name}: {launch.shader} binds {binding.name} wrongly"
        assert "{{" not in code
        assert "{%" not in code


def test_vectors_divide_what_they_view():
    for name, launch, _ in launches(LARGE):
        for binding in launch.bindings:
            element = ELEMENT_BYTES[binding.tensor.dtype] if binding.tensor.dtype == "f16" else 4
            assert binding.tensor.nbytes % (binding.vector * element) == 0, (name, launch.shader, binding.name)


def test_every_template_is_rendered_by_some_case():
    used = {launch.shader for _, launch, _ in launches(Caps())}
    assert used == set(TEMPLATES) - NEED_FEATURES


def test_every_template_has_a_planted_fault():
    planted = {row[0] for row in (*test_kernels.FAULTS, *test_optimizer.FAULTS)} | set(test_kernels.SPLIT.values())
    planted |= {row[0] for row in (*test_low_precision.FAULTS, *test_half.FAULTS, *test_low_rank.FAULTS)}
    planted |= {"nf4_quantize", "nf4_quantize_scales", "nf4_mean"}  # test_quantize.py
    planted |= {row[0] for row in (*test_argmax.FAULTS, *test_cached_attention.FAULTS, *test_gemv.FAULTS)}
    planted |= {row[0] for row in test_attention_matrix.FAULTS}
    planted.add("matmul_matrix")  # test_matrix_units.py
    planted |= {"matmul_matrix_int8", "rotated_rows", "nf4_panels"}  # test_matrix_int8.py
    assert planted == set(TEMPLATES)


@pytest.mark.parametrize("stem", TEMPLATES)
def test_templates_say_what_they_do_and_on_which_grid(stem):
    head = re.split(r"@compute|var<workgroup>|^fn ", shader_files()[stem].read_text(), flags=re.M)[0]
    assert head.lstrip().startswith(("//", "{% import"))
    assert re.search(r"[Gg]rid: |One workgroup of 256", head)


def test_a_missing_constant_is_an_error():
    _, launch, _ = next(row for row in launches(Caps()) if row[1].shader == "softmax")
    with pytest.raises(jinja2.UndefinedError, match="ROWS"):
        render(replace(launch, constants={"mode": "softmax", "N": 4}))
