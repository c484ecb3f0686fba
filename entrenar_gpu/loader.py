"""A checkpoint onto the device: one tensor at a time from the memory map, quantised there.

Host memory stays at a few chunks whatever the model's size: a weight travels in pieces of at most CHUNK_BYTES.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

import numpy as np

from entrenar_gpu import nf4, ops
from entrenar_gpu.adapters import AdapterSpec
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.graph import Graph
from entrenar_gpu.interpret import NUMPY_TYPES, NumpyExecutor
from entrenar_gpu.model import Storage
from entrenar_gpu.model_config import is_projection
from entrenar_gpu.nf4 import Nf4Weight
from entrenar_gpu.ops.quantize import host_parts, nf4_part_names
from entrenar_gpu.plan import make_plan
from entrenar_gpu.replay import Replay
from entrenar_gpu.weights import Checkpoint

CHUNK_BYTES = 32 << 20
STORED = {"BF16": "bf16", "F16": "half", "F32": "f32"}


def storage_of(checkpoint: Checkpoint, train: TrainConfig, adapters: AdapterSpec | None) -> Storage:
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


def load_weights(executor: Replay | NumpyExecutor, checkpoint: Checkpoint, storage: Storage) -> None:
    """Write every base weight that the executor's graphs declare, quantising projections where `storage` says so."""
    quantizer = DeviceQuantizer(executor) if isinstance(executor, Replay) else HostQuantizer(executor)
    for name, shape in checkpoint.config.parameter_shapes().items():
        if storage.method == "qlora" and is_projection(name):
            stored = checkpoint.nf4(name)
            if stored is not None:
                write_parts(executor, name, stored)
            else:
                quantizer.quantize(name, checkpoint.raw(name), storage.nf4_state(name)[0])
        elif len(shape) == 2 and not is_projection(name):
            _write_table(executor, checkpoint, name)
        else:
            _write_dense(executor, checkpoint, name)
    quantizer.close()


def write_parts(executor: Replay | NumpyExecutor, name: str, weight: Nf4Weight) -> None:
    """A weight quantised already."""
    for part, values in zip(nf4_part_names(name, weight.double), host_parts(weight), strict=True):
        executor.write(part, values)


def _write_dense(executor: Replay | NumpyExecutor, checkpoint: Checkpoint, name: str) -> None:
    if name not in executor.tensors:
        return
    stored = checkpoint.f32(name) if checkpoint.is_nf4(name) else checkpoint.raw(name)
    item = NUMPY_TYPES[executor.tensors[name].dtype]
    for at, piece in _pieces(stored, item.itemsize):
        executor.write_part(name, at, piece.astype(item, copy=False))


def _write_table(executor: Replay | NumpyExecutor, checkpoint: Checkpoint, name: str) -> None:
    """The pages of an embedding, row by row in chunks."""
    stored, first, number = checkpoint.raw(name), 0, 0
    while first < stored.shape[0] and f"{name}.page{number}" in executor.tensors:
        page = executor.tensors[f"{name}.page{number}"]
        item = NUMPY_TYPES[page.dtype]
        rows = stored[first : first + page.shape[0]]
        for at, piece in _pieces(rows, item.itemsize):
            executor.write_part(page.name, at, piece.astype(item, copy=False))
        first, number = first + page.shape[0], number + 1


def _pieces(array: np.ndarray, itemsize: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first element, flat piece) of an array, in order."""
    flat, step = array.reshape(-1), CHUNK_BYTES // max(itemsize, array.dtype.itemsize)
    for at in range(0, flat.size, step):
        yield at, flat[at : at + step]


class HostQuantizer:
    """Quantises on the host, for the NumPy executor."""

    def __init__(self, executor: NumpyExecutor) -> None:
        self._executor = executor

    def quantize(self, name: str, weight: np.ndarray, double: bool) -> None:
        write_parts(self._executor, name, Nf4Weight.from_dense(np.asarray(weight), double))

    def close(self) -> None:
        """Nothing is held."""


class DeviceQuantizer:
    """Quantises on the GPU: chunks of a weight by `nf4_quantize`, then its scales by `nf4_quantize_scales`."""

    def __init__(self, target: Replay) -> None:
        self._target = target
        self._stages: dict[Hashable, Replay] = {}
        self._pending_bytes = 0

    def quantize(self, name: str, weight: np.ndarray, double: bool) -> None:
        dtype = STORED[{"float32": "F32", "float16": "F16"}.get(str(weight.dtype), "BF16")]
        blocks = -(-weight.size // nf4.BLOCK)
        names = nf4_part_names(name, double)
        scales = self._scales(blocks) if double else None
        absmax = (scales, "absmax") if scales is not None else (self._target, names[1])
        for at, piece in _pieces(weight, 4):
            stage = self._codes(piece.size, dtype)
            stage.write("weight", piece)
            stage.run("stage")
            self._target.copy_from(stage, "codes", names[0], at // 2)
            absmax[0].copy_from(stage, "scales", absmax[1], at // nf4.BLOCK * 4)
            self._breathe(piece.nbytes)
        if scales is not None:
            scales.run("stage")
            for source, part in zip(("absmax_codes", "nested", "table"), names[1:], strict=True):
                self._target.copy_from(scales, source, part, 0)

    def close(self) -> None:
        self._target.wait()
        for stage in self._stages.values():
            stage.close()
        self._stages.clear()

    def _breathe(self, nbytes: int) -> None:
        """Let the device catch up now and then: queued uploads are host memory until they are done."""
        self._pending_bytes += nbytes
        if self._pending_bytes > 8 * CHUNK_BYTES:
            self._target.wait()
            self._pending_bytes = 0

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
            plan = make_plan({"stage": graph}, self._target.device.caps)
            self._stages[key] = Replay(self._target.device, plan, self._target.kernels)
        return self._stages[key]
