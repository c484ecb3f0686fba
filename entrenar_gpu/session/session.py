"""A model on an executor: checkpoint, adapter, plan and weights, ready to run. What train, eval and generate share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu.adapters import AdapterSpec, adapter_spec, init_adapter, load_adapter
from entrenar_gpu.compiler import FittedPlan, Plan, PlanOptions, weight_copies
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.data import segment_lengths
from entrenar_gpu.errors import UserError
from entrenar_gpu.executors import NumpyExecutor
from entrenar_gpu.gpu import ENGINES, Device, KernelCache, Replay, device_errors, is_host, open_device, tuned
from entrenar_gpu.graph import Caps, Graph
from entrenar_gpu.model import HFCheckpoint, WeightTensors, declared_weights, resolve_model
from entrenar_gpu.ops.gemm.tiles import Arithmetic, TileTable
from entrenar_gpu.session import loader
from entrenar_gpu.session.base_identity import BaseIdentity
from entrenar_gpu.session.graphs import LOSS_SCALE_NAME, MARGIN, Fit, RunShape, Trace, fit_run
from entrenar_gpu.session.weight_cache import WeightCache

Floats = np.ndarray
DEFAULT_BUDGET_GIB = 16.0
HOST_CAPS = Caps(
    name="numpy", max_binding_bytes=1 << 50, max_buffer_bytes=1 << 50, f16=True, software=True, timestamps=True
)

HOST_INFO = {"adapter": "numpy", "backend": "numpy", "driver": np.__version__}


@dataclass(frozen=True)
class Budget:
    """Device memory a run may use, and where the figure comes from, in words."""

    nbytes: int
    source: str


def memory_budget(config: TrainConfig, caps: Caps) -> Budget:
    """--memory-budget, else 90% of the GPU's memory, else 16 GiB."""
    if config.memory_budget is not None:
        return Budget(int(config.memory_budget * 2**30), "--memory-budget")
    if caps.memory_bytes is not None:
        return Budget(int(caps.memory_bytes * MARGIN), f"{caps.memory_bytes / 2**30:.1f} GiB of GPU memory")
    return Budget(int(DEFAULT_BUDGET_GIB * 2**30), "GPU memory unknown; 16 GiB assumed")


