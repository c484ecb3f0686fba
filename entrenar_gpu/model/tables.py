"""The embedding and the output head, tables [V, D] over the vocabulary, and the place where an adapter changes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from entrenar_gpu import ops
from entrenar_gpu.graph import Caps, Graph, Tensor

TABLE_SHARD_BYTES = 128 << 20

# (A [R, D], B [V, R], scale): scale * (x A^T) B^T is added to x W^T
Added = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class TableCall:
    """One table, as its adapter gets it. `base` declares the shards of the rows that the model has."""

    graph: Graph
    base: Callable[[], list[Tensor]]
    caps: Caps
    adapter_prefix: str = ""

    def parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of the adapter, which is trained where anything is."""
        return self.graph.parameter(self.adapter_prefix + name, shape)

    def constant(self, name: str, shape: tuple[int, ...], dtype: str = "f32") -> Tensor:
        """A tensor of the adapter that is written once."""
        return self.graph.tensor(self.adapter_prefix + name, shape, dtype, "weight")

    def trained_rows(self, name: str, shape: tuple[int, int]) -> list[Tensor]:
        """A whole table in f32 that is the adapter's, as shards `name.shard0`, ..."""
        counts = shard_rows(*shape, 4, self.caps)
        return [self.parameter(f"{name}.shard{i}", (count, shape[1])) for i, count in enumerate(counts)]


@dataclass(frozen=True)
class Head:
    """x W^T of final hidden states x [T, D], W [V, D] in shards of rows, and what is added to it."""

    shards: list[Tensor]
    added: Added | None = None

    def logits(self, x: Tensor, by_rows: bool) -> Tensor:
        """[T, V]; with `by_rows` each row is computed the same whatever the others are."""
        if self.added is None:
            return ops.gemv(x, self.shards) if by_rows else ops.project(x, self.shards)
        a, b, scale = self.added
        if by_rows:
            return ops.gemv(x, self.shards, 1.0, None, ops.gemv(ops.gemv(x, [a]), [b], scale))
        p = ops.matmul(x, a, transpose_b=True, alpha=scale)
        return ops.matmul(p, b, transpose_b=True, residual=ops.project(x, self.shards))


class HeadAdapter(Protocol):
    """The adapter of the output head, as the room `adapters` implements it."""

    def head(self, call: TableCall) -> Head:
        """The head; of a tied one `call` has the embedding's rows."""


class EmbeddingAdapter(Protocol):
    """The adapter of the embedding, likewise."""

    @property
    def tied_head(self) -> HeadAdapter | None:
        """What a head becomes that is tied to the embedding; None where it stays as it was."""

    def embedded(self, call: TableCall, ids: Tensor, order: Tensor | None) -> Tensor:
        """The rows `ids` of the embedding, [T, D]; `order` as in `ops.embedding`."""


def shard_rows(rows: int, columns: int, dtype_bytes: int, caps: Caps) -> list[int]:
    """Row counts of the shards that a [rows, columns] table is kept in; a multiple of 64 but for the last."""
    limit = min(TABLE_SHARD_BYTES, caps.max_binding_bytes, caps.max_buffer_bytes)
    fit = max(limit // (columns * dtype_bytes) // 64 * 64, 64)
    return [min(fit, rows - start) for start in range(0, rows, fit)]
