"""The loss of a model, with or without an adapter, on a data set: during a run, and as `entrenar-gpu eval`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from entrenar_gpu.config import MOST, TrainConfig
from entrenar_gpu.data import Samples, count_targets, eval_batches, weight_of
from entrenar_gpu.errors import UserError
from entrenar_gpu.graph import Caps, Graph
from entrenar_gpu.session import EVAL_LOSS_NAME, RunShape, Session, evaluate_graph
from entrenar_gpu.train.run_data import DataReader, ending_sources
from entrenar_gpu.train.windows import sliding


def evaluate_data(
    config: TrainConfig, with_adapter: bool, data: Any = None, window: int | None = None
) -> dict[str, Any]:
    """{"loss", "perplexity", "tokens", "samples"} of --data, or of `data`; loss is the mean over unmasked tokens,
    by their weights where rows have any.

    With a `window`, samples longer than --seq are not cut: they are read in pieces of --seq tokens, each so many tokens
    further on (`windows.sliding`). Raises UserError where the loss is not finite.
    """
    if window is not None and not 1 <= window <= config.seq:
        raise UserError(f"--window: {window} is not from 1 to --seq {config.seq}")
    reader = DataReader(config if window is None else replace(config, seq=MOST))
    samples = reader.named("valid") if data is None else reader.read(ending_sources(data, "eval_data", config))
    if window is not None:
        samples = sliding(samples, config.seq, window)

    def trace(shape: RunShape, caps: Caps) -> dict[str, Graph]:
        return {"evaluate": evaluate_graph(shape, caps, weighted=samples.weights is not None)}

    session = Session.open(config, trace, with_adapter=with_adapter)
    try:
        loss, tokens = evaluate(session, samples)
    finally:
        session.close()
    if not math.isfinite(loss):
        adapter = f" with the adapter {config.adapter_init}" if with_adapter else ""
        raise UserError(f"--model: {config.model}{adapter}: the loss is not finite: its numbers are too large")
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens, "samples": len(samples)}


def evaluate(session: Session, samples: Samples) -> tuple[float, int]:
    """(mean loss over unmasked tokens, by their weights; their number) of samples. Sums in float64 on the host."""
    total, weight, tokens, pending = 0.0, 0.0, 0, None
    zero = np.zeros(1, np.float32)
    c = session.config
    for batch in eval_batches(samples, batch=c.batch, seq=c.seq, pack=c.pack):
        session.write_batch(batch)
        session.executor.write(EVAL_LOSS_NAME, zero)
        report = session.executor.run("evaluate")
        if pending is not None:
            total += float(pending.result()[0])
        pending = report
        tokens += count_targets([batch])
        weight += weight_of([batch])
    if pending is not None:
        total += float(pending.result()[0])
    return total / weight, tokens
