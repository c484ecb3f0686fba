"""`entrenar-gpu bench generate`: prompts read and tokens made by a model's shape, with random weights made on the GPU.

A step of decoding cannot be shorter than it takes to read what it needs once: the weights, and the keys and values of
every sequence. The share of that floor is told at the speed at which this card copies memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu import ops
from entrenar_gpu.cli.bench.train import randomise, slowest
from entrenar_gpu.compiler import make_plan
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.gpu import Device, KernelCache, Replay, open_device, time_run
from entrenar_gpu.graph import Caps, Graph
from entrenar_gpu.infer import CHUNK, Decoder, decoder_graphs, fit_decoder
from entrenar_gpu.model import Storage, cache_names, declared_weights, load_model_config, model_shape
from entrenar_gpu.session import RunShape, fit_on, memory_budget

WARM_UP = 3  # steps before those that count
COPY_BYTES = 1 << 30  # of the copy that tells the speed of memory; a software GPU copies COPY_SOFTWARE_BYTES
COPY_SOFTWARE_BYTES = 32 << 20


def bench_generate(
    shape_name: str, config: TrainConfig, batches: Sequence[int], prompt: int, tokens: int
) -> Iterator[dict[str, Any]]:
    """For each batch: seconds to read prompts of so many tokens, then medians over steps of a token for each sequence.

    `config.seq` is the context that slots have room for; it is what `prompt` and `tokens` take where it is less.
    """
    model = load_model_config(Path(shape_name)) if Path(shape_name).is_dir() else model_shape(shape_name)
    device = open_device(config.device, engine=config.engine)
    shape = RunShape(model, Storage(config.method, "bf16", double_quant=config.double_quant), config)
    kernels = KernelCache(device)
    began = time.perf_counter()
    chunk = min(CHUNK, config.seq)

    def trace(shape: RunShape, caps: Caps) -> dict[str, Graph]:
        graphs = decoder_graphs(chunk, {}, shape, caps)
        for graph in (g for g in graphs.values() if g.nodes) if config.trace_level == "kernel" else ():
            graph.traced, graph.report = True, graph.report or next(n for n in graph.persistents if "hidden." in n)
        return graphs

    fitted = fit_on(kernels, trace, shape, memory_budget(config, device.caps), fit=fit_decoder)
    replay = Replay(device, fitted.plan, kernels)
    _fill(replay, shape)
    planned = {"planned_bytes": fitted.plan.peak_bytes, "allocated_bytes": device.allocated_bytes}
    opened = time.perf_counter() - began
    speed = copy_speed(device, kernels)
    with Decoder(replay, shape, device.caps, chunk) as decoder:
        for batch in batches:
            timings = _measured(decoder, batch, prompt, tokens, model.vocab_size)
            step = statistics.median(timings["step"])
            floor = _bytes_read(replay, shape, batch, prompt + tokens // 2) / speed
            yield {
                "name": f"batch {batch}",
                "prefill_tokens_per_second": batch * prompt / timings["prefill"],
                "first_token_seconds": timings["prefill"],
                "decode_tokens_per_second": batch / step,
                "step_seconds": step,
                "floor_seconds": floor,
                "floor_share": floor / step,
                "copy_gbytes_per_second": speed / 1e9,
                "open_seconds": opened,
                **planned,
            }
        for graph in fitted.plan.groups:
            report = replay.run(graph)
            assert report is not None
            report.result()
            for row in slowest(replay, report, [(graph, 0)]):
                yield {"name": graph, **row}


def line_of(row: Mapping[str, Any]) -> str:
    """A measurement for people."""
    if "kernel" in row:
        return (
            f"{row['name']:12} {row['share']:6.1%} {row['seconds'] * 1e3:8.3f} ms {row['count']:5}x"
            f" {row['tflops']:7.2f} TFLOP/s {row['gbytes_per_second']:7.1f} GB/s  {row['kernel']}"
        )
    return (
        f"{row['name']:9} prompts {row['prefill_tokens_per_second']:9.1f} tokens/s,"
        f" {row['first_token_seconds'] * 1e3:.1f} ms to the first token;"
        f" then {row['decode_tokens_per_second']:8.1f} tokens/s, {row['step_seconds'] * 1e3:.2f} ms per step,"
        f" {row['floor_share']:.0%} of the floor of memory at {row['copy_gbytes_per_second']:.0f} GB/s;"
        f" {row['planned_bytes'] / 2**30:.2f} GiB planned, {row['allocated_bytes'] / 2**30:.2f} allocated"
    )


def _fill(replay: Replay, shape: RunShape) -> None:
    randomise(replay, declared_weights(shape.model.weights, shape.storage, replay.device.caps))
    for name, rope in shape.model.rope_tables.items():
        replay.write(name, rope.table(shape.train.seq))


def _measured(decoder: Decoder, batch: int, prompt: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    """Seconds of the prompts, the second time they are read, and of each greedy step after WARM_UP."""
    rng = np.random.default_rng(0)
    prompts = {slot: rng.integers(0, vocabulary, prompt).tolist() for slot in range(batch)}
    for _ in range(2):
        for slot in prompts:
            decoder.truncate(slot, 0)
        begin = time.perf_counter()
        found = decoder.likeliest(prompts, prompt=True)
        prefill = time.perf_counter() - begin
    steps = []
    for _ in range(tokens):
        begin = time.perf_counter()
        found = decoder.likeliest(found, prompt=False)
        steps.append(time.perf_counter() - begin)
    for slot in prompts:
        decoder.truncate(slot, 0)
    return {"prefill": prefill, "step": steps[WARM_UP:] or steps}


def _bytes_read(replay: Replay, shape: RunShape, batch: int, length: int) -> int:
    """What a step must read: every weight but rows of an embedding that is no head, and the cache of its sequences."""
    weights = declared_weights(shape.model.weights, shape.storage, replay.device.caps)
    tied = shape.model.tie_word_embeddings
    read = [w for w in weights if tied or w.spec.kind != "embedding"]
    caches = sum(replay.tensors[name].nbytes for name in cache_names(replay.tensors))
    positions = shape.train.batch * shape.train.seq
    return sum(t.nbytes for w in read for t in w.tensors) + caches * batch * length // positions


def copy_speed(device: Device, kernels: KernelCache) -> float:
    """Bytes per second read and written by a copy that no cache holds: the queue's own, or that of a shader.

    Which of the two is near to what memory gives depends on the card and its driver.
    """
    software = device.caps.software
    size = COPY_SOFTWARE_BYTES if software else COPY_BYTES
    size = min(size, device.caps.max_buffer_bytes, device.caps.max_binding_bytes)
    graph = Graph("copy")
    ops.keep(ops.scale(graph.tensor("source", (size // 4,)), 1.0), "target")
    replay = Replay(device, make_plan({"copy": graph}, device.caps), kernels)
    source, target = replay.buffer_of("source")[0], replay.buffer_of("target")[0]

    def seconds(copies: int) -> float:
        begin = time.perf_counter()
        encoder = device.handle.create_command_encoder()
        for _ in range(copies):
            encoder.copy_buffer_to_buffer(source, 0, target, 0, size)
        device.handle.queue.submit([encoder.finish()])
        replay.wait()
        return time.perf_counter() - begin

    try:
        by_shader = time_run(replay, "copy")
        few, many = (1, 3) if software else (4, 20)  # two numbers of copies, so that handing them over does not count
        took = [statistics.median(seconds(copies) for _ in range(3)) for copies in (few, many)]
        by_queue = (took[1] - took[0]) / (many - few)
        return 2 * size / (min(by_queue, by_shader) if by_queue > 0 else by_shader)
    finally:
        replay.close()
