"""Kernels summed over layers, two runs compared by those sums, and the gate that CI asks for."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from rich.console import Console

from entrenar_gpu.cli.main import run as cli
from entrenar_gpu.events import Span
from observability import observe
from observability.read import read_trace, step_table
from observability.report.command import SLOWER, main, make_report
from observability.report.kernels import ceilings, kernel_report
from tests import ROOT
from tests.helpers import made_traces as made
from tests.helpers.step_records import START_NS, run_info, run_summary, step_record

LAYERS, STEPS = 36, 24
MS = 1_000_000
# (operation, shape, milliseconds, FLOP, bytes) of one layer's kernels in each pass.
KERNELS = (
    ("attention", "512x2560", 0.4, 10**9, 10**7),
    ("matmul", "512x9728", 1.0, 10**10, 10**8),
    ("matmul", "512x2560", 0.6, 10**9, 10**7),
)
SCHEMA = json.loads((ROOT / "observability" / "report" / "report.schema.json").read_text())
CONFIG = {"batch": 1, "seq": 512, "rank": 16, "target": "all"}


def traced(
    folder: Path, slower: Mapping[str, float] = MappingProxyType({}), seed: int = 0, layers: int = LAYERS, **facts: Any
) -> Path:
    """A run at kernel level whose kernels take their time, times `slower` by operation, give or take 1%."""
    observer = observe(folder, level="kernel")
    observer.run_started(run_info(**({"adapter": "NVIDIA H200", "total_steps": STEPS, "config": CONFIG} | facts)))
    rng, now = np.random.default_rng(seed), START_NS
    for step in range(1, STEPS + 1):
        spans, end = step_spans(now, slower, rng, layers)
        seconds = (end - now) / 1e9
        observer.step_finished(step_record(step, spans=spans, start_ns=now, end_ns=end, step_seconds=seconds))
        now = end
    observer.run_finished(run_summary(STEPS))
    return folder


def step_spans(
    now: int, slower: Mapping[str, float], rng: np.random.Generator, layers: int
) -> tuple[tuple[Span, ...], int]:
    """A forward pass, with 5 ms before it in which the GPU has nothing to do."""
    spans = [Span("data", "phase", now, now + 5 * MS), Span("forward", "phase", 0, 0, None, True)]
    begin = at = now + 5 * MS
    for layer in range(layers):
        place = len(spans)
        spans.append(Span(f"layer {layer}", "layer", at, at, 1, True, {"layer": layer}))
        for name, shape, ms, flops, moved in KERNELS:
            end = at + round(ms * slower.get(name, 1.0) * rng.normal(1, 0.01) * MS)
            facts = {"kernel": name, "shape": shape, "flops": flops, "bytes": moved}
            spans.append(Span(f"layers.{layer}.block/{name}", "kernel", at, end, place, True, facts))
            at = end
        spans[place] = Span(f"layer {layer}", "layer", spans[place].start_ns, at, 1, True, {"layer": layer})
    spans[1] = Span("forward", "phase", begin, at, None, True)
    return tuple(spans), at


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return traced(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return traced(tmp_path_factory.mktemp("slow"), {"attention": 1.5}, seed=1)


def test_kernels_are_summed_over_layers_and_shapes(plain: Path) -> None:
    found = kernel_report(step_table(read_trace(plain), "plain"))
    assert [(row.group.operation, row.group.shape) for row in found.rows] == [
        ("matmul", "512x9728"),
        ("matmul", "512x2560"),
        ("attention", "512x2560"),
    ]
    largest = found.rows[0]
    assert largest.group.launches == LAYERS
    assert largest.seconds == pytest.approx(0.036, rel=0.01)
    assert largest.share == pytest.approx(0.5, abs=0.01)
    assert largest.flops_per_second == pytest.approx(10**10 / 0.001, rel=0.01)
    assert largest.bytes_per_second == pytest.approx(10**8 / 0.001, rel=0.01)
    assert found.launches == 3 * LAYERS
    assert found.idle_seconds == pytest.approx(0.005, rel=0.01)
    assert found.busy_share == pytest.approx(72 / 77, abs=0.005)
    assert (found.ceilings.flops, found.ceilings.bytes) == (67e12, 4.8e12)


@pytest.mark.parametrize(
    ("adapter", "precision", "flops", "moved"),
    [
        ("NVIDIA H100 PCIe", "f32", 51e12, 2e12),
        ("NVIDIA H100 80GB HBM3", "f16", None, 3.35e12),
        ("NVIDIA GeForce RTX 4090", "f32", 82.6e12, 1008e9),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "f32", None, None),
        ("llvmpipe (LLVM 15)", "f32", None, None),
    ],
)
def test_ceilings_are_those_of_the_data_sheet_or_unknown(
    tmp_path: Path, adapter: str, precision: str, flops: float | None, moved: float | None
) -> None:
    table = step_table(read_trace(made.write(tmp_path / "trace.jsonl", made.plain_steps(3))), "")
    table.facts.update({"entrenar.gpu.adapter": adapter, "entrenar.run.precision": precision})
    assert (ceilings(table).flops, ceilings(table).bytes) == (flops, moved)


def test_all_attention_kernels_slower_is_named_as_that(plain: Path, slow: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    comparison = make_report(str(slow), against=str(plain), html=str(tmp_path / "r.html"), console=console).comparison
    assert comparison is not None
    named = comparison.most_changed
    assert named is not None
    assert (named.level, named.label) == ("kernels", "attention (all 36 of a step)")
    assert named.ratio == pytest.approx(1.5, rel=0.01)
    assert not any(change.level in ("kernel", "layer") for change in comparison.changes)  # the 36 are the one
    assert "most changed: attention (all 36 of a step): 14.4 ms to 21.6 ms (+5" in comparison.verdict()
    assert "attention (all 36 of a step)" in (tmp_path / "r.html").read_text(encoding="utf-8").split("<script")[0]


def test_one_shape_of_an_operation_is_named_apart(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slower = tuple((n, s, ms * (1.5 if s == "512x9728" else 1), f, b) for n, s, ms, f, b in KERNELS)
    monkeypatch.setattr(f"{__name__}.KERNELS", slower)
    comparison = make_report(str(traced(tmp_path, seed=2)), against=str(plain), json_out="-").comparison
    assert comparison is not None
    assert comparison.most_changed is not None
    assert comparison.most_changed.label == "matmul 512x9728 (all 36 of a step)"


def test_equal_runs_show_no_change_and_pass_the_gate(plain: Path, tmp_path: Path) -> None:
    again = traced(tmp_path, seed=3)
    comparison = make_report(str(again), against=str(plain), json_out="-", fail_above=5).comparison
    assert comparison is not None
    assert (comparison.changes, comparison.differs, comparison.failed) == ([], [], False)
    assert main([str(again), "--against", str(plain), "--fail-above", "5", "--json", str(tmp_path / "r.json")]) == 0


def test_the_gate_has_a_status_of_its_own(plain: Path, slow: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    options = ["report", str(slow), "--against", str(plain), "--json", str(out), "--fail-above"]
    assert cli([*options, "20"]) == SLOWER == 3  # the step is 9% slower, attention 50%
    told = json.loads(out.read_text())
    Draft202012Validator(SCHEMA).validate(told)
    assert told["comparison"]["failed"] is True
    assert told["comparison"]["slower"][0]["span"] == "attention (all 36 of a step)"
    assert cli([*options, "60"]) == 0
    assert json.loads(out.read_text())["comparison"]["failed"] is False


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"adapter": "NVIDIA L4"}, "GPU NVIDIA H200 there, NVIDIA L4 here"),
        ({"config": CONFIG | {"seq": 1024}}, "seq 512 there, 1024 here"),
        ({"precision": "int8"}, "precision f32 there, int8 here"),
    ],
)
def test_runs_of_different_kinds_are_warned_of_and_pass_no_gate(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], facts: dict[str, Any], said: str
) -> None:
    other = traced(tmp_path / "run", layers=2, **facts)
    assert main([str(other), "--against", str(plain)]) == 0
    assert f"not alike: {said}" in capsys.readouterr().out
    assert main([str(other), "--against", str(plain), "--fail-above", "5"]) == 2
    assert said in capsys.readouterr().err


def test_a_gate_needs_something_to_compare_with(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(plain), "--fail-above", "5"]) == 2
    assert "--fail-above: --against names no run" in capsys.readouterr().err
    assert main([str(plain), "--against", str(plain), "--fail-above", "-1"]) == 2


def test_the_schema_holds_for_any_run_and_is_strict_about_what_it_names(plain: Path, tmp_path: Path) -> None:
    Draft202012Validator.check_schema(SCHEMA)
    validator = Draft202012Validator(SCHEMA)
    for steps in (1, 12, 60):
        path = made.write(tmp_path / "trace.jsonl", made.plain_steps(steps))
        told = make_report(str(path), json_out=str(tmp_path / "r.json")).to_json()
        validator.validate(told)
    for key in SCHEMA["required"]:
        assert list(validator.iter_errors({k: v for k, v in told.items() if k != key})), key


def test_kernels_of_a_sample_of_steps_are_summed_and_shape_no_baseline(tmp_path: Path) -> None:
    steps = made.plain_steps(60)
    for step in steps[::10]:
        step.kernels = 2
    table = step_table(read_trace(made.write(tmp_path / "trace.jsonl", steps)), "")
    assert {kind.level for kind in table.kinds} == {"phase", "layer"}
    assert table.kernels is not None
    assert table.kernels.steps.tolist() == [1, 11, 21, 31, 41, 51]
