"""What a plan's memory is for: the answer of `entrenar-gpu plan`, without a GPU or weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar_gpu.adapters import adapted, adapter_spec, trained_weights
from entrenar_gpu.compiler import Plan, Recompute, weight_copies
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.dtypes import TORCH_FLOATS
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import read_json_object
from entrenar_gpu.graph import Caps, Graph, Tensor
from entrenar_gpu.model import (
    INDEX_FILE,
    SINGLE_FILE,
    HFCheckpoint,
    Storage,
    WeightTensors,
    cache_names,
    declared_weights,
    load_model_config,
    resolve_model,
)
from entrenar_gpu.session.graphs import Fit, RunShape, Trace, fit_run, training_graphs
from entrenar_gpu.session.kernel_report import kernel_report
from entrenar_gpu.session.loader import storage_of

# Capabilities to plan for without a device: WebGPU's guaranteed limits, those of common drivers, and a large card's.
PROFILES = {
    "webgpu": Caps(),
    "desktop": Caps(name="desktop", max_binding_bytes=(2 << 30) - 4, max_buffer_bytes=(4 << 30) - 4, timestamps=True),
    "large": Caps(
        name="large",
        max_binding_bytes=(2 << 30) - 4,
        max_buffer_bytes=(4 << 30) - 4,
        max_workgroup_bytes=48 << 10,
        max_invocations=1024,
        f16=True,
        subgroups=True,
        timestamps=True,
        timestamps_inside_passes=True,
        flops_per_second=2e12,
    ),
}
PURPOSES = (
    *("nf4_bytes", "scale_bytes", "embedding_bytes", "dense_bytes", "adapter_bytes", "gradient_bytes"),
    *("optimizer_bytes", "copy_bytes", "cache_bytes", "activation_bytes", "scratch_bytes", "transfer_bytes"),
)


def caps_for(device: str | None, engine: str | None, profile: str | None) -> Caps:
    """Abilities to plan for: of --profile, of --device, or of a common desktop driver."""
    if profile is not None and device is not None:
        raise UserError("--profile: give it or --device, not both")
    if device is not None:
        from entrenar_gpu.gpu import choose_gpu, gpu_caps

        return gpu_caps(choose_gpu(device, engine).gpu)
    if profile is not None and profile not in PROFILES:
        raise UserError(f"--profile: {profile!r} is not one of {', '.join(PROFILES)}")
    return PROFILES[profile or "desktop"]


@dataclass(frozen=True)
class PlanReport:
    """A plan by purpose, in bytes; the parts sum to `peak_bytes`. `weights` and `graphs` tell what buffers are for."""

    plan: Plan
    recompute: Recompute
    weights: Sequence[WeightTensors]
    graphs: Mapping[str, Graph]
    profile: str
    budget_bytes: int

    def to_mapping(self) -> dict[str, Any]:
        parts = dict.fromkeys(PURPOSES, 0)
        purposes = self._purposes()
        for name, nbytes in self.plan.buffers.items():
            parts[purposes.get(name, "transfer_bytes")] += nbytes
        return {
            **parts,
            "peak_bytes": self.plan.peak_bytes,
            "budget_bytes": self.budget_bytes,
            "recompute": self.recompute.describe(),
            "recompute_share": self.recompute.share,
            "recomputed": self.recompute.counts("recompute"),
            "fp16": self.recompute.counts("fp16"),
            "device": self.profile,
            "arithmetic": self._arithmetic(),
            "kernels": kernel_report(self.plan),
        }

    def _arithmetic(self) -> str:
        """What projections of NF4 weights are multiplied in; in int8 it tells the scheme of scales."""
        linear = (node for graph in self.graphs.values() for node in graph.nodes if node.op == "linear")
        return next((str(node.attrs["arithmetic"]) for node in linear), "f32")

    def _purposes(self) -> dict[str, str]:
        """The key that each buffer counts under; reports, ticks and inputs are transfers."""
        result: dict[str, str] = {}
        of_weights = {tensor.name: key for weight in self.weights for tensor, key in _weight_purposes(weight)}
        copies = self.graphs[weight_copies.GRAPH].persistents if weight_copies.GRAPH in self.graphs else {}
        for name, tensor in self.plan.persistents.items():
            buffer = self.plan.slices[tensor.id].buffer
            if tensor.role in ("param", "grad"):
                result[buffer] = "adapter_bytes" if tensor.role == "param" else "gradient_bytes"
            elif tensor.role == "weight":
                result[buffer] = of_weights.get(name, "dense_bytes")
            elif tensor.role in ("state", "moment"):
                result[buffer] = "copy_bytes" if name in copies else "optimizer_bytes"
        result |= dict.fromkeys(cache_names(self.plan.persistents), "cache_bytes")
        for buffer in self.plan.buffers:
            if buffer.startswith("pool."):
                result[buffer] = "scratch_bytes" if buffer in self.plan.scratch else "activation_bytes"
        return result


def _weight_purposes(weight: WeightTensors) -> Iterator[tuple[Tensor, str]]:
    """The key that each tensor of a weight counts under."""
    if weight.nf4 is not None:
        codes, *scales = weight.tensors
        yield codes, "nf4_bytes"
        yield from ((tensor, "scale_bytes") for tensor in scales)
        return
    for tensor in weight.tensors:
        yield tensor, "embedding_bytes" if weight.spec.is_table else "dense_bytes"


def plan_run(config: TrainConfig, caps: Caps, budget_bytes: int, evaluates: bool) -> PlanReport:
    """Trace and plan a training run for a model folder, a Hub id or a bare config.json, with or without its weights."""
    return plan_graphs(config, caps, budget_bytes, functools.partial(training_graphs, evaluates=evaluates), fit_run)


def plan_graphs(
    config: TrainConfig, caps: Caps, budget_bytes: int, trace: Trace, fit: Fit, with_adapter: bool = True
) -> PlanReport:
    """The same for the graphs that `trace` makes, planned by `fit`."""
    path = Path(config.model)
    path = path if path.is_file() else resolve_model(config.model, weights=False)
    model = load_model_config(path)
    spec = adapter_spec(config, model) if with_adapter else None
    if path.is_dir() and any((path / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        checkpoint = HFCheckpoint.open(path)
        model, storage = checkpoint.config, storage_of(checkpoint, config, spec)
    else:
        raw = read_json_object(path / "config.json" if path.is_dir() else path)
        stated = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
        if stated not in tuple(TORCH_FLOATS):  # which may be of any JSON type
            raise UserError(f"{path}: torch_dtype {stated!r} is not one of {', '.join(TORCH_FLOATS)}")
        trained, double = trained_weights(config, model), config.double_quant
        storage = Storage(config.method, TORCH_FLOATS[stated], double_quant=double, trained=trained)
        storage = adapted(storage, spec)
    shape = RunShape(model, storage, config)
    fitted = fit(trace, shape, caps, shape.plan_options(caps, budget_bytes))
    weights = declared_weights(model.weights, storage, caps)
    return PlanReport(fitted.plan, fitted.recompute, weights, fitted.graphs, caps.name, budget_bytes)
