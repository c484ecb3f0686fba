"""Records of a made-up run, shaped as the trainer's, which the tests and the benchmark of tracing give an observer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from entrenar_gpu.events import CheckpointRecord, EvalRecord, RunInfo, RunSummary, SampleRecord, Span, StepRecord

START_NS = 1_780_000_000_000_000_000
STEP_NS = 200_000_000
KERNELS = ("rms_norm", "matmul_nf4", "rope", "attention", "matmul_nf4", "swiglu", "matmul_nf4")
_PHASES = (("data", 0.0, 0.1), ("forward", 0.1, 0.4), ("backward", 0.4, 0.9), ("optimizer", 0.9, 1.0))


def run_info(**changes: Any) -> RunInfo:
    facts: dict[str, Any] = {
        "run_id": "run-7f3a",
        "output": "runs/example",
        "project_version": "0.1.0",
        "adapter": "llvmpipe",
        "backend": "Vulkan",
        "driver": "Mesa 25.0",
        "model": "models/tiny",
        "method": "qlora",
        "precision": "f32",
        "total_steps": 10,
        "first_step": 1,
        "resumes": None,
        "parameters": 1000,
        "trainable_parameters": 10,
        "planned_bytes": 1 << 20,
        "config": {"lr": 1e-3, "text": "Grüße"},
        "start_ns": START_NS,
    }
    return RunInfo(**(facts | changes))


def step_record(step: int, layers: int = 2, kernels: tuple[str, ...] = (), **changes: Any) -> StepRecord:
    """Step `step`, from 1: four phases that fill it, `layers` layers in forward and backward, `kernels` in each."""
    start = START_NS + (step - 1) * STEP_NS
    facts: dict[str, Any] = {
        "step": step,
        "epoch": step / 10,
        "loss": 2.5 / step,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 1000,
        "row_tokens": 1024,
        "step_seconds": STEP_NS / 1e9,
        "tokens_per_second": 1000 / (STEP_NS / 1e9),
        "start_ns": start,
        "end_ns": start + STEP_NS,
        "allocated_bytes": 1 << 20,
        "flops": 10**9,
        "spans": tuple(_spans(start, layers, kernels)),
    }
    return StepRecord(**(facts | changes))


def skipped_step(step: int) -> StepRecord:
    return step_record(step, loss=math.nan, grad_norm=math.inf, skipped=True)


def _spans(start: int, layers: int, kernels: tuple[str, ...]) -> Iterator[Span]:
    index = 0
    for name, begin, end in _PHASES:
        first, last = start + round(begin * STEP_NS), start + round(end * STEP_NS)
        phase = index
        attributes = {"bytes": 4096} if name == "data" else {}
        yield Span(name, "phase", first, last, attributes=attributes)
        index += 1
        if name not in ("forward", "backward"):
            continue
        order = range(layers) if name == "forward" else reversed(range(layers))
        for place, layer in enumerate(order):
            bounds = [first + (last - first) * (place + part) // layers for part in (0, 1)]
            yield Span(f"layer {layer}", "layer", bounds[0], bounds[1], phase, True, {"layer": layer})
            parent = index
            index += 1
            for number, kernel in enumerate(kernels):
                edges = [bounds[0] + (bounds[1] - bounds[0]) * (number + part) // len(kernels) for part in (0, 1)]
                facts = {"kernel": kernel, "shape": "512x64x64", "bytes": 1 << 16, "flops": 4_194_304}
                yield Span(kernel, "kernel", edges[0], edges[1], parent, True, facts)
                index += 1


def eval_record(step: int) -> EvalRecord:
    end = START_NS + step * STEP_NS
    return EvalRecord(step, 1.5, math.exp(1.5), 500, end - 2_000_000, end - 1_000_000)


def sample_record(step: int) -> SampleRecord:
    end = START_NS + step * STEP_NS
    return SampleRecord(step, [{"prompt": "secret"}] * 2, ["answer"] * 2, end - 2_000_000, end - 1_000_000)


def checkpoint_record(step: int) -> CheckpointRecord:
    end = START_NS + step * STEP_NS
    return CheckpointRecord(step, f"runs/example/checkpoint-{step}", 12345, end - 1_000_000, end)


def run_summary(steps: int, status: str = "finished") -> RunSummary:
    return RunSummary(steps, 0, 0.25, steps * STEP_NS / 1e9, "runs/example", status, START_NS + steps * STEP_NS + 5)
