"""A checkpoint onto an executor: one tensor at a time from its file, quantised on the device where there is one.

Host memory stays at a few chunks whatever the model's size: a weight travels in pieces of at most CHUNK_BYTES.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import Protocol

import numpy as np

from entrenar_gpu import ops
from entrenar_gpu.adapters import AdapterSpec
from entrenar_gpu.compiler import make_plan
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.executors import NumpyExecutor
from entrenar_gpu.files import NAMES, StoredArray
from entrenar_gpu.gpu import Replay, Uploader, pieces
from entrenar_gpu.graph import NUMPY_TYPES, Graph
from entrenar_gpu.model import HFCheckpoint, Storage, is_projection
from entrenar_gpu.ops.quantize import host_parts, nf4_part_names
from entrenar_gpu.quant import Nf4Weight, nf4
from entrenar_gpu.train.weight_cache import WeightCache

CHUNK_BYTES = 32 << 20
AHEAD = 8  # tensors that the system is told to read while one is on its way
STORED = {"BF16": "bf16", "F16": "half", "F32": "f32"}

Values = np.ndarray | StoredArray


def storage_of(checkpoint: HFCheckpoint, train: TrainConfig, adapters: AdapterSpec | None) -> Storage:
    """How a run keeps this checkpoint's weights: as stored where they stay dense, with the states NF4 weights bring."""
    shapes = checkpoint.config.parameter_shapes()
    dtypes = {n: STORED[checkpoint.info(n).dtype] for n in shapes if not checkpoint.is_nf4(n)}
    states = {}
    for name in shapes:
        weight = checkpoint.nf4(name)
        if weight is not None:
            states[name] = (weight.double, weight.dtype)
            if train.method == "lora":
                dtypes[name] = "f32"
    modules = adapters.modules if adapters is not None else {}
    return Storage(train.method, "bf16", dtypes, train.double_quant, states, modules)


def load_weights(
    executor: Replay | NumpyExecutor, checkpoint: HFCheckpoint, storage: Storage, cache: WeightCache | None = None
) -> str:
    """Write every base weight that the executor's graphs declare, quantising projections where `storage` says so.

    With a `cache`, quantised weights come from there when it holds them, else they are kept there. Returns where the
    weights came from, in words. Raises UserError when the cache cannot be written.
    """
    shapes = checkpoint.config.parameter_shapes()
    rest, parts = list(shapes), _made_here(checkpoint, storage)
    kept = cache.open({part: executor.tensors[part] for part in parts}) if cache is not None and parts else None
    target = DeviceTarget(executor) if isinstance(executor, Replay) else HostTarget(executor)
    try:
        if kept is not None:
            for part in parts:
                target.write_part(part, 0, kept.stored(part))
            held = set(parts)
            rest = [name for name in shapes if f"{name}.codes" not in held]
        for name, later in itertools.zip_longest(rest, rest[AHEAD:]):
            if later is not None:
                checkpoint.read_ahead(later)
            _write(target, checkpoint, storage, name)
    finally:
        target.close()
    if cache is None or not parts:
        return "checkpoint"
    if kept is not None:
        return str(cache.path)
    cache.write({part: executor.tensors[part] for part in parts}, executor.read)
    return f"checkpoint; quantised weights kept in {cache.path}"


def _made_here(checkpoint: HFCheckpoint, storage: Storage) -> list[str]:
    """The names of the tensors that loading quantises: those of projections that are not NF4 in the files."""
    names = checkpoint.config.parameter_shapes()
    made = [n for n in names if storage.method == "qlora" and is_projection(n) and not checkpoint.is_nf4(n)]
    return [part for name in made for part in nf4_part_names(name, storage.double_quant)]


class Target(Protocol):
    """Where weights go."""

    @property
    def executor(self) -> Replay | NumpyExecutor: ...

    def write_part(self, name: str, first: int, values: Values) -> None:
        """Write consecutive elements of a persistent tensor, from the `first` on, in its own dtype."""

    def quantize(self, name: str, weight: Values, double: bool) -> None:
        """Write the parts of a weight, which is given dense."""

    def close(self) -> None: ...


def _write(target: Target, checkpoint: HFCheckpoint, storage: Storage, name: str) -> None:
    """One base weight, as its kind wants it."""
    shape = checkpoint.config.parameter_shapes()[name]
    if storage.method == "qlora" and is_projection(name):
        stored = checkpoint.nf4(name)
        if stored is None:
            target.quantize(name, checkpoint.stored(name), storage.double_quant)
        else:
            _write_parts(target, name, stored)
    elif len(shape) == 2 and not is_projection(name):
        _write_table(target, checkpoint, name)
    else:
        _write_dense(target, checkpoint, name)


def _write_parts(target: Target, name: str, weight: Nf4Weight) -> None:
    """A weight quantised already."""
    for part, values in zip(nf4_part_names(name, weight.double), host_parts(weight), strict=True):
        target.write_part(part, 0, np.asarray(values, NUMPY_TYPES[target.executor.tensors[part].dtype]))


def _write_dense(target: Target, checkpoint: HFCheckpoint, name: str) -> None:
    if name not in target.executor.tensors:
        return
    stored: Values = checkpoint.f32(name) if checkpoint.is_nf4(name) else checkpoint.stored(name)
    _write_as(target, name, stored)


def _write_table(target: Target, checkpoint: HFCheckpoint, name: str) -> None:
    """The shards of an embedding."""
    stored, first, number = checkpoint.stored(name), 0, 0
    while first < stored.shape[0] and f"{name}.shard{number}" in target.executor.tensors:
        rows = target.executor.tensors[f"{name}.shard{number}"].shape[0]
        _write_as(target, f"{name}.shard{number}", stored[first : first + rows])
        first, number = first + rows, number + 1


def _write_as(target: Target, name: str, values: Values) -> None:
    """A tensor in chunks, in its own dtype."""
    dtype = NUMPY_TYPES[target.executor.tensors[name].dtype]
    for at, piece in pieces(values, CHUNK_BYTES):
        target.write_part(name, at, piece if piece.dtype == dtype else piece.astype(dtype))


class HostTarget:
    """The NumPy executor: quantises on the host."""

    def __init__(self, executor: NumpyExecutor) -> None:
        self.executor = executor

    def write_part(self, name: str, first: int, values: Values) -> None:
        self.executor.write_part(name, first, np.asarray(values).reshape(-1))

    def quantize(self, name: str, weight: Values, double: bool) -> None:
        _write_parts(self, name, Nf4Weight.from_dense(np.asarray(weight), double))

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
        dtype = STORED[NAMES[weight.dtype]]
        names = nf4_part_names(name, double)
        scales = self._scales(-(-weight.size // nf4.BLOCK)) if double else None
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
