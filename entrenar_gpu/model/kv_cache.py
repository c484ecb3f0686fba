"""The keys and values that a decoder remembers of the tokens before, in persistent tensors of its graphs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from entrenar_gpu import ops
from entrenar_gpu.graph import Graph, Tensor

PARTS = ("keys", "values")


@dataclass(frozen=True)
class CachedPass:
    """A pass over so many tokens of any sequences of a cache of `dtype`, "f16" or "f32".

    `by_rows`: every token is computed the same whatever others are in the pass, from weights as they are stored.
    """

    tokens: int
    dtype: str = "f32"
    by_rows: bool = True


@dataclass(frozen=True)
class KeyValueCache:
    """`slots` sequences of up to `context` tokens. `token_slots` u32 [T] says whose token each of a pass is;
    `low_precision` whether the pass computes as training does in f16 and int8."""

    slots: int
    context: int
    dtype: str
    token_slots: Tensor
    low_precision: bool

    def attend(
        self,
        graph: Graph,
        path: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        heads: int,
        kv_heads: int,
        **options: Any,
    ) -> Tensor:
        """Remember k and v [T, K*E] of the module at `path`, and attend from q [T, H*E] to what is remembered there."""
        shape = (self.slots, self.context, k.columns)
        held = [graph.tensor(cache_name(path, part), shape, self.dtype, "state") for part in PARTS]
        keys, values = ops.cache_write(held[0], held[1], k, v, self.token_slots, positions)
        options["low_precision"] = self.low_precision
        return ops.cached_attention(q, keys, values, self.token_slots, positions, heads, kv_heads, **options)


def cache_name(path: str, part: str) -> str:
    """Of a module's keys or values among the tensors of a plan."""
    return f"cache.{path}.{part}"


def cache_names(names: Iterable[str]) -> list[str]:
    """Those of caches among the names of a plan's tensors."""
    return [name for name in names if name.startswith("cache.")]
