"""`entrenar-gpu shader`: every op prints what it launches, with no GPU; bad input is one line."""

from __future__ import annotations

import importlib

import pytest

from entrenar_gpu.cli.main import run
from entrenar_gpu.cli.op_programs import PROGRAMS
from entrenar_gpu.cli.shader import dispatches, usage, workgroup_bytes
from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.gpu.kernel import shader_files
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.session.plan_report import PROFILES

choice = importlib.import_module("entrenar_gpu.gpu.choice")
# Weights of benchmarks, an op on many small tensors, ops that only answers are made with, and products on matrix units.
OF_INT8 = {"matmul_matrix_int8", "rotated_rows", "nf4_panels"}
ON_MATRIX_UNITS = {
    "matmul_matrix",
    "attention_matrix",
    "attention_dscores_matrix",
    "attention_grad_matrix",
    *OF_INT8,
}
OF_ANSWERS = {"argmax", "cache_write", "cache_heads", "cached_attention", "cached_attention_block"}
OF_ANSWERS |= {"cached_attention_join", "gemv"}
MADE_ELSEWHERE = {"random", "decide", *OF_ANSWERS, *ON_MATRIX_UNITS}  # no profile has matrix units


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("a GPU was looked for")

    monkeypatch.setattr(choice, "gpus", refuse)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("op", PROGRAMS)
def test_every_op_is_printed_at_its_example(op, profile, capsys):
    caps = PROFILES[profile]
    for precision in PROGRAMS[op].precisions:
        if precision == "f16" and not caps.f16:
            continue
        words = [op, "--shape", "x".join(map(str, PROGRAMS[op].example)), "--precision", precision]
        assert run(["shader", *words, "--profile", profile, "--gradient"]) == 0
        text = capsys.readouterr().out
        found = dispatches(op, words[2], precision, caps)
        assert all(f"// {d.launch.shader}, for {d.node.op}" in text and d.text in text for d in found)
        assert all(0 <= workgroup_bytes(d.text) <= caps.max_workgroup_bytes for d in found)
        assert run(["shader", *words, "--profile", profile, "--list"]) == 0
        listed = capsys.readouterr().out
        assert listed.count("bytes of workgroup memory") == len(found)


def test_all_shaders_can_be_printed():
    used = set()
    for op, program in PROGRAMS.items():
        shape = "x".join(map(str, program.example))
        for precision in program.precisions:
            used |= {d.launch.shader for d in dispatches(op, shape, precision, PROFILES["large"])}
    assert used == set(shader_files()) - MADE_ELSEWHERE


def test_the_text_is_what_a_plan_launches():
    caps = PROFILES["large"]
    graph = Graph()
    PROGRAMS["linear"].record(graph, "int8", 512, 2560, 9728, 16)
    (steps,) = make_plan({"": graph}, caps).steps.values()
    forward = [d.launch for d in dispatches("linear", "512x2560x9728x16", "int8", caps) if not d.gradient]
    assert [(x.shader, x.constants, x.grid) for x in forward] == [
        (x.shader, x.constants, x.grid) for s in steps for x in s.launches
    ]


def test_the_gradient_is_left_out_unless_asked_for(capsys):
    words = ["shader", "rms_norm", "--shape", "7x64"]
    assert run(words) == 0
    plain = capsys.readouterr().out
    assert "rstd[row] = scale" in plain
    assert "dx[" not in plain
    assert run([*words, "--gradient"]) == 0
    assert "dx[" in capsys.readouterr().out


def test_facts_of_a_launch(capsys):
    assert run(["shader", "matmul", "--shape", "64x128x256", "--profile", "webgpu", "--list"]) == 0
    first = capsys.readouterr().out.split("matmul, for matmul (gradient)")[0]
    assert first.splitlines()[0] == "matmul, for matmul"
    assert "of workgroup memory" in first
    assert "a              read       f32 64x256, by 4" in first
    assert "c              read_write f32 64x128, by 4" in first
    assert workgroup_bytes("var<workgroup> a: array<vec4<f16>, 8>;\nvar<workgroup> b: f32;") == 8 * 8 + 4


def test_ops_are_listed_with_their_sizes(capsys):
    assert run(["shader", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [usage(op) for op in sorted(PROGRAMS)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name an op, or give --list"),
        (["convolution"], "'convolution' is not one of adam, "),
        (["attention"], "missing; attention --shape rows x tokens x heads x kv_heads x head, as in 1x512x32x8x128"),
        (["linear", "--shape", "512x2560"], "'512x2560' does not fit; linear --shape tokens x out x in x [rank]"),
        (["linear", "--shape", "1x2x3x4x5"], "does not fit"),
        (["linear", "--shape", "1x-2x3"], "does not fit"),
        (["linear", "--shape", "1x2x٣"], "does not fit"),
        (["linear", "--shape", "1x0x3"], "has a size that no device takes"),
        (["linear", "--shape", "1x9999999999x3"], "has a size that no device takes"),
        (["swiglu", "--shape", "2147483647x1000"], "binds at most"),
        (["attention", "--shape", "1x512x32x7x128"], "do not fit"),
        (["attention", "--shape", "1x512x1x1x300"], "heads of 300 columns"),
        (["linear", "--shape", "64x64x64", "--precision", "f16"], "desktop has no f16 arithmetic"),
        (["linear", "--shape", "64x64x64", "--precision", "fp8"], "'fp8' is not one of f32, f16, int8"),
        (["swiglu", "--shape", "64x64", "--precision", "int8"], "'int8' is not one of f32"),
        (["linear", "--shape", "64x64x64", "--profile", "toaster"], "'toaster' is not one of webgpu, desktop, large"),
        (["linear", "--shape", "64x64x64", "--profile", "webgpu", "--device", "0"], "give it or --device, not both"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert run(["shader", *words]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
