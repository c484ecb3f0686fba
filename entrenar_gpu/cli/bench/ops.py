"""`entrenar-gpu bench ops`: the kernels of a training step that are no matmuls, at a model's shapes.

Each op is recorded with its gradient, over random inputs, and every node is timed by itself over many repetitions. A
node's bytes are its inputs and outputs once each, so GB/s beside the card's copy speed tells what is left to gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from entrenar_gpu.cli.op_programs import PROGRAMS, with_gradient
from entrenar_gpu.compiler import PlanOptions, make_plan
from entrenar_gpu.gpu import Device, KernelCache, Replay, time_run
from entrenar_gpu.graph import Graph
from entrenar_gpu.model import ModelConfig
from entrenar_gpu.ops.registry import OPS

REPEATS = 32
VOCABULARY_SHARD = 8192  # rows of the vocabulary that a loss is timed over
PARAMETERS = 8 << 20  # of a page that the optimizer steps


def bench_ops(device: Device, model: ModelConfig, rows: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Seconds, GB/s and TFLOP/s of each kernel for `rows` sequences of `tokens`, as they are measured."""
    kernels = KernelCache(device)
    for name, (op, sizes) in _programs(model, rows, tokens).items():
        graph = Graph(name)
        if (out := PROGRAMS[op].record(graph, "f32", *sizes)) is not None:
            with_gradient(out)
        plan = make_plan({name: graph}, device.caps, PlanOptions(keep=True))
        (steps,) = plan.steps.values()
        repeats = 1 if device.caps.software else REPEATS
        plan.steps = {f"{name} {number}": [step] * repeats for number, step in enumerate(steps)}
        replay = Replay(device, plan, kernels)
        try:
            _fill(replay, tokens)
            for key, (step, *_) in plan.steps.items():
                seconds = time_run(replay, key) / repeats
                nbytes = sum(t.nbytes for t in (*step.node.inputs.values(), *step.node.outputs))
                yield {
                    "name": name,
                    "kernel": step.node.op,
                    "shape": list(step.node.output.shape),
                    "seconds": seconds,
                    "gbytes_per_second": nbytes / seconds / 1e9,
                    "tflops": OPS[step.node.op].flops(step.node) / seconds / 1e12,
                }
        finally:
            replay.close()


def _programs(model: ModelConfig, rows: int, tokens: int) -> Mapping[str, tuple[str, Sequence[int]]]:
    """The op of each kind of kernel, and its sizes in a model for `rows` sequences of `tokens`."""
    t, hidden, layer = rows * tokens, model.hidden_size, model.layers[0]
    attention, wide = layer.attention, layer.mlp.intermediate_size
    heads, kv_heads, head = attention.num_heads, attention.num_kv_heads, attention.head_dim
    return {
        "norm": ("rms_norm", (t, hidden)),
        "head norm and rotary": ("norm_rope", (t, heads, head)),
        "rotary": ("rope", (t, heads, head)),
        "swiglu": ("swiglu", (t, wide)),
        "attention": ("attention", (rows, tokens, heads, kv_heads, head)),
        "embedding": ("embedding", (t, VOCABULARY_SHARD, hidden)),
        "loss": ("cross_entropy", (t, VOCABULARY_SHARD, hidden)),
        "dequantise": ("nf4_dequantize", (wide, hidden)),
        "optimizer": ("adam", (PARAMETERS,)),
    }


def _fill(replay: Replay, tokens: int) -> None:
    """Random inputs: zeros can run faster than what training sees."""
    rng = np.random.default_rng(0)
    for name, tensor in replay.tensors.items():
        if name == "positions":
            replay.write(name, np.arange(tensor.size) % tokens)
        elif name in ("ids", "targets"):
            replay.write(name, rng.integers(0, VOCABULARY_SHARD, tensor.size))
        elif tensor.dtype == "f32":
            replay.write(name, np.resize(rng.standard_normal(1_000_003, dtype=np.float32), tensor.shape))
        elif tensor.dtype == "u8":
            replay.write(name, np.resize(rng.integers(0, 256, 1_000_003, dtype=np.uint8), tensor.shape))
        elif tensor.dtype == "bf16":
            replay.write(name, np.resize(rng.standard_normal(1_000_003, dtype=np.float32), tensor.shape))
