"""The weights of a model, declared in a graph as a run keeps them: quantised, as stored, or trainable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from entrenar_gpu.graph import Caps, Graph, Tensor
from entrenar_gpu.model.projection import ModuleAdapter
from entrenar_gpu.model.tables import EmbeddingAdapter, HeadAdapter, TableCall, shard_rows
from entrenar_gpu.model.weight_spec import WeightSpec
from entrenar_gpu.ops import Nf4Tensors


@dataclass(frozen=True)
class Storage:
    """How the weights of a run are kept on the device.

    method: "qlora" (projections as NF4), "lora" (as stored) or "full" (every weight trainable, f32).
    dtypes: storage dtype of each checkpoint tensor that stays dense ("bf16", "half" or "f32"); missing ones are
    `dense`. `double_quant` and `rounded` describe the NF4 states, by tensor where a checkpoint brought its own.
    kept_dense: projections that a quantised checkpoint leaves as they are (`llm_int8_skip_modules`), and so does qlora.
    """

    method: str = "qlora"
    dense: str = "bf16"
    dtypes: Mapping[str, str] = field(default_factory=dict)
    double_quant: bool = True
    kept_dense: frozenset[str] = frozenset()
    nf4_states: Mapping[str, tuple[bool, str]] = field(default_factory=dict)  # name -> (double, rounded dtype)
    trained: frozenset[str] | None = None  # with "full", the names of the weights that are; None, every one
    adapters: Mapping[str, ModuleAdapter] = field(default_factory=dict)  # by module, "model.layers.0.mlp.up_proj"
    embedding_adapter: EmbeddingAdapter | None = None
    head_adapter: HeadAdapter | None = None
    adapter_prefix: str = ""  # of their tensors' names, where there are several over one base

    def is_nf4(self, spec: WeightSpec) -> bool:
        return self.method == "qlora" and spec.kind == "projection" and spec.name not in self.kept_dense

    def is_trained(self, name: str) -> bool:
        """Whether a weight is trained itself."""
        return self.method == "full" and (self.trained is None or name in self.trained)

    def nf4_state(self, name: str) -> tuple[bool, str]:
        return self.nf4_states.get(name, (self.double_quant, "float32"))

    def dtype(self, spec: WeightSpec) -> str:
        """Of a weight that is not NF4."""
        if self.method == "full" or not (spec.is_table or spec.kind == "projection"):
            return "f32"
        return self.dtypes.get(spec.name, self.dense)


@dataclass(frozen=True)
class WeightTensors:
    """How one weight lies on the device: whole, as shards of rows, or as the parts of NF4, codes first."""

    spec: WeightSpec
    tensors: tuple[Tensor, ...]
    nf4: Nf4Tensors | None = None


class Parameters:
    """Declares the weights of a model in a graph, as its `Storage` keeps them."""

    def __init__(self, graph: Graph, weights: Iterable[WeightSpec], storage: Storage, caps: Caps) -> None:
        self._graph, self._storage, self._caps = graph, storage, caps
        self._specs = {spec.name: spec for spec in weights}

    def declared(self, name: str) -> WeightTensors:
        """A weight's tensors in the graph: the first call makes them."""
        spec, storage = self._specs[name], self._storage
        if storage.is_nf4(spec):
            (n, k), (double, rounded) = spec.shape, storage.nf4_state(name)
            nf4 = Nf4Tensors.declare(self._graph, name, (n, k), double, rounded)
            return WeightTensors(spec, nf4.parts, nf4)
        dtype = storage.dtype(spec)
        if not spec.is_table:
            return WeightTensors(spec, (self._dense(name, spec.shape, dtype),))
        rows, columns = spec.shape
        counts = shard_rows(rows, columns, 4 if dtype == "f32" else 2, self._caps)
        shards = [self._dense(f"{name}.shard{i}", (count, columns), dtype) for i, count in enumerate(counts)]
        return WeightTensors(spec, tuple(shards))

    def _dense(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        if self._storage.is_trained(name.partition(".shard")[0]):
            return self._graph.parameter(name, shape)
        return self._graph.tensor(name, shape, dtype, "weight")

    def vector(self, name: str) -> Tensor:
        """A norm's weight or a bias, f32."""
        (tensor,) = self.declared(name).tensors
        return tensor

    def matrix(self, name: str) -> Tensor | Nf4Tensors:
        """A projection's weight [N, K]."""
        weight = self.declared(name)
        return weight.nf4 or weight.tensors[0]

    def table(self, name: str) -> list[Tensor]:
        """The rows of an embedding, in shards `name.shard0`, ... that a GPU can bind."""
        return list(self.declared(name).tensors)

    def adapter(self, module: str) -> ModuleAdapter | None:
        """The adapter of a projection, where it has one."""
        return self._storage.adapters.get(module)

    def table_call(self, name: str) -> TableCall:
        """What an adapter of the embedding or the head gets of these rows."""
        return TableCall(self._graph, lambda: self.table(name), self._caps, self.adapter_prefix)

    @property
    def adapter_prefix(self) -> str:
        return self._storage.adapter_prefix


def declared_weights(weights: Iterable[WeightSpec], storage: Storage, caps: Caps) -> list[WeightTensors]:
    """How each of a model's weights lies on a device of such abilities."""
    wanted = list(weights)
    parameters = Parameters(Graph("weights"), wanted, storage, caps)
    return [parameters.declared(spec.name) for spec in wanted]
