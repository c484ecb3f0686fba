"""A checkpoint onto an executor: one tensor at a time from its file, quantised on the device where there is one.

Host memory stays at a few chunks whatever the model's size: a weight travels in pieces of at most CHUNK_BYTES.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

import numpy as np

from entrenar_gpu import ops
from entrenar_gpu.adapters import AdapterSpec, adapted, trained_weights
from entrenar_gpu.compiler import make_plan
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.dtypes import NUMPY_TYPES, STORED_FLOATS, STORED_NAMES
from entrenar_gpu.errors import UserError
from entrenar_gpu.executors import NumpyExecutor
from entrenar_gpu.files import StoredArray
from entrenar_gpu.gpu import Replay, Uploader, finite, pieces
from entrenar_gpu.graph import Graph, Tensor
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.model import HFCheckpoint, Storage, WeightTensors
from entrenar_gpu.ops.quantize import host_parts, nf4_part_names
from entrenar_gpu.quant import Nf4Weight, nf4
from entrenar_gpu.session.weight_cache import WeightCache

CHUNK_BYTES = 32 << 20
AHEAD = 8  # tensors that the system is told to read while one is on its way

Values = np.ndarray | StoredArray


def storage_of(checkpoint: HFCheckpoint, train: TrainConfig, adapters: AdapterSpec | None) -> Storage:
    """How a run keeps this checkpoint's weights: as stored where they stay dense, with the states NF4 weights bring.

    Whoever quantised a checkpoint chose what to leave out; what it holds dense stays dense.
    """
    names = [spec.name for spec in checkpoint.config.weights]
    dtypes = {n: STORED_FLOATS[checkpoint.info(n).dtype] for n in names if not checkpoint.is_nf4(n)}
    states = {}
    for name in names:
        weight = checkpoint.nf4(name)
        if weight is not None:
            states[name] = (weight.double, weight.dtype)
            if train.method == "lora":
                dtypes[name] = "f32"
    kept_dense = frozenset(dtypes) if states else frozenset()
    storage = Storage(
        train.method,
        "bf16",
        dtypes,
        train.double_quant,
        kept_dense=kept_dense,
        nf4_states=states,
        trained=trained_weights(train, checkpoint.config),
    )
    return adapted(storage, adapters)


def load_weights(
    executor: Replay | NumpyExecutor,
    checkpoint: HFCheckpoint,
    weights: Sequence[WeightTensors],
    cache: WeightCache | None = None,
) -> str:
    """Write every base weight that the executor's graphs declare, as `weights` says that it lies there.

    With a `cache`, quantised weights come from there when it holds them, else they are kept there. Returns where the
    weights came from, in words. Raises UserError when the cache cannot be written, and for a weight that is not finite,
    naming file and tensor.
    """
    rest = [weight for weight in weights if weight.tensors[0].name in executor.tensors]
    made = [weight for weight in rest if weight.nf4 is not None and not checkpoint.is_nf4(weight.spec.name)]
    parts = {tensor.name: executor.tensors[tensor.name] for weight in made for tensor in weight.tensors}
    kept = cache.open(parts) if cache is not None and parts else None
    target = DeviceTarget(executor) if isinstance(executor, Replay) else HostTarget(executor)
    try:
        if kept is not None:
            for part in parts:
                target.write_part(part, 0, kept.stored(part))
            rest = [weight for weight in rest if weight.tensors[0].name not in parts]
        for weight, later in itertools.zip_longest(rest, rest[AHEAD:]):
            if later is not None:
                checkpoint.read_ahead(later.spec.name)
            try:
                _write(target, checkpoint, weight)
            except FloatingPointError:
                name = weight.spec.name
                what = f"tensor {name!r} holds numbers that are not finite"
                raise UserError(f"{checkpoint.info(name).file}: {what}") from None
    finally:
        target.close()
    if cache is None or not parts:
        return "checkpoint"
    if kept is not None:
        return str(cache.path)
    cache.write(parts, executor.read)
    return f"checkpoint; quantised weights kept in {cache.path}"


def write_adapter(
    executor: Replay | NumpyExecutor, spec: AdapterSpec, values: Mapping[str, np.ndarray], prefix: str = ""
) -> None:
    """Write an adapter's tensors, and what its graphs are made with; `prefix` begins their names on the executor."""
    for name, array in values.items():
        first = 0
        for tensor in adapter_tensors(executor, prefix + name):
            executor.write(tensor.name, array[first : first + tensor.shape[0]])
            first += tensor.shape[0]
    for name, array in spec.constants().items():
        if prefix + name in executor.tensors:
            executor.write(prefix + name, array)


def adapter_tensors(executor: Replay | NumpyExecutor, name: str) -> list[Tensor]:
    """The tensors of an executor that one of an adapter's is: itself, or the shards of a table."""
    if name in executor.tensors:
        return [executor.tensors[name]]
    names = itertools.takewhile(executor.tensors.__contains__, (f"{name}.shard{i}" for i in itertools.count()))
    return [executor.tensors[shard] for shard in names]


