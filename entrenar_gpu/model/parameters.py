"""The weights of a model, declared in a graph as a run keeps them: quantised, as stored, or trainable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from entrenar_gpu.graph import Caps, Graph, Tensor
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.ops import Nf4Tensors

TABLE_SHARD_BYTES = 128 << 20


@dataclass(frozen=True)
class Storage:
    """How the weights of a run are kept on the device.

    method: "qlora" (projections as NF4), "lora" (as stored) or "full" (every weight trainable, f32).
    dtypes: storage dtype of each checkpoint tensor that stays dense ("bf16", "half" or "f32"); missing ones are
    `dense`. `double_quant` and `rounded` describe the NF4 states, by tensor where a checkpoint brought its own.
    """

    method: str = "qlora"
    dense: str = "bf16"
    dtypes: Mapping[str, str] = field(default_factory=dict)
    double_quant: bool = True
    nf4_states: Mapping[str, tuple[bool, str]] = field(default_factory=dict)  # name -> (double, rounded dtype)
    adapters: Mapping[str, LoraModule] = field(default_factory=dict)  # by module, "model.layers.0.mlp.up_proj"

    def nf4_state(self, name: str) -> tuple[bool, str]:
        return self.nf4_states.get(name, (self.double_quant, "float32"))


def shard_rows(rows: int, columns: int, dtype_bytes: int, caps: Caps) -> list[int]:
    """Row counts of the shards that a [rows, columns] table is kept in; a multiple of 64 but for the last."""
    limit = min(TABLE_SHARD_BYTES, caps.max_binding_bytes, caps.max_buffer_bytes)
    fit = max(limit // (columns * dtype_bytes) // 64 * 64, 64)
    return [min(fit, rows - start) for start in range(0, rows, fit)]


class Parameters:
    """Declares the weights of a model in a graph, as its `Storage` keeps them."""

    def __init__(self, graph: Graph, config: ModelConfig, storage: Storage, caps: Caps) -> None:
        self._graph, self._config, self._storage, self._caps = graph, config, storage, caps
        self._shapes = config.parameter_shapes()
        self._nf4: dict[str, Nf4Tensors] = {}
        self._tables: dict[str, list[Tensor]] = {}

    def vector(self, name: str) -> Tensor:
        """A norm's weight or a bias, f32."""
        if self._storage.method == "full":
            return self._graph.parameter(name, self._shapes[name])
        return self._graph.tensor(name, self._shapes[name], "f32", "weight")

    def matrix(self, name: str) -> Tensor:
        """A projection's weight [N, K] that is kept dense."""
        shape = self._shapes[name]
        if self._storage.method == "full":
            return self._graph.parameter(name, shape)
        return self._graph.tensor(name, shape, self._storage.dtypes.get(name, self._storage.dense), "weight")

    def quantised(self, name: str) -> Nf4Tensors | None:
        """A projection's weight as it is kept, where that is NF4."""
        if self._storage.method != "qlora":
            return None
        if name not in self._nf4:
            (n, k), (double, rounded) = self._shapes[name], self._storage.nf4_state(name)
            self._nf4[name] = Nf4Tensors.declare(self._graph, name, (n, k), double, rounded)
        return self._nf4[name]

    def table(self, name: str) -> list[Tensor]:
        """The rows of an embedding, in shards `name.shard0`, ... that an adapter can bind."""
        if name not in self._tables:
            full = self._storage.method == "full"
            dtype = "f32" if full else self._storage.dtypes.get(name, self._storage.dense)
            rows, columns = self._shapes[name]
            shards = []
            for i, count in enumerate(shard_rows(rows, columns, 4 if dtype == "f32" else 2, self._caps)):
                shard, shape = f"{name}.shard{i}", (count, columns)
                made = (
                    self._graph.parameter(shard, shape) if full else self._graph.tensor(shard, shape, dtype, "weight")
                )
                shards.append(made)
            self._tables[name] = shards
        return self._tables[name]

    def adapter(self, module: str) -> tuple[Tensor, Tensor, float] | None:
        """(A [R, K], B [N, R], scale) of a projection, or None where it has none."""
        lora = self._storage.adapters.get(module)
        if lora is None:
            return None
        a = self._graph.parameter(lora.a_name, (lora.rank, lora.in_features))
        b = self._graph.parameter(lora.b_name, (lora.out_features, lora.rank))
        return a, b, lora.scale


@dataclass(frozen=True)
class LoraModule:
    """The adapter of one projection. `path` is the module's, as in `model.layers.0.self_attn.q_proj`."""

    path: str
    in_features: int
    out_features: int
    rank: int
    alpha: float
    scale: float

    @property
    def a_name(self) -> str:
        return f"{self.path}.lora_A.weight"

    @property
    def b_name(self) -> str:
        return f"{self.path}.lora_B.weight"
