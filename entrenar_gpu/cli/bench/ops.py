"""`entrenar-gpu bench ops`: the kernels of a training step that are no products, at a model's shapes.

Each op is recorded with its gradient, over random inputs, and every node is timed by itself over many repetitions. A
node's bytes are its inputs and outputs once each, so GB/s beside the card's copy speed tells what is left to gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from entrenar_gpu import ops
from entrenar_gpu.compiler import PlanOptions, backward, make_plan
from entrenar_gpu.gpu import Device, KernelCache, Replay, time_run
from entrenar_gpu.graph import Graph, Tensor
from entrenar_gpu.model import ModelConfig
from entrenar_gpu.ops.optimizer import STATE
from entrenar_gpu.ops.registry import OPS

REPEATS = 32
VOCABULARY_SHARD = 8192  # rows of the vocabulary that a loss is timed over
EPS = 1e-6
PARAMETERS = 8 << 20  # of a page that the optimizer steps


def bench_ops(device: Device, model: ModelConfig, rows: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Seconds, GB/s and TFLOP/s of each kernel for `rows` sequences of `tokens`, as they are measured."""
    kernels = KernelCache(device)
    for name, build in _Programs(model, rows, tokens).all().items():
        graph = Graph(name)
        build(graph)
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


class _Programs:
    """A small graph for each kind of kernel, in a model's sizes, for `rows` sequences of `tokens`."""

    def __init__(self, model: ModelConfig, rows: int, tokens: int) -> None:
        self._layer, self._hidden, self._rows, self._tokens = model.layers[0], model.hidden_size, rows, tokens
        self._t = rows * tokens  # tokens of a batch
        attention = self._layer.attention
        self._head_dim, self._heads = attention.head_dim, (attention.num_heads, attention.num_kv_heads)
        self._q, self._kv = (heads * self._head_dim for heads in self._heads)

    def all(self) -> Mapping[str, Callable[[Graph], None]]:
        """What records each graph, by its name."""
        return {
            "norm": self._norm,
            "head norm and rotary": self._norm_rope,
            "rotary": self._rope,
            "swiglu": self._swiglu,
            "attention": self._attention,
            "embedding": self._embedding,
            "loss": self._loss,
            "dequantise": self._dequantise,
            "optimizer": self._optimizer,
        }

    def _x(self, graph: Graph, name: str, columns: int) -> Tensor:
        return graph.tensor(name, (self._t, columns), requires_grad=True)

    def _norm(self, graph: Graph) -> None:
        weight = graph.tensor("w", (self._hidden,), role="weight")
        _with_gradient(ops.rms_norm(self._x(graph, "x", self._hidden), weight, EPS))

    def _turns(self, graph: Graph) -> tuple[Tensor, Tensor]:
        return graph.tensor("table", (self._tokens, self._head_dim)), graph.tensor("positions", (self._t,), "u32")

    def _norm_rope(self, graph: Graph) -> None:
        weight = graph.tensor("w", (self._head_dim,), role="weight")
        _with_gradient(ops.norm_rope(self._x(graph, "x", self._q), weight, EPS, *self._turns(graph)))

    def _rope(self, graph: Graph) -> None:
        _with_gradient(ops.rope(self._x(graph, "x", self._q), *self._turns(graph)))

    def _swiglu(self, graph: Graph) -> None:
        gate, up = (self._x(graph, name, self._layer.mlp.intermediate_size) for name in ("gate", "up"))
        _with_gradient(ops.swiglu(gate, up))

    def _attention(self, graph: Graph) -> None:
        q, k, v = (self._x(graph, name, n) for name, n in (("q", self._q), ("k", self._kv), ("v", self._kv)))
        starts = graph.tensor("segments", (self._t,), "u32")
        _with_gradient(ops.attention(q, k, v, starts, self._rows, *self._heads))

    def _page(self, graph: Graph) -> Tensor:
        return graph.tensor("page", (VOCABULARY_SHARD, self._hidden), "bf16", "weight")

    def _embedding(self, graph: Graph) -> None:
        ops.embedding(graph.tensor("ids", (self._t,), "u32"), [self._page(graph)])

    def _loss(self, graph: Graph) -> None:
        targets = graph.tensor("targets", (self._t,), "i32")
        ops.cross_entropy(self._x(graph, "x", self._hidden), targets, [self._page(graph)])

    def _dequantise(self, graph: Graph) -> None:
        shape = (self._layer.mlp.intermediate_size, self._hidden)
        ops.Nf4Tensors.declare(graph, "w", shape, True, "bfloat16").dequantize()

    def _optimizer(self, graph: Graph) -> None:
        page, grad, m, v = (graph.tensor(name, (PARAMETERS,), role="page") for name in ("p", "g", "m", "v"))
        state, rate = graph.tensor("state", (STATE,), role="state"), graph.tensor("lr", (1,))
        ops.sum_of_squares(grad)
        ops.adam(page, grad, m, v, state, rate, (0.9, 0.999), 1e-8, 0.01, True)


def _with_gradient(out: Tensor) -> None:
    """Record the gradients of what `out` is made of, too."""
    sources = [t for t in out.graph.persistents.values() if t.requires_grad]
    backward(out, sources, out.graph.tensor("upstream", out.shape))


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
