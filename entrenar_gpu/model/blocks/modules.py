"""What blocks are made of: norms, linear maps, and the trace that they are recorded into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from entrenar_gpu import ops
from entrenar_gpu.graph import Graph, Tensor
from entrenar_gpu.model.config_file import ConfigFile
from entrenar_gpu.model.kv_cache import KeyValueCache
from entrenar_gpu.model.parameters import Parameters
from entrenar_gpu.model.projection import ProjectionCall
from entrenar_gpu.model.rope import Rope
from entrenar_gpu.model.weight_spec import WeightSpec
from entrenar_gpu.ops.gemm.tiles import Arithmetic


@dataclass(frozen=True)
class Trace:
    """What blocks record into: a graph, its parameters, and the inputs that every layer shares."""

    graph: Graph
    parameters: Parameters
    rows: int
    precision: Arithmetic
    positions: Tensor
    segment_start: Tensor | None  # where rows are packed of segments
    rope_tables: Mapping[Rope, Tensor]
    dropped: Callable[[Tensor], Tensor] | None  # adapter dropout
    cache: KeyValueCache | None = None  # where tokens attend to what a cache keeps of those before them
    by_rows: bool = False  # matmuls are of a few rows, each by itself

    def row_length(self, x: Tensor) -> int:
        """Positions that a row of x [T, ..] may have."""
        return x.rows // self.rows if self.cache is None else self.cache.context

    def attend(self, path: str, q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, **options: Any) -> Tensor:
        """What the queries of the module at `path` attend to, [T, H*E]; `options` are those of `ops.attention`."""
        if self.cache is not None:
            return self.cache.attend(self.graph, path, q, k, v, self.positions, heads, kv_heads, **options)
        assert self.segment_start is not None
        return ops.attention(q, k, v, self.segment_start, self.rows, heads, kv_heads, self.precision, **options)


@dataclass(frozen=True)
class RmsNorm:
    """x / rms(x) * (w + offset) over `size` values (arXiv 1910.07467)."""

    size: int
    eps: float
    offset: float = 0.0

    @classmethod
    def read(cls, file: ConfigFile, size: int | None = None, offset: float = 0.0) -> RmsNorm:
        """Over the hidden size unless told otherwise."""
        return cls(size or file.count("hidden_size"), file.real("rms_norm_eps", 1e-6), offset)

    def weight(self, name: str) -> WeightSpec:
        return WeightSpec(name, (self.size,), "norm")

    def trace(self, trace: Trace, x: Tensor, name: str) -> Tensor:
        return ops.rms_norm(x, trace.parameters.vector(name), self.eps, self.offset)


@dataclass(frozen=True)
class Linear:
    """W x + b, with what an adapter adds. `path` is the module's within its layer, as in `mlp.up_proj`."""

    path: str
    out_features: int
    in_features: int
    bias: bool = False

    def weights(self, prefix: str) -> Iterator[WeightSpec]:
        yield WeightSpec(
            f"{prefix}.{self.path}.weight", (self.out_features, self.in_features), "projection", adaptable=True
        )
        if self.bias:
            yield WeightSpec(f"{prefix}.{self.path}.bias", (self.out_features,), "bias")

    def trace(self, trace: Trace, x: Tensor, prefix: str, residual: Tensor | None = None) -> Tensor:
        """x W^T + bias + residual, [T, out], in one matmul with what an adapter adds."""
        module, parameters = f"{prefix}.{self.path}", trace.parameters
        with trace.graph.within(self.path.rpartition(".")[2]):
            weight = parameters.matrix(f"{module}.weight")
            bias = parameters.vector(f"{module}.bias") if self.bias else None
            how = (trace.precision, trace.dropped, trace.by_rows, parameters.adapter_prefix)
            call = ProjectionCall(trace.graph, x, weight, bias, residual, *how)
            adapter = parameters.adapter(module)
            return adapter.apply(call) if adapter is not None else call.record()


def columns(x: Tensor, *widths: int) -> list[Tensor]:
    """x [T, N] cut into tensors of so many of its columns each."""
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return [ops.part(x, (0, start), (1, 1), (x.rows, width)) for start, width in zip(starts, widths, strict=True)]
