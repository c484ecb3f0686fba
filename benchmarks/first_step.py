"""The first step of a real model against float64: `python -m benchmarks.first_step --model FOLDER` in .venv-parity.

Loss and every adapter gradient of one small batch, in each precision on the device and on NumPy, beside transformers
and PEFT computing in float64 from the same NF4-dequantised weights. Prints the loss's relative error, and the median
and the worst of the gradients' relative errors (Frobenius norm, tensor by tensor) as markdown. B starts small and not
zero, so that every tensor has a gradient. The loss scale of low precision is halved, as in training, until no gradient
overflows. For Llama-like models, as `make models` makes SmolLM2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers.models.llama import modeling_llama

from entrenar_gpu.cli import docstrings
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.gpu import KernelCache, open_device
from entrenar_gpu.train import Trainer
from tests.helpers.runs import gradients, run_micro_batches
from tests.parity import reference

PRECISIONS = ("f32", "f16", "int8")
B_DEVIATION = 0.005  # about what a few hundred steps make of it


class _Double:
    """The module `torch`, to which float32 is float64: transformers computes norms and softmax in that."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def in_float64(model: Any) -> Iterator[None]:
    """All that the model computes in the block is float64, rotary angles included."""
    rotary = model.base_model.model.model.rotary_emb
    model.double()
    size = rotary.inv_freq.numel()
    theta = model.config.rope_parameters["rope_theta"]
    rotary.inv_freq = theta ** (-torch.arange(size, dtype=torch.float64) / size)
    with (
        mock.patch.object(modeling_llama, "torch", _Double()),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def compare(name: str, loss: float, ours: Mapping[str, np.ndarray], want_loss: float, want: Mapping[str, Any]) -> str:
    """A row of the table."""
    errors = [float(np.linalg.norm(ours[key] - want[key]) / np.linalg.norm(want[key])) for key in want]
    assert len(errors) == len(ours)
    return f"| {name} | {abs(loss / want_loss - 1):.1e} | {np.median(errors):.1e} | {max(errors):.1e} |"


def first_gradients(trainer: Trainer, step: Any) -> tuple[dict[str, np.ndarray], float]:
    """The gradients of a step, and the loss scale with which none overflows."""
    while True:
        run_micro_batches(trainer, step)
        scale = float(trainer.executor.read("loss_scale")[0])
        found = {name: values.astype(np.float64) / scale for name, values in gradients(trainer).items()}
        if all(np.isfinite(values).all() for values in found.values()):
            return found, scale
        trainer.executor.write("loss_scale", np.array([scale / 2], np.float32))
        trainer.executor.write("loss", np.zeros(1, np.float32))
        for name, values in found.items():
            trainer.executor.write(f"{name}.grad", np.zeros(values.shape, np.float32))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--device")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        run(args.model, Path(temporary), args.seq, args.device)


def run(folder: Path, work: Path, seq: int, device: str | None) -> None:
    rows = [{"prompt": pair.prompt, "completion": pair.completion} for pair in docstrings.collect().train[:8]]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = reference.load_model(folder, quantised=True)
    model = reference.random_adapter(work / "adapter", base, target_modules="all-linear", r=16, lora_alpha=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(B_DEVIATION / 0.1)
    model.save_pretrained(work / "adapter")
    paths = {"model": str(folder), "data": str(work / "rows.jsonl"), "output": str(work / "run")}
    config = TrainConfig(**paths, adapter_init=str(work / "adapter"), batch=1, seq=seq, steps=1, shuffle=False)
    kernels = KernelCache(open_device(device))
    print(f"{kernels.device.caps.name}, {kernels.device.info['description']}: 1 row of {seq} tokens\n")
    print("| precision | loss | gradients, median | worst |\n|---|---|---|---|", flush=True)
    want_loss, want = math.nan, {}
    for precision in ("numpy", *PRECISIONS):
        options = {"device": "numpy"} if precision == "numpy" else {"precision": precision}
        trainer = Trainer(TrainConfig(**config.__dict__ | options), kernels=None if precision == "numpy" else kernels)
        try:
            step = next(trainer.batches)
            if not want:
                with in_float64(model):
                    loss = reference.loss_of(model, step.micro_batches)
                    loss.backward()
                want_loss, want = loss.item(), reference.gradients(model)
            ours, scale = first_gradients(trainer, step)
            precision += f", loss scale {scale:g}" if scale != 1 else ""
            print(compare(precision, float(trainer.executor.read("loss")[0]), ours, want_loss, want), flush=True)
        finally:
            trainer.session.close()


if __name__ == "__main__":
    main()