class Target(Protocol):
    """Where weights go."""

    @property
    def executor(self) -> Replay | NumpyExecutor: ...

    def write_part(self, name: str, first: int, values: Values) -> None:
        """Write consecutive elements of a persistent tensor, from the `first` on, in its own dtype."""

    def quantize(self, name: str, weight: Values, double: bool) -> None:
        """Write the parts of a weight, which is given dense."""

    def close(self) -> None: ...


def _write(target: Target, checkpoint: HFCheckpoint, weight: WeightTensors) -> None:
    """One base weight: quantised, or as many rows into each of its tensors as that holds."""
    name, stored = weight.spec.name, checkpoint.nf4(weight.spec.name)
    if weight.nf4 is not None:
        if stored is None:
            target.quantize(name, checkpoint.stored(name), weight.nf4.double)
        else:
            _write_parts(target, name, stored)
        return
    values: Values = checkpoint.f32(name) if stored is not None else checkpoint.stored(name)
    first = 0
    for tensor in weight.tensors:
        rows = tensor.shape[0]
        _write_as(target, tensor.name, values[first : first + rows])
        first += rows


def _write_parts(target: Target, name: str, weight: Nf4Weight) -> None:
    """A weight quantised already."""
    for part, values in zip(nf4_part_names(name, weight.double), host_parts(weight), strict=True):
        target.write_part(part, 0, np.asarray(values, NUMPY_TYPES[target.executor.tensors[part].dtype]))


def _write_as(target: Target, name: str, values: Values) -> None:
    """A tensor in chunks, in its own dtype."""
    dtype = NUMPY_TYPES[target.executor.tensors[name].dtype]
    for at, piece in pieces(values, CHUNK_BYTES):
        target.write_part(name, at, piece if piece.dtype == dtype else piece.astype(dtype))


def _finite(values: np.ndarray) -> np.ndarray:
    """`values`. Raises FloatingPointError, as a device's uploader does, for a number that is not finite."""
    if not finite(values):
        raise FloatingPointError
    return values


class HostTarget:
    """The NumPy executor: quantises on the host."""

    def __init__(self, executor: NumpyExecutor) -> None:
        self.executor = executor

    def write_part(self, name: str, first: int, values: Values) -> None:
        self.executor.write_part(name, first, _finite(np.asarray(values).reshape(-1)))

    def quantize(self, name: str, weight: Values, double: bool) -> None:
        _write_parts(self, name, Nf4Weight.from_dense(_finite(np.asarray(weight)), double))

    def close(self) -> None:
        """Nothing is held."""


class DeviceTarget:
    """A device: quantises chunks of a weight by `nf4_quantize`, then its scales by `nf4_quantize_scales`."""

    def __init__(self, executor: Replay) -> None:
        self.executor = executor
        self._uploader = Uploader(executor.device)
        self._stages: dict[Hashable, Replay] = {}

    def write_part(self, name: str, first: int, values: Values) -> None:
        self._uploader.write_part(self.executor, name, first, values)

    def quantize(self, name: str, weight: Values, double: bool) -> None:
        dtype = STORED_FLOATS[STORED_NAMES[weight.dtype]]
        names = nf4_part_names(name, double)
        scales = self._scales(ceil_div(weight.size, nf4.BLOCK)) if double else None
        owner, absmax = (scales, "absmax") if scales is not None else (self.executor, names[1])
        for at, piece in pieces(weight, CHUNK_BYTES):
            stage = self._codes(piece.size, dtype)
            self._uploader.write_part(stage, "weight", 0, piece)
            stage.run("stage")
            self.executor.copy_from(stage, [("codes", names[0], at // 2)])
            owner.copy_from(stage, [("scales", absmax, at // nf4.BLOCK * 4)])
        if scales is not None:
            scales.run("stage")
            made = zip(("absmax_codes", "nested", "table"), names[1:], (0, 0, 0), strict=True)
            self.executor.copy_from(scales, made)

    def close(self) -> None:
        self.executor.wait()
        self._uploader.close()
        for stage in self._stages.values():
            stage.close()
        self._stages.clear()

    def _codes(self, size: int, dtype: str) -> Replay:
        def trace(graph: Graph) -> None:
            codes, scales = ops.nf4_quantize(graph.tensor("weight", (size,), dtype))
            ops.keep(codes, "codes")
            ops.keep(scales, "scales")

        return self._stage(("codes", size, dtype), trace)

    def _scales(self, blocks: int) -> Replay:
        def trace(graph: Graph) -> None:
            absmax = graph.tensor("absmax", (blocks,), "f32", "state")
            code = graph.tensor("code", (256,), "f32", "weight")
            steps = graph.tensor("steps", (nf4.SCALE_STEPS.size,), "u8", "weight")
            parts = ops.nf4_quantize_scales(absmax, code, steps)
            for tensor, name in zip(parts, ("absmax_codes", "nested", "table"), strict=True):
                ops.keep(tensor, name)

        made = self._stage(("scales", blocks), trace)
        made.write("code", nf4.SCALE_CODE)
        made.write("steps", nf4.SCALE_STEPS)
        return made

    def _stage(self, key: Hashable, trace: Callable[[Graph], None]) -> Replay:
        if key not in self._stages:
            graph = Graph("stage")
            trace(graph)
            plan = make_plan({"stage": graph}, self.executor.device.caps)
            self._stages[key] = Replay(self.executor.device, plan, self.executor.kernels)
        return self._stages[key]
