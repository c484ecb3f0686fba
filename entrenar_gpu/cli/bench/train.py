"""`entrenar-gpu bench train`: training steps of a model's shape with random weights made on the GPU, without files."""

from __future__ import annotations

import functools
import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from entrenar_gpu.adapters import AdapterSpec, adapted, adapter_spec, init_adapter, trained_weights
from entrenar_gpu.cli.bench.gemm import forward, projection_shapes
from entrenar_gpu.compiler import weight_copies
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.gpu import KernelCache, Replay, Report, driver_bytes, measure, open_device
from entrenar_gpu.graph import Graph, Launch, Tensor, grid_of, literal, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.model import ModelConfig, Storage, WeightTensors, declared_weights, model_shape
from entrenar_gpu.ops.gemm.tiles import Arithmetic
from entrenar_gpu.ops.loss import IGNORE
from entrenar_gpu.ops.optimizer import field
from entrenar_gpu.ops.registry import OPS
from entrenar_gpu.session import RunShape, fit_on, memory_budget, training_graphs, write_adapter

TRACE = functools.partial(training_graphs, evaluates=False)
WARM_UP = 2
CEILING_ROWS = 2048


def bench_train(shape_name: str, config: TrainConfig, steps: int, labelled: float = 1.0) -> dict[str, Any]:
    """Median over `steps` optimizer steps, after two to warm up: tokens/s, seconds by phase, bytes, FLOP/s.

    `labelled` is the share of the tokens that have a label: in each row the last, as answers behind a prompt.

    FLOP/s are the model's, without what is computed again, and also told as a share of what the card was measured to
    reach on a matmul alone (`measured_ceiling`).

    Phases are GPU time between timestamps; `encode` is host time to hand a step over; `idle` is the part of a step's
    wall time in which the GPU ran nothing of it.
    """
    model, device = model_shape(shape_name), open_device(config.device, engine=config.engine)
    spec = adapter_spec(config, model)
    trained, double = trained_weights(config, model), config.double_quant
    storage = adapted(Storage(config.method, "bf16", double_quant=double, trained=trained), spec)
    shape = RunShape(model, storage, config)
    kernels = KernelCache(device)
    fitted = fit_on(kernels, TRACE, shape, memory_budget(config, device.caps))
    replay = Replay(device, fitted.plan, kernels)
    _fill(replay, shape, spec)
    timings = _run(replay, config, model.vocab_size, steps, labelled)
    held = {"allocated_bytes": device.allocated_bytes, "driver_bytes": driver_bytes()}
    replay.close()
    ceiling = measured_ceiling(replay, model, shape.precision(device.caps), config.batch * config.seq)
    flops = _flops(fitted.graphs["micro"], labelled) * config.accumulate
    return {
        "shape": shape_name,
        "batch": config.batch,
        "seq": config.seq,
        "rank": config.rank,
        "labelled": labelled,
        "precision": config.precision,
        "adapter": device.caps.name,
        "driver": device.info["description"],
        "engine": device.engine.name,
        **_speeds(timings, config, flops, ceiling),
        "planned_bytes": fitted.plan.peak_bytes,
        **held,
        "recompute": fitted.recompute.describe(),
        "loss": timings["loss"][-1],
        "kernels": slowest(replay, timings.last, _runs(config.accumulate)) if config.trace_level == "kernel" else [],
    }


def _flops(graph: Graph, labelled: float) -> float:
    """Of a micro-batch, without what is computed again; unlabelled tokens do not go through the vocabulary."""
    shares = {"cross_entropy": labelled}
    return sum(OPS[n.op].flops(n) * shares.get(n.op, 1.0) for n in graph.nodes if not n.recomputed)


def _speeds(timings: Timings, config: TrainConfig, flops: float, ceiling: float) -> dict[str, Any]:
    """Medians over the steps; `flops` are a step's, `ceiling` is in TFLOP/s."""
    seconds, encode = statistics.median(timings["wall"]), statistics.median(timings["encode"])
    busy = {phase: statistics.median(timings[phase]) for phase in ("forward", "backward", "optimizer")}
    return {
        "tokens_per_second": config.batch * config.seq * config.accumulate / seconds,
        "step_seconds": seconds,
        "seconds": {**busy, "encode": encode, "idle": max(seconds - sum(busy.values()), 0.0)},
        "flops_per_step": flops,
        "tflops": flops / seconds / 1e12,
        "ceiling_tflops": ceiling,
        "ceiling_share": flops / seconds / 1e12 / ceiling,
    }


def _fill(replay: Replay, shape: RunShape, spec: AdapterSpec | None) -> None:
    """Everything that a run finds on the device when it begins."""
    randomise(replay, declared_weights(shape.model.weights, shape.storage, replay.device.caps))
    replay.write("loss_scale", np.array([shape.first_loss_scale(replay.device.caps)]))
    for name, rope in shape.model.rope_tables.items():
        replay.write(name, rope.table(shape.train.seq))
    if spec is not None:
        table = shape.model.vocab_size, shape.model.hidden_size
        write_adapter(replay, spec, init_adapter(spec, 0, base=lambda path: np.zeros(table, np.float32)))
    if weight_copies.GRAPH in replay.plan.steps:
        replay.run(weight_copies.GRAPH)


