"""The transformer, traced: one decoder whose differences (Qwen3, Qwen2, Llama) are configuration.

Where its weights come from is the business of `Parameters`: frozen and quantised, frozen as stored, or trainable.
Letters as in model_config.py: T = B*S tokens, D hidden, F feed-forward, H and K heads of E, V vocabulary, R rank.
"""

from __future__ import annotations

from entrenar_gpu import ops
from entrenar_gpu.config import PROJECTIONS
from entrenar_gpu.graph import Caps, Graph, Tensor
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.parameters import Parameters, Storage
from entrenar_gpu.ops.gemm.tiles import Arithmetic

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Transformer:
    """A decoder traced into one graph for rows of a fixed length.

    Inputs by name: input_ids u32 [T], positions u32 [T], segment_start u32 [T]; for training also targets i32 [T],
    inv_tokens f32 [1] (1 / unmasked tokens of the whole step), rng u32 [3] with dropout, and id_order u32 [T] (a
    stable argsort of the ids) when the embedding is trained. rope_table f32 [S, E] is written once.
    """

    def __init__(
        self,
        graph: Graph,
        config: ModelConfig,
        storage: Storage,
        caps: Caps,
        rows: int,
        seq: int,
        dropout: float = 0.0,
        precision: Arithmetic = "f32",
    ) -> None:
        self._precision = precision
        self._head_precision: Arithmetic = precision if caps.f16 else "f32"  # the loss knows f16 and f32 alone
        self.graph, self.config, self.storage = graph, config, storage
        self.rows, self.seq, self._dropout = rows, seq, dropout
        self.parameters = Parameters(graph, config, storage, caps)
        tokens = (rows * seq,)
        self.input_ids = graph.tensor("input_ids", tokens, "u32")
        self.positions = graph.tensor("positions", tokens, "u32")
        self.segment_start = graph.tensor("segment_start", tokens, "u32")
        self.rope_table = graph.tensor("rope_table", (seq, config.head_dim), "f32", "weight")
        self._rng = graph.tensor("rng", (3,), "u32") if dropout else None
        self._dropouts = 0

    def hidden(self) -> Tensor:
        """The final normalised hidden states [T, D]."""
        order = self.graph.tensor("id_order", (self.rows * self.seq,), "u32") if self.storage.method == "full" else None
        with self.graph.within("embed_tokens"):
            x = ops.embedding(self.input_ids, self.parameters.table(EMBEDDING), order)
        for layer in range(self.config.num_layers):
            with self.graph.within(f"layers.{layer}", layer=layer):
                x = self._block(x, f"model.layers.{layer}")
        with self.graph.within("norm"):
            return self._norm(x, "model.norm.weight")

    def loss_sum(self, smoothing: float = 0.0) -> Tensor:
        """Sum over unmasked tokens of the cross-entropy, [1]."""
        targets = self.graph.tensor("targets", (self.rows * self.seq,), "i32")
        x = self.hidden()
        with self.graph.within("lm_head"):
            return ops.cross_entropy(x, targets, self._head(), smoothing, self._head_precision)

    def last_logits(self) -> Tensor:
        """Logits [1, V] of the token whose index is the input `logits_at` u32 [1]."""
        at = self.graph.tensor("logits_at", (1,), "u32")
        x = ops.embedding(at, [self.hidden()])
        with self.graph.within("lm_head"):
            return ops.project(x, self._head())

    def _head(self) -> list[Tensor]:
        return self.parameters.table(EMBEDDING if self.config.tie_word_embeddings else HEAD)

    def _norm(self, x: Tensor, weight: str) -> Tensor:
        return ops.rms_norm(x, self.parameters.vector(weight), self.config.rms_norm_eps)

    def _block(self, x: Tensor, prefix: str) -> Tensor:
        with self.graph.within("self_attn"):
            x = self._attention(x, self._norm(x, f"{prefix}.input_layernorm.weight"), prefix)
        with self.graph.within("mlp"):
            h = self._norm(x, f"{prefix}.post_attention_layernorm.weight")
            gate, up = self._linear(h, prefix, "gate_proj"), self._linear(h, prefix, "up_proj")
            return self._linear(ops.swiglu(gate, up), prefix, "down_proj", residual=x)

    def _attention(self, x: Tensor, h: Tensor, prefix: str) -> Tensor:
        c = self.config
        q, k, v = (self._linear(h, prefix, name) for name in ("q_proj", "k_proj", "v_proj"))
        q = self._rotated(q, f"{prefix}.self_attn.q_norm.weight")
        k = self._rotated(k, f"{prefix}.self_attn.k_norm.weight")
        heads = (c.num_heads, c.num_kv_heads)
        attended = ops.attention(q, k, v, self.segment_start, self.rows, *heads, self._precision)
        return self._linear(attended, prefix, "o_proj", residual=x)

    def _rotated(self, x: Tensor, weight: str) -> Tensor:
        """Queries or keys by their positions, after their norm where the model has one."""
        if not self.config.qk_norm:
            return ops.rope(x, self.rope_table, self.positions)
        eps = self.config.rms_norm_eps
        return ops.norm_rope(x, self.parameters.vector(weight), eps, self.rope_table, self.positions)

    def _linear(self, x: Tensor, prefix: str, name: str, residual: Tensor | None = None) -> Tensor:
        """x W^T + scale * (x A^T) B^T + bias + residual, in one product (LoRA, arXiv 2106.09685, equation 3)."""
        module = f"{prefix}.{PROJECTIONS[name]}.{name}"
        with self.graph.within(name):
            bias = None
            if self.config.qkv_bias and name in ("q_proj", "k_proj", "v_proj"):
                bias = self.parameters.vector(f"{module}.bias")
            adapter, low_rank = self.parameters.adapter(module), None
            weight = self.parameters.quantised(f"{module}.weight")
            if weight is not None and self._rng is None:
                return ops.linear(x, weight, None, bias, residual, self._precision, adapter)
            if adapter is not None:
                a, b, scale = adapter
                low_rank = (ops.matmul(self._dropped(x), a, transpose_b=True), b, scale)
            if weight is not None:
                return ops.linear(x, weight, low_rank, bias, residual, self._precision)
            dense = self.parameters.matrix(f"{module}.weight")
            return ops.matmul(x, dense, transpose_b=True, low_rank=low_rank, bias=bias, residual=residual)

    def _dropped(self, x: Tensor) -> Tensor:
        if self._rng is None:
            return x
        self._dropouts += 1
        return ops.dropout(x, self._rng, self._dropout, self._dropouts)
