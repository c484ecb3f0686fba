"""Whole training runs over small models: a folder holds `model/` and `train.jsonl`, and gets the results."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu.compiler.memory import FittedPlan
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.graph.caps import Caps
from entrenar_gpu.session.graphs import RunShape, fit_run, training_graphs
from entrenar_gpu.train import run_checkpoint
from entrenar_gpu.train.trainer import Trainer

# Small enough for 20 steps on a software adapter in about a second; two rows, so that packing has something to do.
DEFAULTS: dict[str, Any] = {"steps": 10, "batch": 2, "seq": 32, "rank": 4, "lr": 5e-3}


def config_of(folder: Path, output: str = "run", **options: Any) -> TrainConfig:
    paths = {"model": str(folder / "model"), "data": str(folder / "train.jsonl"), "output": str(folder / output)}
    defaults = {k: v for k, v in DEFAULTS.items() if k != "rank" or "adapter_init" not in options}  # it has its own
    return TrainConfig(**(defaults | paths | options))


def train(folder: Path, output: str = "run", kernels: KernelCache | None = None, **options: Any) -> list[float]:
    """The losses of a run from beginning to end, which is left at `folder / output`."""
    trainer = Trainer(config_of(folder, output, **options), kernels=kernels)
    try:
        return [record.loss for record in trainer.steps()]
    finally:
        trainer.session.close()


def run_micro_batches(trainer: Trainer, step: Any) -> None:
    """Forward and backward of a step, without the update: loss and gradients stay on the device."""
    trainer.executor.write("inv_tokens", np.array([1 / step.weight]))
    for number, batch in enumerate(step.micro_batches):
        trainer.session.write_batch(batch)
        trainer.executor.run("micro", number)


def gradients(trainer: Trainer) -> dict[str, np.ndarray]:
    """The gradient of everything trainable, as it lies on the device."""
    return {name: trainer.executor.read(f"{name}.grad") for name in trainer.session.trainable()}


def fit_for(shape: RunShape, caps: Caps, budget_bytes: int, evaluates: bool = False) -> FittedPlan:
    """The plan of a training run within a budget."""
    trace = functools.partial(training_graphs, evaluates=evaluates)
    return fit_run(trace, shape, caps, shape.plan_options(caps, budget_bytes))


def reseal(checkpoint: Path) -> None:
    """Make a checkpoint that a test has changed one that a run could have written: its checksums fit again."""
    path = checkpoint / run_checkpoint.STATE_FILE
    state = json.loads(path.read_text())
    state["checksums"] = run_checkpoint.checksums(checkpoint)
    state["checksum"] = run_checkpoint._state_checksum(state)
    path.write_text(json.dumps(state))
