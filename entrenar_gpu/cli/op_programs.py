"""Ops by themselves, as small graphs in sizes told by number: what `bench ops` times and `shader` prints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from entrenar_gpu import ops
from entrenar_gpu.compiler import backward
from entrenar_gpu.graph import Graph, Tensor
from entrenar_gpu.ops.half import from_half, to_half
from entrenar_gpu.ops.optimizer import STATE

EPS = 1e-6
DOUBLE_QUANT = True  # of NF4 weights


@dataclass(frozen=True)
class OpProgram:
    """How an op is recorded: `record(graph, precision, *sizes)` returns the tensor to differentiate, if any.

    `sizes` names the numbers in order; those in brackets may be left out. `example` are sizes of Qwen3-4B.
    Precisions as a run's: where int8 is not for an op, it is f16 on a device that has it.
    """

    record: Callable[..., Tensor | None]
    sizes: tuple[str, ...]
    example: tuple[int, ...]
    precisions: tuple[str, ...] = ("f32",)

    @property
    def required(self) -> int:
        return sum(not name.startswith("[") for name in self.sizes)


def with_gradient(out: Tensor) -> None:
    """Record the gradients of what `out` is made of, too."""
    sources = [t for t in out.graph.persistents.values() if t.requires_grad]
    backward(out, sources, out.graph.tensor("upstream", out.shape))


def _x(graph: Graph, name: str, rows: int, columns: int) -> Tensor:
    return graph.tensor(name, (rows, columns), requires_grad=True)


def _unary(op: Callable[[Tensor], Tensor], graph: Graph, precision: str, rows: int, columns: int) -> Tensor:
    return op(_x(graph, "x", rows, columns))


def _binary(op: Callable[[Tensor, Tensor], Tensor], graph: Graph, precision: str, rows: int, columns: int) -> Tensor:
    return op(_x(graph, "a", rows, columns), _x(graph, "b", rows, columns))


def _rms_norm(graph: Graph, precision: str, rows: int, columns: int) -> Tensor:
    return ops.rms_norm(_x(graph, "x", rows, columns), graph.tensor("w", (columns,), role="weight"), EPS)


def _layer_norm(graph: Graph, precision: str, rows: int, columns: int) -> Tensor:
    weight, bias = (graph.tensor(name, (columns,), role="weight") for name in ("w", "bias"))
    return ops.layer_norm(_x(graph, "x", rows, columns), weight, bias, EPS)


def _positions(graph: Graph, tokens: int, head: int) -> tuple[Tensor, Tensor]:
    return graph.tensor("table", (tokens, head)), graph.tensor("positions", (tokens,), "u32")


def _rope(graph: Graph, precision: str, tokens: int, heads: int, head: int) -> Tensor:
    return ops.rope(_x(graph, "x", tokens, heads * head), *_positions(graph, tokens, head))


def _norm_rope(graph: Graph, precision: str, tokens: int, heads: int, head: int) -> Tensor:
    weight = graph.tensor("w", (head,), role="weight")
    return ops.norm_rope(_x(graph, "x", tokens, heads * head), weight, EPS, *_positions(graph, tokens, head))


def _uniform_noise(graph: Graph, precision: str, rows: int, columns: int) -> Tensor:
    x, magnitude = _x(graph, "x", rows, columns), graph.tensor("magnitude", (rows,))
    return ops.uniform_noise(x, magnitude, graph.tensor("rng", (3,), "u32"), 0)


def _dropout(graph: Graph, precision: str, rows: int, columns: int) -> Tensor:
    return ops.dropout(_x(graph, "x", rows, columns), graph.tensor("rng", (3,), "u32"), 0.1, 0)


def _attention(graph: Graph, precision: Any, rows: int, tokens: int, heads: int, kv_heads: int, head: int) -> Tensor:
    t, widths = rows * tokens, {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
    q, k, v = (_x(graph, name, t, width) for name, width in widths.items())
    starts = graph.tensor("segments", (t,), "u32")
    return ops.attention(q, k, v, starts, rows, heads, kv_heads, precision)


def _matmul(graph: Graph, precision: str, rows: int, out: int, inner: int) -> Tensor:
    weight = graph.tensor("w", (out, inner), role="weight", requires_grad=True)
    return ops.matmul(_x(graph, "x", rows, inner), weight, transpose_b=True)


def _linear(graph: Graph, precision: Any, tokens: int, out: int, inner: int, rank: int = 0) -> Tensor:
    x, weight = (
        _x(graph, "x", tokens, inner),
        ops.Nf4Tensors.declare(graph, "w", (out, inner), DOUBLE_QUANT, "bfloat16"),
    )
    if not rank:
        return ops.linear(x, weight, precision=precision)
    a = graph.tensor("lora_a", (rank, inner), requires_grad=True)
    b = graph.tensor("lora_b", (out, rank), requires_grad=True)
    return ops.linear(x, weight, precision=precision, lora=(a, b, 2.0))


def _shard(graph: Graph, vocabulary: int, columns: int) -> Tensor:
    return graph.tensor("shard", (vocabulary, columns), "bf16", "weight")


def _embedding(graph: Graph, precision: str, tokens: int, vocabulary: int, columns: int) -> None:
    ops.embedding(graph.tensor("ids", (tokens,), "u32"), [_shard(graph, vocabulary, columns)])


def _embedding_learnt(graph: Graph, precision: str, tokens: int, vocabulary: int, columns: int) -> Tensor:
    table = graph.tensor("table", (vocabulary, columns), requires_grad=True)
    ids, order = (graph.tensor(name, (tokens,), "u32") for name in ("ids", "order"))
    return ops.embedding(ids, [table], order)


def _cross_entropy(graph: Graph, precision: Any, tokens: int, vocabulary: int, columns: int) -> None:
    x, targets = _x(graph, "x", tokens, columns), graph.tensor("targets", (tokens,), "i32")
    ops.cross_entropy(x, targets, [_shard(graph, vocabulary, columns)], precision=precision)


def _project(graph: Graph, precision: str, tokens: int, vocabulary: int, columns: int) -> None:
    ops.project(_x(graph, "x", tokens, columns), [_shard(graph, vocabulary, columns)])


def _nf4_quantize(graph: Graph, precision: str, out: int, inner: int) -> None:
    _, absmax = ops.nf4_quantize(graph.tensor("w", (out * inner,), "bf16"))
    ops.nf4_quantize_scales(absmax, graph.tensor("code", (256,)), graph.tensor("steps", (65536,), "u8"))


def _nf4_dequantize(graph: Graph, precision: str, out: int, inner: int) -> None:
    ops.Nf4Tensors.declare(graph, "w", (out, inner), DOUBLE_QUANT, "bfloat16").dequantize()


def _half(graph: Graph, precision: str, rows: int, columns: int) -> None:
    from_half(*to_half(graph.tensor("x", (rows, columns))))


def _adam(graph: Graph, precision: str, parameters: int) -> None:
    page, grad, m, v = (graph.tensor(name, (parameters,), role="page") for name in ("p", "g", "m", "v"))
    state, rate = graph.tensor("state", (STATE,), role="state"), graph.tensor("lr", (1,))
    ops.sum_of_squares(grad)
    ops.adam(page, grad, m, v, state, rate, (0.9, 0.999), 1e-8, 0.01, True)


def _sgd(graph: Graph, precision: str, parameters: int) -> None:
    page, grad, v = (graph.tensor(name, (parameters,), role="page") for name in ("p", "g", "v"))
    ops.sgd(page, grad, v, graph.tensor("state", (STATE,), role="state"), graph.tensor("lr", (1,)), 0.9, 0.01)


_MATRIX, _LOW = ("rows", "columns"), ("f32", "f16", "int8")
_VOCABULARY = ("tokens", "vocabulary", "columns")
_UNARY = {
    name: getattr(ops, name)
    for name in ("relu", "gelu", "gelu_tanh", "swish", "sum", "mean", "sum_rows", "sum_columns", "softmax")
}
_BINARY = {name: getattr(ops, name) for name in ("add", "sub", "mul", "swiglu", "geglu", "geglu_tanh")}

PROGRAMS: dict[str, OpProgram] = {
    "linear": OpProgram(_linear, ("tokens", "out", "in", "[rank]"), (512, 9728, 2560, 16), _LOW),
    "matmul": OpProgram(_matmul, ("rows", "out", "in"), (512, 9728, 2560)),
    "attention": OpProgram(_attention, ("rows", "tokens", "heads", "kv_heads", "head"), (1, 512, 32, 8, 128), _LOW),
    "cross_entropy": OpProgram(_cross_entropy, _VOCABULARY, (512, 26176, 2560), _LOW),
    "project": OpProgram(_project, _VOCABULARY, (1, 26176, 2560)),
    "embedding": OpProgram(_embedding, _VOCABULARY, (512, 26176, 2560)),
    "embedding_learnt": OpProgram(_embedding_learnt, _VOCABULARY, (512, 13088, 2560)),
    "rms_norm": OpProgram(_rms_norm, _MATRIX, (512, 2560)),
    "layer_norm": OpProgram(_layer_norm, _MATRIX, (512, 2560)),
    "rope": OpProgram(_rope, ("tokens", "heads", "head"), (512, 32, 128)),
    "norm_rope": OpProgram(_norm_rope, ("tokens", "heads", "head"), (512, 32, 128)),
    "uniform_noise": OpProgram(_uniform_noise, _MATRIX, (512, 2560)),
    "dropout": OpProgram(_dropout, _MATRIX, (512, 2560)),
    "nf4_quantize": OpProgram(_nf4_quantize, ("out", "in"), (9728, 2560)),
    "nf4_dequantize": OpProgram(_nf4_dequantize, ("out", "in"), (9728, 2560)),
    "half": OpProgram(_half, _MATRIX, (512, 2560)),
    "adam": OpProgram(_adam, ("parameters",), (8 << 20,)),
    "sgd": OpProgram(_sgd, ("parameters",), (8 << 20,)),
    **{name: OpProgram(functools.partial(_unary, op), _MATRIX, (512, 9728)) for name, op in _UNARY.items()},
    **{name: OpProgram(functools.partial(_binary, op), _MATRIX, (512, 9728)) for name, op in _BINARY.items()},
}
