"""The blocks that families build their layers of: each names its weights, reads its keys of config.json, and is traced.

Letters as in config.py: T = B*S tokens, D hidden, F feed-forward, H and K heads of E, R rank. A block's weights are
listed in the order in which it uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from entrenar_gpu import ops
from entrenar_gpu.graph import Graph, Tensor
from entrenar_gpu.model.config_file import MOST_HEAD_DIM, ConfigFile, shown
from entrenar_gpu.model.parameters import Parameters
from entrenar_gpu.model.projection import Product
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
    segment_start: Tensor
    rope_table: Tensor
    dropped: Callable[[Tensor], Tensor] | None  # adapter dropout


@dataclass(frozen=True)
class RmsNorm:
    """x / rms(x) * w over `size` values (arXiv 1910.07467)."""

    size: int
    eps: float

    @classmethod
    def read(cls, file: ConfigFile, size: int | None = None) -> RmsNorm:
        """Over the hidden size unless told otherwise."""
        return cls(size or file.count("hidden_size"), file.real("rms_norm_eps", 1e-6))

    def weight(self, name: str) -> WeightSpec:
        return WeightSpec(name, (self.size,), "norm")

    def trace(self, trace: Trace, x: Tensor, name: str) -> Tensor:
        return ops.rms_norm(x, trace.parameters.vector(name), self.eps)


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
            product = Product(trace.graph, x, weight, bias, residual, trace.precision, trace.dropped)
            adapter = parameters.adapter(module)
            return adapter.apply(product) if adapter is not None else product.record()


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (arXiv 2305.13245) with rotary positions.

    `qkv_bias`: biases on the query, key and value projections. `qk_norm`: the norm over each head's queries and keys
    before they are rotated.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    qk_norm: RmsNorm | None = None

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
        return cls(hidden, heads, kv_heads, head_dim, qkv_bias, RmsNorm.read(file, head_dim) if qk_norm else None)

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
        q, k, v = (linear.trace(trace, x, prefix) for linear in (self.q, self.k, self.v))
        q = self._rotated(trace, q, f"{prefix}.self_attn.q_norm.weight")
        k = self._rotated(trace, k, f"{prefix}.self_attn.k_norm.weight")
        heads = (self.num_heads, self.num_kv_heads)
        attended = ops.attention(q, k, v, trace.segment_start, trace.rows, *heads, trace.precision)
        return self.o.trace(trace, attended, prefix, residual)

    def _rotated(self, trace: Trace, x: Tensor, norm: str) -> Tensor:
        """Queries or keys by their positions, after their norm where the model has one."""
        if self.qk_norm is None:
            return ops.rope(x, trace.rope_table, trace.positions)
        weight = trace.parameters.vector(norm)
        return ops.norm_rope(x, weight, self.qk_norm.eps, trace.rope_table, trace.positions)


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
