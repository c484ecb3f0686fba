"""`entrenar-gpu bench ops`: every kernel of a training step but the products, at a model's shapes.

Each op is recorded with its gradient, over random inputs, and every node is timed by itself over many repetitions. A
node's bytes are its inputs and outputs once each, so GB/s beside the card's copy speed tells what is left to gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from entrenar_gpu import ops
from entrenar_gpu.autodiff import backward
from entrenar_gpu.bench_gemm import time_run
from entrenar_gpu.device import Device
from entrenar_gpu.graph import Graph, Tensor
from entrenar_gpu.kernel import KernelCache
from entrenar_gpu.model_config import ModelConfig
from entrenar_gpu.ops.optimizer import STATE
from entrenar_gpu.ops.registry import OPS
from entrenar_gpu.plan import make_plan
from entrenar_gpu.replay import Replay

REPEATS = 32
VOCABULARY_PAGE = 8192  # rows of the vocabulary that a loss is timed over
PARAMETERS = 8 << 20  # of a page that the optimizer steps


def bench_ops(device: Device, model: ModelConfig, rows: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Seconds, GB/s and TFLOP/s of each kernel for `rows` sequences of `tokens`, as they are measured."""
    kernels = KernelCache(device)
    for name, build in _programs(model, rows, tokens).items():
        graph = Graph(name)
        build(graph)
        plan = make_plan({name: graph}, device.caps, keep=True)
        (steps,) = plan.steps.values()
        repeats = 1 if device.caps.software else REPEATS
        plan.steps = {f"{name} {number}": [step] * repeats for number, step in enumerate(steps)}
        replay = Replay(device, plan, kernels)
        try:
            _fill(replay, tokens)
            for key, (step, *_) in plan.steps.items():
                seconds = time_run(replay, key) / repeats
                nbytes = sum(t.nbytes for t in (*step.node.inputs, *step.node.outputs))
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


def _programs(c: ModelConfig, rows: int, tokens: int) -> Mapping[str, Callable[[Graph], None]]:
    t, heads, kv, head = rows * tokens, c.num_heads, c.num_kv_heads, c.head_dim

    def x(graph: Graph, name: str, *shape: int) -> Tensor:
        return graph.tensor(name, shape, requires_grad=True)

    def weight(graph: Graph, name: str, *shape: int, dtype: str = "f32") -> Tensor:
        return graph.tensor(name, shape, dtype, "weight")

    def with_gradient(graph: Graph, out: Tensor) -> None:
        sources = [s for s in graph.persistents.values() if s.requires_grad]
        backward(out, sources, graph.tensor("upstream", out.shape))

    def norm(graph: Graph) -> None:
        with_gradient(graph, ops.rms_norm(x(graph, "x", t, c.hidden_size), weight(graph, "w", c.hidden_size), 1e-6))

    def head_norm(graph: Graph) -> None:
        with_gradient(graph, ops.rms_norm(x(graph, "x", t, heads * head), weight(graph, "w", head), 1e-6))

    def rope(graph: Graph) -> None:
        table, positions = graph.tensor("table", (tokens, head)), graph.tensor("positions", (t,), "u32")
        with_gradient(graph, ops.rope(x(graph, "x", t, heads * head), table, positions))

    def swiglu(graph: Graph) -> None:
        width = c.intermediate_size
        with_gradient(graph, ops.swiglu(x(graph, "gate", t, width), x(graph, "up", t, width)))

    def attention(graph: Graph) -> None:
        k, v = x(graph, "k", t, kv * head), x(graph, "v", t, kv * head)
        starts = graph.tensor("segments", (t,), "u32")
        with_gradient(graph, ops.attention(x(graph, "q", t, heads * head), k, v, starts, rows, heads, kv))

    def embedding(graph: Graph) -> None:
        page = weight(graph, "page", VOCABULARY_PAGE, c.hidden_size, dtype="bf16")
        ops.embedding(graph.tensor("ids", (t,), "u32"), [page])

    def loss(graph: Graph) -> None:
        page = weight(graph, "page", VOCABULARY_PAGE, c.hidden_size, dtype="bf16")
        targets = graph.tensor("targets", (t,), "i32")
        ops.cross_entropy(x(graph, "x", t, c.hidden_size), targets, [page])

    def dequantize(graph: Graph) -> None:
        shape = (c.intermediate_size, c.hidden_size)
        ops.Nf4Tensors.declare(graph, "w", shape, True, "bfloat16").dequantize()

    def optimizer(graph: Graph) -> None:
        page, grad, m, v = (graph.tensor(name, (PARAMETERS,), role="page") for name in ("p", "g", "m", "v"))
        state, rate = graph.tensor("state", (STATE,), role="state"), graph.tensor("lr", (1,))
        ops.sum_of_squares(grad)
        ops.adam(page, grad, m, v, state, rate, (0.9, 0.999), 1e-8, 0.01, True)

    return {
        "norm": norm,
        "head norm": head_norm,
        "rotary": rope,
        "swiglu": swiglu,
        "attention": attention,
        "embedding": embedding,
        "loss": loss,
        "dequantise": dequantize,
        "optimizer": optimizer,
    }


def _fill(replay: Replay, tokens: int) -> None:
    """Random inputs: zeros can run faster than what training sees."""
    rng = np.random.default_rng(0)
    for name, tensor in replay.tensors.items():
        if name == "positions":
            replay.write(name, np.arange(tensor.size) % tokens)
        elif name in ("ids", "targets"):
            replay.write(name, rng.integers(0, VOCABULARY_PAGE, tensor.size))
        elif tensor.dtype == "f32":
            replay.write(name, np.resize(rng.standard_normal(1_000_003, dtype=np.float32), tensor.shape))
        elif tensor.dtype == "u8":
            replay.write(name, np.resize(rng.integers(0, 256, 1_000_003, dtype=np.uint8), tensor.shape))
        elif tensor.dtype == "bf16":
            replay.write(name, np.resize(rng.standard_normal(1_000_003, dtype=np.float32), tensor.shape))
