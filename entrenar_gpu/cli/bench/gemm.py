"""`entrenar-gpu bench gemm`: matmuls at a model's shapes, timed and checked on sampled rows in one run.

A matmul is timed as its op runs in a training step; for the low precisions `product_tflops` is of the multiplication
alone, without converting its operands, and `kept_tflops` with a weight that was converted before. Times are of many
repetitions submitted together, after warming up: clocks of an idle card take a tenth of a second to rise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from entrenar_gpu.gpu import Device, KernelCache, MatmulCase, measure
from entrenar_gpu.model import ModelConfig
from entrenar_gpu.ops.gemm.tiles import Arithmetic, arithmetic_on

VOCABULARY_SHARD = 8192  # rows of a shard of the vocabulary that is timed


def cases(model: ModelConfig, rows: Sequence[int], rank: int, precisions: Sequence[Arithmetic]) -> Iterator[MatmulCase]:
    """Every matmul of a QLoRA step over a model's projections, without doubles: base, adapters, vocabulary."""
    for t in rows:
        for n, k in projection_shapes(model):
            for p in precisions:
                yield forward(n, k, p, t)
                yield MatmulCase(f"input gradient {n}x{k}", p, t, k, n, weight=True)
        for width in sorted({size for shape in projection_shapes(model) for size in shape}):
            yield MatmulCase(f"x A^T {width}", "f32", t, rank, width, transpose_b=True)
            yield MatmulCase(f"v^T x {width}", "f32", rank, width, t, transpose_a=True)
            yield MatmulCase(f"dy B {width}", "f32", t, rank, width)
            yield MatmulCase(f"dy^T u {width}", "f32", width, rank, t, transpose_a=True)
        yield MatmulCase("vocabulary shard", "f32", t, VOCABULARY_SHARD, model.hidden_size, transpose_b=True)


def forward(n: int, k: int, precision: Arithmetic, rows: int) -> MatmulCase:
    """x W^T; in f32, W is dequantised transposed, so that B lies as [K, N]."""
    return MatmulCase(f"forward {n}x{k}", precision, rows, n, k, transpose_b=precision != "f32", weight=True)


def projection_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """(out-features, in-features) of the projections, each once."""
    shapes = [spec.shape for spec in model.weights if spec.kind == "projection"]
    return [(n, k) for n, k in dict.fromkeys(shapes)]


def bench_gemm(
    device: Device, wanted: Sequence[MatmulCase], kernels: KernelCache | None = None
) -> Iterator[dict[str, Any]]:
    """Seconds, TFLOP/s and error of each matmul, as it is measured."""
    kernels = kernels or KernelCache(device)
    for case in wanted:
        if case.arithmetic == "f16" and not device.caps.f16:
            continue
        yield measure(device, kernels, replace(case, arithmetic=arithmetic_on(case.arithmetic, device.caps)))
