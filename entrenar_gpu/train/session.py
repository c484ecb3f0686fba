"""A model on an executor: checkpoint, adapter, plan and weights, ready to run. What train, eval and generate share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu import ops
from entrenar_gpu.adapters import AdapterSpec, init_adapter, load_adapter
from entrenar_gpu.compiler import Fitted, Plan, Recompute, weight_copies
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.executors import NumpyExecutor
from entrenar_gpu.gpu import Device, KernelCache, Replay, tuned
from entrenar_gpu.graph import Caps, Graph
from entrenar_gpu.model import HFCheckpoint, resolve_model
from entrenar_gpu.ops.gemm.tiles import TileTable
from entrenar_gpu.train import loader
from entrenar_gpu.train.graphs import LOSS_SCALE_NAME, MARGIN, RunShape
from entrenar_gpu.train.weight_cache import WeightCache

Floats = np.ndarray
DEFAULT_BUDGET_GIB = 16.0
HOST_CAPS = Caps(name="numpy", max_binding_bytes=1 << 50, max_buffer_bytes=1 << 50, f16=True, software=True)

Fit = Callable[[RunShape, Caps, int], Fitted]


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
    """An executor with a model's weights on it. `plan` is None on the NumPy executor, which plans nothing."""

    config: TrainConfig
    checkpoint: HFCheckpoint
    adapters: AdapterSpec | None
    shape: RunShape
    executor: Replay | NumpyExecutor
    graphs: Mapping[str, Graph]
    plan: Plan | None
    budget: Budget | None
    recompute: Recompute
    gpu_info: dict[str, str]
    weights_from: str = "checkpoint"  # or the cache file, in words

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        fit: Fit,
        with_adapter: bool = True,
        kernels: KernelCache | None = None,
        tiles: TileTable | None = None,
        budget_bytes: int | None = None,
    ) -> Session:
        """Open the model of `config`, plan with `fit`, allocate, and load weights and adapter.

        Everything that can be wrong with the files, the device or the budget is said before memory is allocated.
        `kernels` is given by whoever has opened a device and goes on using it; it wins over `config.device`. `tiles`,
        of the checkpoint that a run goes on from, stand in for measuring with `config.tune`, and `budget_bytes`, where
        the adapter has so many, for what it has: what a plan rounds or sums in another order follows from both.
        """
        if config.cache and config.cache_dir == "":
            raise UserError("--cache-dir: missing; name a folder, or leave it out for the system's")
        checkpoint = HFCheckpoint.open(resolve_model(config.model))
        spec, values = _adapter(config, checkpoint) if with_adapter else (None, {})
        shape = RunShape(checkpoint.config, loader.storage_of(checkpoint, config, spec), config)
        if config.device == "numpy" and kernels is None:
            session = cls._on_host(config, checkpoint, spec, shape, fit)
        else:
            kernels = kernels if kernels is not None else KernelCache(Device.open(config.device))
            session = cls._on_device(config, checkpoint, spec, shape, fit, kernels, tiles, budget_bytes)
        try:
            session._load(values)
        except BaseException:
            session.close()  # whoever lends a device goes on using it
            raise
        return session

    @classmethod
    def _on_host(
        cls, config: TrainConfig, checkpoint: HFCheckpoint, spec: AdapterSpec | None, shape: RunShape, fit: Fit
    ) -> Session:
        unlimited = replace(shape, train=replace(config, memory_budget=None))  # nor is there memory to fill
        recompute, _, graphs = fit(unlimited, HOST_CAPS, HOST_CAPS.max_buffer_bytes)
        info = {"adapter": "numpy", "backend": "numpy", "driver": np.__version__}
        return cls(config, checkpoint, spec, shape, NumpyExecutor(graphs), graphs, None, None, recompute, info)

    @classmethod
    def _on_device(
        cls,
        config: TrainConfig,
        checkpoint: HFCheckpoint,
        spec: AdapterSpec | None,
        shape: RunShape,
        fit: Fit,
        kernels: KernelCache,
        tiles: TileTable | None,
        budget_bytes: int | None,
    ) -> Session:
        device = kernels.device
        budget = memory_budget(config, device.caps)
        if budget_bytes is not None and config.memory_budget is None and _may_have(device.caps, budget_bytes):
            budget = Budget(budget_bytes, "what the run began with")

        def fitted(caps: Caps) -> Fitted:
            return fit(shape, caps, budget.nbytes)

        measures = config.tune and tiles is None
        recompute, plan, graphs = tuned(fitted, kernels) if measures else fitted(replace(device.caps, tiles=tiles))
        info = {
            "adapter": device.info["device"],
            "backend": device.info["backend_type"],
            "driver": device.info["description"],
        }
        executor = Replay(device, plan, kernels)
        return cls(config, checkpoint, spec, shape, executor, graphs, plan, budget, recompute, info)

    def _load(self, adapter: Mapping[str, Floats]) -> None:
        """Weights, the adapter's first values, and constants of the run, onto the executor."""
        config, executor, model = self.config, self.executor, self.checkpoint.config
        cached = config.cache and config.method == "qlora"
        cache = WeightCache(self.checkpoint, config.double_quant, config.cache_dir) if cached else None
        self.weights_from = loader.load_weights(executor, self.checkpoint, self.shape.storage, cache)
        executor.write("rope_table", ops.rope_table(model.rope_frequencies(), config.seq))
        for name, array in adapter.items():
            executor.write(name, array)
        if LOSS_SCALE_NAME in executor.tensors:
            caps = HOST_CAPS if self.plan is None else self.plan.caps
            executor.write(LOSS_SCALE_NAME, np.array([self.shape.first_loss_scale(caps)], np.float32))
        if weight_copies.GRAPH in self.graphs:
            executor.run(weight_copies.GRAPH)

    @property
    def tiles(self) -> TileTable:
        """The measured choices of tiles that the plan was made with; empty where sizes alone decided."""
        return self.plan.caps.tiles or {} if self.plan is not None else {}

    @property
    def allocated_bytes(self) -> int:
        return self.executor.device.allocated_bytes if isinstance(self.executor, Replay) else 0

    def trainable(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is trained."""
        return {t.name: t.shape for t in self.executor.tensors.values() if t.role == "param"}

    def write_batch(self, batch: Mapping[str, Any]) -> None:
        """The arrays of a batch that the graphs take."""
        for name, array in batch.items():
            if name in self.executor.tensors:
                self.executor.write(name, array.reshape(-1))
        if "id_order" in self.executor.tensors:
            order = np.argsort(batch["input_ids"].reshape(-1), kind="stable")
            self.executor.write("id_order", order.astype(np.uint32))

    def adapter_values(self) -> dict[str, Floats]:
        """The adapter's tensors, read from the device."""
        assert self.adapters is not None
        return {name: self.executor.read(name) for name in self.adapters.shapes()}

    def close(self) -> None:
        self.executor.close()


def _may_have(caps: Caps, nbytes: int) -> bool:
    """Whether a plan of so many bytes may fit the adapter: it does not on a smaller one than the run began on."""
    return caps.memory_bytes is None or nbytes <= caps.memory_bytes


def _adapter(config: TrainConfig, checkpoint: HFCheckpoint) -> tuple[AdapterSpec | None, dict[str, Floats]]:
    """The adapter of a run and its first values: given, fresh, or none in full training."""
    if config.method == "full":
        return None, {}
    if config.adapter_init is not None:
        return load_adapter(Path(config.adapter_init), checkpoint.config)
    spec = AdapterSpec.from_config(config, checkpoint.config)
    return spec, init_adapter(spec, config.seed, config.lora_init)