@dataclass
class Session:
    """An executor with a model's weights on it. `budget` is None on the NumPy executor, which has no memory to fill."""

    config: TrainConfig
    checkpoint: HFCheckpoint
    adapters: AdapterSpec | None
    shape: RunShape
    executor: Replay | NumpyExecutor
    fitted: FittedPlan
    budget: Budget | None
    gpu_info: dict[str, str]
    weights_from: str = "checkpoint"  # or the cache file, in words
    base: BaseIdentity | None = None  # of what is trained; None where nothing is

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        trace: Trace,
        began: PlanOptions | None = None,
        with_adapter: bool = True,
        kernels: KernelCache | None = None,
        engine: str | None = None,
        fit: Fit = fit_run,
        identified: bool = False,
    ) -> Session:
        """Open the model of `config`, plan the graphs that `trace` makes, allocate, and load weights and adapter.

        Everything that can be wrong with the files, the device or the budget is said before memory is allocated.
        `began` is what the checkpoint that a run goes on from was planned with: its tiles stand in for measuring with
        `config.tune`, and its budget, where the GPU has as much, for what that has, since what a plan rounds or sums
        in another order follows from both. So it does from the `engine` that the run began with, which is taken where
        it is there and no other is asked for. `kernels` is given by whoever has opened a device and goes on using it;
        it wins over `config.device`. `fit` makes the plan, within the budget that is known then. With `identified`, the
        base's checksums are made while it is loaded.
        """
        if config.cache and config.cache_dir == "":
            raise UserError("--cache-dir: missing; name a folder, or leave it out for the system's")
        checkpoint = HFCheckpoint.open(resolve_model(config.model))
        spec, values = _adapter(config, checkpoint) if with_adapter else (None, {})
        shape = RunShape(checkpoint.config, loader.storage_of(checkpoint, config, spec), config)
        executor: Replay | NumpyExecutor
        if kernels is None and is_host(config.device):
            budget, info = None, HOST_INFO
            fitted = fit(trace, shape, HOST_CAPS, shape.plan_options(HOST_CAPS, None))
            executor = NumpyExecutor(fitted.graphs, groups=fitted.plan.groups)
        else:
            kernels = kernels if kernels is not None else KernelCache(_opened(config, engine))
            if engine not in (None, kernels.device.engine.name):
                _say_other_engine(engine, kernels.device.engine.name)
            budget = _budget(config, kernels.device.caps, began)
            with kernels.device.watched():
                fitted = fit_on(kernels, trace, shape, budget, None if began is None else began.tiles, fit)
                executor, info = Replay(kernels.device, fitted.plan, kernels), _gpu_info(kernels.device)
        base = BaseIdentity(checkpoint) if identified else None
        session = cls(config, checkpoint, spec, shape, executor, fitted, budget, info, base=base)
        try:
            with device_errors(info["adapter"]):
                session._load(values)
        except BaseException:
            session.close()  # whoever lends a device goes on using it
            raise
        return session

    def _load(self, adapter: Mapping[str, Floats]) -> None:
        """Weights, the adapter's first values, and constants of the run, onto the executor."""
        config, executor, model = self.config, self.executor, self.checkpoint.config
        cached = config.cache and config.method == "qlora"
        cache = WeightCache(self.checkpoint, config.double_quant, config.cache_dir) if cached else None
        self.weights_from = loader.load_weights(executor, self.checkpoint, self.weights, cache)
        if self.base is not None:
            self.base.value()  # while the files are there
        for name, rope in model.rope_tables.items():
            executor.write(name, rope.table(config.seq))
        if self.adapters is not None:
            loader.write_adapter(executor, self.adapters, adapter)
        if LOSS_SCALE_NAME in executor.tensors:
            scale = self.shape.first_loss_scale(self.fitted.plan.caps)
            executor.write(LOSS_SCALE_NAME, np.array([scale], np.float32))
        if weight_copies.GRAPH in self.graphs:
            executor.run(weight_copies.GRAPH)

    @property
    def plan(self) -> Plan | None:
        """What lies where on the device; None on the NumPy executor."""
        return self.fitted.plan if isinstance(self.executor, Replay) else None

    @property
    def graphs(self) -> Mapping[str, Graph]:
        return self.fitted.graphs

    @cached_property
    def weights(self) -> list[WeightTensors]:
        """How each of the model's weights lies on the executor, in the order the model runs."""
        return declared_weights(self.shape.model.weights, self.shape.storage, self.fitted.plan.caps)

    @property
    def tiles(self) -> TileTable:
        """The measured choices of tiles that the plan was made with; empty where sizes alone decided."""
        return self.fitted.plan.options.tiles

    @property
    def allocated_bytes(self) -> int:
        return self.executor.device.allocated_bytes if isinstance(self.executor, Replay) else 0

    @property
    def arithmetic(self) -> Arithmetic:
        """What projections are multiplied in on this device; in int8 it tells the scheme of scales."""
        return self.shape.precision(self.fitted.plan.caps)

    @property
    def engine(self) -> str:
        """What runs the graphs: an engine's name, or numpy."""
        return self.executor.device.engine.name if isinstance(self.executor, Replay) else "numpy"

    def trainable(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is trained."""
        return {t.name: t.shape for t in self.executor.tensors.values() if t.role == "param"}

    def write_batch(self, batch: Mapping[str, Any]) -> None:
        """The arrays of a batch that the graphs take; where they take weights and it has none, each is 1."""
        if "weights" in self.executor.tensors and "weights" not in batch:
            batch = {**batch, "weights": np.ones(batch["targets"].shape, np.float32)}
        if self.adapters is not None and "input_ids" in batch:
            batch = {**batch, "input_ids": self.adapters.looked_up(batch["input_ids"])}
        for name, array in batch.items():
            if name in self.executor.tensors:
                self.executor.write(name, array.reshape(-1))
        if "noise" in self.executor.tensors and self.config.neftune is not None:
            elements = segment_lengths(batch["segment_start"]) * self.shape.model.hidden_size
            self.executor.write("noise", (self.config.neftune / np.sqrt(elements)).reshape(-1))
        if "id_order" in self.executor.tensors:
            order = np.argsort(batch["input_ids"].reshape(-1), kind="stable")
            self.executor.write("id_order", order.astype(np.uint32))

    def adapter_values(self) -> dict[str, Floats]:
        """The adapter's tensors, read from the device."""
        assert self.adapters is not None
        executor = self.executor
        tensors = {name: loader.adapter_tensors(executor, name) for name in self.adapters.shapes()}
        parts = {name: [executor.read(tensor.name) for tensor in shards] for name, shards in tensors.items()}
        return {name: shards[0] if len(shards) == 1 else np.concatenate(shards) for name, shards in parts.items()}

    def close(self) -> None:
        self.executor.close()


def _opened(config: TrainConfig, began_with: str | None) -> Device:
    """The device of a run, through the engine that it began with where that is there and no other is asked for."""
    free = (config.engine or os.environ.get("ENTRENAR_ENGINE") or "auto") == "auto"
    if free and began_with in ENGINES:
        with contextlib.suppress(UserError):
            return open_device(config.device, engine=began_with)
    return open_device(config.device, engine=config.engine)


def _say_other_engine(began_with: str | None, now: str) -> None:
    text = f"the run began on {began_with} and goes on on {now}: sums round differently from here on"
    print(text, file=sys.stderr)


def _budget(config: TrainConfig, caps: Caps, began: PlanOptions | None) -> Budget:
    """`memory_budget`, or what the run began with; but not on a GPU with less memory than that."""
    nbytes = None if began is None or config.memory_budget is not None else began.budget_bytes
    if nbytes is None or (caps.memory_bytes is not None and nbytes > caps.memory_bytes):
        return memory_budget(config, caps)
    return Budget(nbytes, "what the run began with")


def fit_on(
    kernels: KernelCache,
    trace: Trace,
    shape: RunShape,
    budget: Budget,
    tiles: TileTable | None = None,
    fit: Fit = fit_run,
) -> FittedPlan:
    """The plan of a run on an open device, with `tiles`, or measured ones where none are given and --tune asks."""
    caps = kernels.device.caps
    options = shape.plan_options(caps, budget.nbytes, tiles)

    def fitted(options: PlanOptions) -> FittedPlan:
        return fit(trace, shape, caps, options)

    return tuned(fitted, options, kernels) if shape.train.tune and tiles is None else fitted(options)


def _gpu_info(device: Device) -> dict[str, str]:
    info = device.info
    return {"adapter": info["device"], "backend": info["backend_type"], "driver": info["description"]}


def _adapter(config: TrainConfig, checkpoint: HFCheckpoint) -> tuple[AdapterSpec | None, dict[str, Floats]]:
    """The adapter of a run and its first values: given, fresh, or none in full training."""
    if config.adapter_init is not None and config.method == "full":
        raise UserError("--method full trains every weight and has no adapter: leave out --adapter-init or --adapter")
    if config.adapter_init is not None:
        return load_adapter(Path(config.adapter_init), checkpoint.config)
    spec = adapter_spec(config, checkpoint.config)
    if spec is None:
        return None, {}
    rows = {table.module: checkpoint.config.stored_as(table) for table in checkpoint.config.tables}
    return spec, init_adapter(spec, config.seed, config.lora_init, lambda path: checkpoint.f32(rows[path]))