def measured_ceiling(replay: Replay, model: ModelConfig, arithmetic: Arithmetic, tokens: int) -> float:
    """TFLOP/s of the largest projection's matmul by itself, in the run's arithmetic, as the card runs it just now.

    Over CEILING_ROWS rows, enough to fill any card; a software GPU takes the run's own.
    """
    rows = min(tokens, CEILING_ROWS) if replay.device.caps.software else CEILING_ROWS
    n, k = max(projection_shapes(model), key=math.prod)
    case = forward(n, k, arithmetic, rows)
    return float(measure(replay.device, replay.kernels, case, check=False)["product_tflops"])


def randomise(replay: Replay, weights: Sequence[WeightTensors]) -> None:
    """Fill every weight on the device: codes and dense ones with random bits, scales and norms with small numbers."""
    random: list[Tensor] = []
    for weight in weights:
        if weight.nf4 is not None and weight.nf4.double:
            codes, absmax_codes, nested, table = weight.tensors
            random += [codes, absmax_codes]
            replay.write(nested.name, _ones(nested.size))
            replay.write(table.name, _scale_table(table.size))
        elif weight.nf4 is not None:
            codes, absmax = weight.tensors
            random.append(codes)
            replay.write(absmax.name, _small(absmax.size))
        elif weight.spec.kind == "norm":
            replay.write(weight.tensors[0].name, _ones(weight.spec.size))
        else:
            random += weight.tensors
    for number, tensor in enumerate(random):
        replay.launch(_random_launch(replay, replay.tensors[tensor.name], number))


def _ones(size: int) -> np.ndarray:
    return np.ones(size, np.float32)


def _small(size: int) -> np.ndarray:
    return np.full(size, 0.03, np.float32)


def _scale_table(size: int) -> np.ndarray:
    """256 scales around 0.03, offset 0 and the zero of ops/quantize.py."""
    return np.concatenate([np.linspace(0.02, 0.04, 256), [0.0, 0.0]]).astype(np.float32)


def _random_launch(replay: Replay, tensor: Tensor, seed: int) -> Launch:
    words = tensor.nbytes // 4
    constants = {"words": words, "seed": seed, "dtype": tensor.dtype, "spread": literal(0.03)}
    return Launch("random", (writes("out", tensor),), constants, grid_of(ceil_div(words, 256), replay.device.caps))


class Timings(defaultdict[str, list[float]]):
    """Seconds by name, one entry per step, and the report of the last step."""

    last: Report


def _run(replay: Replay, config: TrainConfig, vocabulary: int, steps: int, labelled: float) -> Timings:
    rng = np.random.default_rng(0)
    size = config.batch * config.seq
    prompt = min(round(config.seq * (1 - labelled)), config.seq - 1)  # tokens of a row that have no label
    ignored = np.tile(np.arange(config.seq) < prompt, config.batch)
    timings = Timings(list)
    replay.write("positions", np.tile(np.arange(config.seq), config.batch))
    replay.write("segment_start", np.zeros(size))
    replay.write("inv_tokens", np.array([1 / (config.batch * (config.seq - prompt) * config.accumulate)]))
    replay.write("lr", np.array([1e-4]))
    flying = None
    last = time.perf_counter()
    for number in range(steps + WARM_UP + 1):
        begin = time.perf_counter()
        for micro in range(config.accumulate):
            replay.write("input_ids", rng.integers(0, vocabulary, size))
            replay.write("targets", np.where(ignored, IGNORE, rng.integers(0, vocabulary, size)))
            replay.run("micro", micro)
        report = replay.run("update")
        encode = time.perf_counter() - begin
        if flying is not None:
            state = flying.result()
            now = time.perf_counter()
            if number > WARM_UP:
                timings["wall"].append(now - last)
                timings["encode"].append(encode)
                timings["loss"].append(field(state, "loss"))
                for phase, seconds in _phases(replay, flying, config.accumulate).items():
                    timings[phase].append(seconds)
            last = now
        flying = report
    assert flying is not None
    flying.result()
    timings.last = flying
    return timings


def slowest(replay: Replay, report: Report, runs: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
    """Nodes of runs of traced graphs, layers added up: seconds, share, TFLOP/s and GB/s, slowest first."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for name, repeat in runs:
        ticks = report.ticks(name, repeat)
        for group, (begin, end) in zip(replay.plan.groups.get(name, ()), [] if ticks is None else ticks, strict=False):
            key = f"{group.phase} {re.sub(r'layers[.][0-9]+', 'layers.*', group.name)} {group.shape}"
            for index, value in enumerate((float(end - begin) / 1e9, 1.0, float(group.flops), float(group.bytes))):
                totals[key][index] += value
    whole = sum(t[0] for t in totals.values()) or 1.0
    rows = sorted(totals.items(), key=lambda item: -item[1][0])
    return [
        {
            "kernel": key,
            "count": int(count),
            "seconds": seconds,
            "share": seconds / whole,
            "tflops": flops / max(seconds, 1e-12) / 1e12,
            "gbytes_per_second": nbytes / max(seconds, 1e-12) / 1e9,
        }
        for key, (seconds, count, flops, nbytes) in rows
    ]


def _runs(repeats: int) -> list[tuple[str, int]]:
    """The runs of traced graphs that make a step."""
    return [*(("micro", r) for r in range(repeats)), ("update", 0)]


def _phases(replay: Replay, report: Report, repeats: int) -> dict[str, float]:
    """GPU seconds by phase; zeros where the device has no timestamps."""
    totals = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
    for name, repeat in _runs(repeats):
        ticks = report.ticks(name, repeat)
        if ticks is not None:
            for group, (begin, end) in zip(replay.plan.groups[name], ticks, strict=True):
                totals[group.phase] += float(end - begin) / 1e9
    return totals
