"""The benchmarks of kernels: on a tiny model they time every row and what they compute is right."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest

from entrenar_gpu.cli.bench.gemm import bench_gemm, cases, projection_shapes
from entrenar_gpu.cli.bench.generate import bench_generate
from entrenar_gpu.cli.bench.ops import bench_ops
from entrenar_gpu.cli.bench.train import bench_train
from entrenar_gpu.config import presets
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.gpu import choose_gpu, gpu_caps
from entrenar_gpu.gpu.measure import TOLERANCES
from entrenar_gpu.model.registry import parse_model_config
from entrenar_gpu.session.plan_report import plan_run

measuring = importlib.import_module("entrenar_gpu.gpu.measure")  # not the function that the room hands on by this name
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY = parse_model_config({**presets.SHAPES["qwen3-0.6b"], **SMALL, "head_dim": 32})


def test_matmuls_of_a_step_each_once():
    every = list(cases(TINY, [8, 16], 4, ["f32", "int8"]))
    assert len(every) == len(set(every)) == 42
    assert projection_shapes(TINY) == [(128, 64), (64, 64), (64, 128)]


def test_products_are_timed_and_checked(device, kernels, monkeypatch):
    monkeypatch.setattr(measuring, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr("entrenar_gpu.cli.bench.gemm.VOCABULARY_SHARD", 64)
    wanted = [p for p in cases(TINY, [8], 4, ["f32", "int8"]) if p.name.split()[-1] in ("128x64", "128", "page")]
    rows = list(bench_gemm(device, wanted, kernels))
    assert [row["name"] for row in rows] == [p.name for p in wanted]
    assert all(row["within"] and row["seconds"] > 0 for row in rows)


def test_a_wrong_product_is_reported(device, monkeypatch):
    monkeypatch.setattr(measuring, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setitem(TOLERANCES, "f32", 0.0)
    wanted = [p for p in cases(TINY, [8], 4, ["f32"]) if p.name == "forward 64x64"]
    assert not any(row["within"] for row in bench_gemm(device, wanted))


def test_every_kernel_of_a_step_is_timed(device, monkeypatch):
    monkeypatch.setattr(measuring, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr("entrenar_gpu.cli.bench.ops.VOCABULARY_SHARD", 64)
    monkeypatch.setattr("entrenar_gpu.cli.bench.ops.PARAMETERS", 1024)
    rows = list(bench_ops(device, TINY, 2, 16))
    assert {row["kernel"] for row in rows} >= {"norm_grad", "norm_rope_grad", "swiglu_grad", "attention_grad", "adam"}
    assert all(row["seconds"] > 0 and row["gbytes_per_second"] > 0 for row in rows)


@pytest.mark.gpu
def test_training_is_measured_beside_what_a_product_alone_reaches(monkeypatch):
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    raw = {**presets.SHAPES["qwen3-0.6b"], **small, "head_dim": 32, "num_hidden_layers": 2, "vocab_size": 256}
    monkeypatch.setitem(presets.SHAPES, "tiny", raw)
    monkeypatch.setattr(measuring, "WARM_UP_SECONDS", 0.0)
    config = TrainConfig(batch=1, seq=32, rank=4, precision="int8", trace_level="kernel")
    result = bench_train("tiny", config, 2)
    assert result["planned_bytes"] == result["allocated_bytes"]
    assert result["ceiling_tflops"] > 0
    assert result["ceiling_share"] == pytest.approx(result["tflops"] / result["ceiling_tflops"])
    assert result["flops_per_step"] > 6 * 32 * 2 * 4 * 64 * 64  # forward and input gradient of every projection
    assert sum(row["share"] for row in result["kernels"]) == pytest.approx(1)
    with_copies = bench_train("tiny", replace(config, memory_budget=1.0), 2)
    assert with_copies["planned_bytes"] == with_copies["allocated_bytes"] > result["planned_bytes"]
    assert with_copies["loss"] == result["loss"]
    answers = bench_train("tiny", config, 2, labelled=0.25)  # the mean over fewer tokens, and fewer products
    assert answers["loss"] == pytest.approx(result["loss"], rel=0.05)
    assert result["flops_per_step"] - answers["flops_per_step"] == 0.75 * 2 * 2 * 32 * 64 * 256


@pytest.mark.gpu
def test_generation_is_measured_and_held_to_what_memory_allows(monkeypatch):
    raw = {**presets.SHAPES["qwen3-0.6b"], **SMALL, "head_dim": 32, "num_hidden_layers": 2, "vocab_size": 256}
    monkeypatch.setitem(presets.SHAPES, "tiny", raw)
    monkeypatch.setattr(measuring, "WARM_UP_SECONDS", 0.0)
    config = TrainConfig(batch=2, seq=40, precision="f32", trace_level="kernel")
    one, two, *kernels = bench_generate("tiny", config, [1, 2], 32, 4)
    assert one["planned_bytes"] == one["allocated_bytes"]
    assert two["decode_tokens_per_second"] == pytest.approx(2 / two["step_seconds"])
    assert 0 < one["floor_seconds"] < two["floor_seconds"]  # the second sequence's keys and values are read too
    of_a_step = [row for row in kernels if row["name"] == "pass.1"]
    assert sum(row["share"] for row in of_a_step) == pytest.approx(1)
    assert {row["kernel"].split("/")[1].split()[0] for row in of_a_step} >= {"gemv", "cached_attention"}


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_what_is_measured_is_what_a_run_would_train(method, monkeypatch, tmp_path):
    raw = {**presets.SHAPES["qwen3-0.6b"], "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    raw |= {"num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 1, "vocab_size": 256}
    monkeypatch.setitem(presets.SHAPES, "tiny", raw)
    monkeypatch.setattr(measuring, "WARM_UP_SECONDS", 0.0)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw | {"torch_dtype": "bfloat16"}))
    config = TrainConfig(model=str(path), batch=1, seq=16, rank=4, method=method)
    result = bench_train("tiny", config, 1)
    caps = gpu_caps(choose_gpu().gpu)
    assert result["planned_bytes"] == plan_run(config, caps, 1 << 40, False).plan.peak_bytes
    assert 0 < result["loss"] < 20
