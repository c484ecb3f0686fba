"""The matmul of one projection, and the place where an adapter changes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from entrenar_gpu import ops
from entrenar_gpu.graph import Graph, Tensor
from entrenar_gpu.ops import Nf4Tensors
from entrenar_gpu.ops.gemm.tiles import Arithmetic

LowRank = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class ProjectionCall:
    """x W^T + bias + residual, [T, N], of a projection with W [N, K], before it is recorded.

    `precision` is the arithmetic where W is NF4. `dropped` is adapter dropout, where the run has any. `by_rows`: of a
    few rows, each computed the same whatever the others are, from W as it is stored; for inference alone.
    `adapter_prefix` tells the tensors of several adapters apart.
    """

    graph: Graph
    x: Tensor
    weight: Tensor | Nf4Tensors
    bias: Tensor | None
    residual: Tensor | None
    precision: Arithmetic
    dropped: Callable[[Tensor], Tensor] | None
    by_rows: bool = False
    adapter_prefix: str = ""

    def parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of the adapter, which is trained where anything is."""
        return self.graph.parameter(self.adapter_prefix + name, shape)

    @property
    def takes_lora(self) -> bool:
        """Whether `record` makes x A^T itself."""
        return self.dropped is None and (self.by_rows or isinstance(self.weight, Nf4Tensors))

    def record(self, low_rank: LowRank | None = None, lora: LowRank | None = None) -> Tensor:
        """The matmul in one node, with scale * p q^T of `low_rank` = (p [T, R], q [N, R], scale) added to it.

        `lora` = (A [R, K], B [N, R], scale) stands for (x A^T, B, scale), where the matmul `takes_lora`.
        """
        if self.by_rows:
            return self._by_rows(low_rank, lora)
        if isinstance(self.weight, Nf4Tensors):
            return ops.linear(self.x, self.weight, low_rank, self.bias, self.residual, self.precision, lora)
        assert lora is None
        return ops.matmul(
            self.x, self.weight, transpose_b=True, low_rank=low_rank, bias=self.bias, residual=self.residual
        )

    def _by_rows(self, low_rank: LowRank | None, lora: LowRank | None) -> Tensor:
        """What is of low rank is made first, and the matmul adds to it."""
        if lora is not None:
            a, b, scale = lora
            low_rank = (ops.gemv(self.x, [a]), b, scale)
        bias, residual = self.bias, self.residual
        if low_rank is not None:
            p, q, scale = low_rank
            bias, residual = None, ops.gemv(p, [q], scale, bias, residual)
        weight = self.weight if isinstance(self.weight, Nf4Tensors) else [self.weight]
        return ops.gemv(self.x, weight, 1.0, bias, residual)


class ModuleAdapter(Protocol):
    """The adapter of one projection, as a method of the room `adapters` implements it."""

    def apply(self, call: ProjectionCall) -> Tensor:
        """Declare what is trained in the call's graph, and record the matmul with it."""
