"""Attention: projections, norms and rotation of queries and keys, and who sees whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from entrenar_gpu import ops
from entrenar_gpu.graph import Tensor
from entrenar_gpu.model.blocks.modules import Linear, RmsNorm, Trace, columns
from entrenar_gpu.model.config_file import MOST_HEAD_DIM, ConfigFile
from entrenar_gpu.model.rope import Rope
from entrenar_gpu.model.weight_spec import WeightSpec

Normed = Literal["heads", "width"]  # what a norm of queries and keys runs over: each head, or all of them together


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (arXiv 2305.13245).

    `rope`: how queries and keys are rotated by their positions; None, not at all. `query_rope` rotates the queries
    where that differs. `qkv_bias`, `out_bias`: biases on the query, key and value projections, and on the output's.
    `qk_norm`: a norm of queries and keys before they turn. `window`, `scale` and `softcap` are those of
    `ops.attention`. `fused`: the three projections are one, `qkv_proj`.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Normed | None = None
    norm: RmsNorm | None = None  # its epsilon and offset
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    fused: bool = False
    query_rope: Rope | None = None

    @classmethod
    def read(
        cls,
        file: ConfigFile,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: Normed | None = None,
        norm: RmsNorm | None = None,
        fused: bool = False,
        interleaved: bool = False,
        share: float | None = None,
    ) -> Attention:
        """Sizes, and the rotation that most files describe (`interleaved`, `share`: see `Rope.read`); `norm` is the
        file's unless given."""
        hidden, heads = file.count("hidden_size"), file.count("num_attention_heads")
        kv_heads = file.count("num_key_value_heads", heads)
        head_dim = file.count("head_dim", hidden // heads, most=MOST_HEAD_DIM)
        if heads % kv_heads:
            raise file.error(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if head_dim % 2:
            raise file.error(f"head_dim {head_dim} is odd; rotary embedding needs pairs")
        if head_dim > ops.LONGEST_HEAD:
            raise file.error(f"head_dim {head_dim} is above {ops.LONGEST_HEAD}, the longest that attention computes")
        if file.raw.get("attention_dropout"):
            raise file.error("attention_dropout is not supported (use --dropout for the adapters)")
        rope = Rope.read(file, head_dim, interleaved=interleaved, share=share)
        norm = (norm or RmsNorm.read(file)) if qk_norm else None
        return cls(hidden, heads, kv_heads, head_dim, rope, qkv_bias, out_bias, qk_norm, norm, fused=fused)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Those that the layer needs tables of."""
        return tuple(rope for rope in (self.query_rope, self.rope) if rope is not None)

    @property
    def q(self) -> Linear:
        return Linear("self_attn.q_proj", self.num_heads * self.head_dim, self.hidden_size, self.qkv_bias)

    @property
    def k(self) -> Linear:
        return Linear("self_attn.k_proj", self.num_kv_heads * self.head_dim, self.hidden_size, self.qkv_bias)

    @property
    def v(self) -> Linear:
        return Linear("self_attn.v_proj", self.num_kv_heads * self.head_dim, self.hidden_size, self.qkv_bias)

    @property
    def qkv(self) -> Linear:
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return Linear("self_attn.qkv_proj", width, self.hidden_size, self.qkv_bias)

    @property
    def o(self) -> Linear:
        return Linear("self_attn.o_proj", self.hidden_size, self.num_heads * self.head_dim, self.out_bias)

    def weights(self, prefix: str) -> Iterator[WeightSpec]:
        for linear in (self.qkv,) if self.fused else (self.q, self.k, self.v):
            yield from linear.weights(prefix)
        for name, heads in (("q", self.num_heads), ("k", self.num_kv_heads)):
            if self.qk_norm is not None:
                yield self._norm_of(heads).weight(f"{prefix}.self_attn.{name}_norm.weight")
        yield from self.o.weights(prefix)

    def trace(self, trace: Trace, x: Tensor, prefix: str, residual: Tensor | None) -> Tensor:
        q, k, v = self.projected(trace, x, prefix)
        variant = self.variant(trace.row_length(q))
        attended = trace.attend(f"{prefix}.self_attn", q, k, v, self.num_heads, self.num_kv_heads, **variant)
        return self.o.trace(trace, attended, prefix, residual)

    def variant(self, positions: int) -> dict[str, Any]:
        """`window`, `scale` and `softcap` as the op takes them; no window where rows of `positions` are not longer."""
        window = self.window if self.window is not None and self.window < positions else None
        return {"scale": self.scale, "window": window, "softcap": self.softcap}

    def projected(self, trace: Trace, x: Tensor, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H*E], keys and values [T, K*E], normalised and rotated."""
        if self.fused:
            widths = (self.q.out_features, self.k.out_features, self.v.out_features)
            q, k, v = columns(self.qkv.trace(trace, x, prefix), *widths)
        else:
            q, k, v = (linear.trace(trace, x, prefix) for linear in (self.q, self.k, self.v))
        q = self._positioned(
            trace, q, f"{prefix}.self_attn.q_norm.weight", self.num_heads, self.query_rope or self.rope
        )
        k = self._positioned(trace, k, f"{prefix}.self_attn.k_norm.weight", self.num_kv_heads, self.rope)
        return q, k, v

    def _norm_of(self, heads: int) -> RmsNorm:
        """The norm of queries or keys of so many heads."""
        assert self.norm is not None
        return replace(self.norm, size=self.head_dim * (heads if self.qk_norm == "width" else 1))

    def _positioned(self, trace: Trace, x: Tensor, norm_weight: str, heads: int, rope: Rope | None) -> Tensor:
        """Queries or keys after their norm and their rotation, where the layer has them; in one op where that can."""
        whole_heads = rope is not None and rope.rotary_dim == self.head_dim and not rope.interleaved
        if self.qk_norm is not None:
            norm = self._norm_of(heads)
            if self.qk_norm == "heads" and rope is not None and whole_heads:
                weight, table = trace.parameters.vector(norm_weight), trace.rope_tables[rope]
                return ops.norm_rope(x, weight, norm.eps, table, trace.positions, norm.offset)
            x = norm.trace(trace, x, norm_weight)
        if rope is None:
            return x
        return ops.rope(x, trace.rope_tables[rope], trace.positions, self.head_dim, rope.interleaved)
