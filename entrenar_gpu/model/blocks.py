"""The blocks that families build their layers of: each names its weights, reads its keys of config.json, and is traced.

Letters as in config.py: T = B*S tokens, D hidden, F feed-forward, H and K heads of E, R rank. A block's weights are
listed in the order in which it uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from entrenar_gpu import ops
from entrenar_gpu.graph import Graph, Tensor
from entrenar_gpu.model.config_file import MOST_HEAD_DIM, ConfigFile, shown
from entrenar_gpu.model.kv_cache import KeyValueCache
from entrenar_gpu.model.parameters import Parameters
from entrenar_gpu.model.projection import Product
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
    by_rows: bool = False  # products are of a few rows, each by itself

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
        """x W^T + bias + residual, [T, out], in one product with what an adapter adds."""
        module, parameters = f"{prefix}.{self.path}", trace.parameters
        with trace.graph.within(self.path.rpartition(".")[2]):
            weight = parameters.matrix(f"{module}.weight")
            bias = parameters.vector(f"{module}.bias") if self.bias else None
            how = (trace.precision, trace.dropped, trace.by_rows, parameters.adapter_prefix)
            product = Product(trace.graph, x, weight, bias, residual, *how)
            adapter = parameters.adapter(module)
            return adapter.apply(product) if adapter is not None else product.record()


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (arXiv 2305.13245).

    `rope`: how queries and keys are rotated by their positions; None, not at all. `qkv_bias`: biases on the query, key
    and value projections. `qk_norm`: the norm over each head's queries and keys before they are rotated. `window`,
    `scale` and `softcap` are those of `ops.attention`.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    qkv_bias: bool = False
    qk_norm: RmsNorm | None = None
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None

    @classmethod
    def read(cls, file: ConfigFile, qkv_bias: bool = False, qk_norm: bool = False) -> Attention:
        hidden, heads = file.count("hidden_size"), file.count("num_attention_heads")
        kv_heads = file.count("num_key_value_heads", heads)
        head_dim = file.count("head_dim", hidden // heads, most=MOST_HEAD_DIM)
        if heads % kv_heads:
            raise file.error(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if head_dim % 2:
            raise file.error(f"head_dim {head_dim} is odd; rotary embedding needs pairs")
        _refuse_other_attention(file)
        rope = Rope.read(file, head_dim)
        norm = RmsNorm.read(file, head_dim) if qk_norm else None
        return cls(hidden, heads, kv_heads, head_dim, rope, qkv_bias, norm)

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
    def o(self) -> Linear:
        return Linear("self_attn.o_proj", self.hidden_size, self.num_heads * self.head_dim)

    def weights(self, prefix: str) -> Iterator[WeightSpec]:
        for linear in (self.q, self.k, self.v):
            yield from linear.weights(prefix)
        if self.qk_norm is not None:
            yield self.qk_norm.weight(f"{prefix}.self_attn.q_norm.weight")
            yield self.qk_norm.weight(f"{prefix}.self_attn.k_norm.weight")
        yield from self.o.weights(prefix)

    def trace(self, trace: Trace, x: Tensor, prefix: str, residual: Tensor) -> Tensor:
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
        q, k, v = (linear.trace(trace, x, prefix) for linear in (self.q, self.k, self.v))
        q = self._positioned(trace, q, f"{prefix}.self_attn.q_norm.weight")
        k = self._positioned(trace, k, f"{prefix}.self_attn.k_norm.weight")
        return q, k, v

    def _positioned(self, trace: Trace, x: Tensor, norm_weight: str) -> Tensor:
        """Queries or keys after their norm and their rotation, where the layer has them; in one op where that can."""
        norm, rope = self.qk_norm, self.rope
        whole_heads = rope is not None and rope.rotary_dim == self.head_dim and not rope.interleaved
        if norm is not None and norm.size == self.head_dim and rope is not None and whole_heads:
            weight, table = trace.parameters.vector(norm_weight), trace.rope_tables[rope]
            return ops.norm_rope(x, weight, norm.eps, table, trace.positions, norm.offset)
        if norm is not None:
            x = norm.trace(trace, x, norm_weight)
        if rope is None:
            return x
        return ops.rope(x, trace.rope_tables[rope], trace.positions, self.head_dim, rope.interleaved)


def _refuse_other_attention(file: ConfigFile) -> None:
    kinds = file.raw.get("layer_types") or ["?"]
    if file.flag("use_sliding_window") and not (isinstance(kinds, list) and all(k == "full_attention" for k in kinds)):
        raise file.error("use_sliding_window is not supported")
    if file.raw.get("attention_dropout"):
        raise file.error("attention_dropout is not supported (use --dropout for the adapters)")


@dataclass(frozen=True)
class SwiGlu:
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    hidden_size: int
    intermediate_size: int

    @classmethod
    def read(cls, file: ConfigFile) -> SwiGlu:
        activation = file.raw.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise file.error(f"hidden_act {shown(activation)} is not supported (silu is)")
        file.refuse("mlp_bias")
        return cls(file.count("hidden_size"), file.count("intermediate_size"))

    @property
    def gate(self) -> Linear:
        return Linear("mlp.gate_proj", self.intermediate_size, self.hidden_size)

    @property
    def up(self) -> Linear:
        return Linear("mlp.up_proj", self.intermediate_size, self.hidden_size)

    @property
    def down(self) -> Linear:
        return Linear("mlp.down_proj", self.hidden_size, self.intermediate_size)

    def weights(self, prefix: str) -> Iterator[WeightSpec]:
        for linear in (self.gate, self.up, self.down):
            yield from linear.weights(prefix)

    def trace(self, trace: Trace, x: Tensor, prefix: str, residual: Tensor) -> Tensor:
        gate, up = self.gate.trace(trace, x, prefix), self.up.trace(trace, x, prefix)
        return self.down.trace(trace, ops.swiglu(gate, up), prefix, residual)


@dataclass(frozen=True)
class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    attention: Attention
    mlp: SwiGlu
    norm: RmsNorm

    def weights(self, prefix: str) -> Iterator[WeightSpec]:
        yield self.norm.weight(f"{prefix}.input_layernorm.weight")
        yield from self.attention.weights(prefix)
        yield self.norm.weight(f"{prefix}.post_attention_layernorm.weight")
        yield from self.mlp.weights(prefix)

    def trace(self, trace: Trace, x: Tensor, prefix: str) -> Tensor:
        with trace.graph.within("self_attn"):
            h = self.norm.trace(trace, x, f"{prefix}.input_layernorm.weight")
            x = self.attention.trace(trace, h, prefix, residual=x)
        with trace.graph.within("mlp"):
            h = self.norm.trace(trace, x, f"{prefix}.post_attention_layernorm.weight")
            return self.mlp.trace(trace, h, prefix, residual=x)
