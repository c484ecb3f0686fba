"""The transformer, traced: embedding, the layers of its family, norm and head, put together.

Where its weights come from is the business of `Parameters`: frozen and quantised, frozen as stored, or trainable.
Letters as in config.py: T = B*S tokens, D hidden, E head size, V vocabulary.
"""

from __future__ import annotations

from entrenar_gpu import ops
from entrenar_gpu.graph import Caps, Graph, Tensor
from entrenar_gpu.model.blocks import Trace
from entrenar_gpu.model.config import HEAD, ModelConfig
from entrenar_gpu.model.kv_cache import CachedPass, KeyValueCache
from entrenar_gpu.model.parameters import Parameters, Storage
from entrenar_gpu.model.tables import Head
from entrenar_gpu.ops.gemm.tiles import Arithmetic

NOISE_KEY = 0  # of the embeddings' noise; dropouts count from 1


class Transformer:
    """A decoder traced into one graph, for rows of a fixed length or for tokens that a cache remembers.

    Inputs by name: input_ids u32 [T], positions u32 [T], segment_start u32 [T]; for training also targets i32 [T],
    weights f32 [T] where tokens have them, inv_tokens f32 [1] (1 / unmasked tokens of the whole step, or the sum of
    their weights), rng u32 [3] with dropout or noise, noise f32 [T] (its magnitude) where the embeddings are `noisy`,
    and id_order u32 [T] (a stable argsort of the ids) when the embedding is trained. The tables of
    `ModelConfig.rope_tables` are written once.

    With `cached`, a pass takes T = `cached.tokens` tokens of any of the `rows` sequences of a cache, each of up to
    `seq` tokens: input_ids, positions and slots u32 [T] are the inputs, their names ending with T, since graphs for
    several numbers of tokens share a plan. That is for inference alone.
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
        cached: CachedPass | None = None,
        noisy: bool = False,
    ) -> None:
        self._head_precision: Arithmetic = precision if caps.f16 else "f32"  # the loss knows f16 and f32 alone
        self.graph, self.config, self.storage = graph, config, storage
        self._tokens, self._dropout = rows * seq if cached is None else cached.tokens, dropout
        self.parameters = Parameters(graph, config.weights, storage, caps)
        self.input_ids, positions = self._input("input_ids", cached), self._input("positions", cached)
        segment_start = self._input("segment_start") if cached is None else None
        cache = None
        if cached is not None:
            cache = KeyValueCache(rows, seq, cached.dtype, self._input("slots", cached), not cached.by_rows)
        rope_tables = {
            rope: graph.tensor(name, (seq, rope.rotary_dim), "f32", "weight")
            for name, rope in config.rope_tables.items()
        }
        self._rng = graph.tensor("rng", (3,), "u32") if dropout or noisy else None
        self._noise = graph.tensor("noise", (self._tokens,)) if noisy else None
        self._dropouts = 0
        dropped, by_rows = self._dropped if dropout else None, cached is not None and cached.by_rows
        self._trace = Trace(
            graph, self.parameters, rows, precision, positions, segment_start, rope_tables, dropped, cache, by_rows
        )

    def _input(self, name: str, cached: CachedPass | None = None) -> Tensor:
        """u32 [T]."""
        return self.graph.tensor(name if cached is None else f"{name}.{cached.tokens}", (self._tokens,), "u32")

    def hidden(self) -> Tensor:
        """The final normalised hidden states [T, D], times what logits are multiplied by."""
        config = self.config
        with self.graph.within("embed_tokens"):
            x = self._embedded()
            if config.embedding_multiplier != 1:
                x = ops.scale(x, config.embedding_multiplier)
            if self._noise is not None and self._rng is not None:
                x = ops.uniform_noise(x, self._noise, self._rng, NOISE_KEY)
        for index, layer in enumerate(config.layers):
            with self.graph.within(f"layers.{index}", layer=index):
                x = layer.trace(self._trace, x, config.layer_path(index))
        with self.graph.within("norm"):
            x = config.norm.trace(self._trace, x, config.final_norm)
            return x if config.logits_multiplier == 1 else ops.scale(x, config.logits_multiplier)

    def loss_sum(self, smoothing: float = 0.0, weighted: bool = False) -> Tensor:
        """Sum over unmasked tokens of the cross-entropy, [1]; of each times its weight where they are `weighted`."""
        targets = self.graph.tensor("targets", (self._tokens,), "i32")
        weights = self.graph.tensor("weights", (self._tokens,)) if weighted else None
        x, config, low_rank = self.hidden(), self.config, None
        with self.graph.within("lm_head"):
            head = self._head()
            if head.added is not None:
                a, b, scale = head.added
                dropped = x if self._trace.dropped is None else self._trace.dropped(x)
                low_rank = ops.matmul(dropped, a, transpose_b=True, alpha=scale), b
            options = (smoothing, self._head_precision, config.softcap, weights, low_rank)
            return ops.cross_entropy(x, targets, head.shards, *options)

    def last_logits(self) -> Tensor:
        """Logits [1, V] of the token whose index is the input `logits_at` u32 [1]."""
        at = self.graph.tensor("logits_at", (1,), "u32")
        return self.logits(ops.embedding(at, [self.hidden()]))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of final hidden states [n, D]."""
        with self.graph.within("lm_head"):
            logits = self._head().logits(hidden, by_rows=self._trace.cache is not None)
            return logits if self.config.softcap is None else ops.softcapped(logits, self.config.softcap)

    def _embedded(self) -> Tensor:
        """The rows of the embedding that the ids name, [T, D]."""
        name, parameters, adapter = self.config.embedding, self.parameters, self.storage.embedding_adapter
        trains = adapter is not None or self.storage.is_trained(name)
        needs_order = trains and self._trace.cache is None
        order = self.graph.tensor("id_order", (self._tokens,), "u32") if needs_order else None
        if adapter is not None:
            return adapter.embedded(parameters.table_call(name), self.input_ids, order)
        return ops.embedding(self.input_ids, parameters.table(name), order)

    def _head(self) -> Head:
        tied, storage = self.config.tie_word_embeddings, self.storage
        rows, adapter = self.config.embedding if tied else HEAD, storage.head_adapter
        if adapter is None and tied and storage.embedding_adapter is not None:
            adapter = storage.embedding_adapter.tied_head
        return Head(self.parameters.table(rows)) if adapter is None else adapter.head(self.parameters.table_call(rows))

    def _dropped(self, x: Tensor) -> Tensor:
        """The input of an adapter without the elements that dropout takes: others at each call."""
        assert self._rng is not None
        self._dropouts += 1
        return ops.dropout(x, self._rng, self._dropout, self._dropouts)
