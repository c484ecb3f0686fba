"""Pretrained models here and in transformers and PEFT: `make real`, after `make models`.

    python -m tests.real.compare [--models FOLDER] [--sentences 200] [--steps 30] [--device DEVICE] [MODEL ...]

For each model folder: the mean loss of sentences of the standard library's docstrings, in f32, against transformers';
then steps of LoRA from one adapter over one batch order against PEFT in float64, with PEFT in f32 beside. Prints both,
and ends with status 1 where a bar is missed. Random models have no outliers and no trained norms; these do.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entrenar_gpu.config import TrainConfig
from entrenar_gpu.data import eval_batches
from entrenar_gpu.train.evaluate import evaluate_data
from entrenar_gpu.train.run_data import DataReader
from entrenar_gpu.train.trainer import Trainer
from tests.parity import reference

LOSS_BAR, STEPS_BAR = 1e-5, 5e-5  # relative; absolute, as for 50 steps of small models (docs/equality.md)
SEQ = 128
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "schedule": "constant", "clip": 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MODEL", help="folders within --models (default: all)")
    parser.add_argument("--models", type=Path, default=Path("artifacts/models"))
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--steps", type=int, default=30, help="0 leaves the training out")
    parser.add_argument("--device", default=None, help="as for entrenar-gpu train")
    given = parser.parse_args()
    names = given.names or sorted(path.name for path in given.models.iterdir() if (path / "config.json").exists())
    held = [compare(given.models / name, given.sentences, given.steps, given.device) for name in names]
    return 0 if all(held) else 1


def compare(model: Path, sentences: int, steps: int, device: str | None) -> bool:
    """Whether a model is held to both bars."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_sentences(folder / "sentences.jsonl", sentences)
        common = {"model": str(model), "method": "lora", "precision": "f32", "batch": 1, "seq": SEQ, "device": device}
        sentences_file = str(folder / "sentences.jsonl")
        config = TrainConfig(**common, data=sentences_file, eval_data=sentences_file)
        held = compare_losses(model, config)
        return held and (not steps or compare_steps(model, folder, config, steps))


def write_sentences(path: Path, count: int) -> None:
    """So many sentences of 40 to 300 characters, as texts of JSONL."""
    found = list(dict.fromkeys(sentence for text in docstrings() for sentence in sentences_of(text)))[:count]
    if len(found) < count:
        raise SystemExit(f"only {len(found)} sentences found")
    path.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in found), encoding="utf-8")


def docstrings() -> Iterator[str]:
    """Of modules of the standard library and what they define, in the order of their names."""
    for name in (
        "argparse",
        "asyncio",
        "collections",
        "csv",
        "datetime",
        "email",
        "functools",
        "json",
        "pathlib",
        "re",
    ):
        module = importlib.import_module(name)
        for _, value in sorted(vars(module).items()):
            if text := inspect.getdoc(value) if callable(value) else None:
                yield text


def sentences_of(text: str) -> Iterator[str]:
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        if 40 <= len(sentence) <= 300:
            yield sentence


def compare_losses(model: Path, config: TrainConfig) -> bool:
    """The mean loss over the sentences."""
    ours, theirs = evaluate_data(config, with_adapter=False), reference.load_model(model)
    total, tokens = 0.0, 0
    samples = DataReader(config).named("valid")
    with torch.no_grad():
        for batch in eval_batches(samples, batch=config.batch, seq=config.seq, pack=config.pack):
            for ids, targets, _ in reference.segments(batch):
                logits = theirs(input_ids=torch.from_numpy(ids)[None]).logits[0].double()
                wanted = torch.from_numpy(targets)
                total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))  # skips -100
                tokens += int((wanted != reference.IGNORE).sum())
    want = total / tokens
    error = abs(ours["loss"] / want - 1)
    print(f"{model.name}: loss of {ours['samples']} sentences, {tokens} tokens: {ours['loss']:.7f}, transformers "
          f"{want:.7f}, {error:.1e} apart (bar {LOSS_BAR:.0e})", flush=True)  # fmt: skip
    return error <= LOSS_BAR and tokens == ours["tokens"]


def compare_steps(model: Path, folder: Path, config: TrainConfig, steps: int) -> bool:
    """The losses of training steps."""
    reference.random_adapter(folder / "adapter", reference.load_model(model), target_modules="all-linear")
    changes = {
        "eval_data": None,
        "steps": steps,
        "adapter_init": str(folder / "adapter"),
        "output": str(folder / "run"),
    }
    trainer = Trainer(TrainConfig(**{**vars(config), **OPTIONS, **changes}))
    try:
        start = trainer.batches.state()
        batches = [next(trainer.batches).micro_batches for _ in range(steps)]
        trainer.batches.restore(start)
        ours = np.array([record.loss for record in trainer.steps()])
    finally:
        trainer.session.close()
    exact, plain = (train_peft(model, folder / "adapter", batches, kind) for kind in (torch.float64, torch.float32))
    error = float(np.abs(ours - exact).max())
    print(f"{model.name}: losses of {steps} steps, {ours[0]:.4f} to {ours[-1]:.4f}: at most {error:.1e} off PEFT in "
          f"float64 (bar {STEPS_BAR:.0e}); PEFT in f32 {np.abs(plain - exact).max():.1e}", flush=True)  # fmt: skip
    return error <= STEPS_BAR


def train_peft(model: Path, adapter: Path, batches: list[Any], dtype: Any) -> np.ndarray:
    """The losses of the same steps in PEFT."""
    import peft

    wrapped = peft.PeftModel.from_pretrained(reference.load_model(model), adapter, is_trainable=True).to(dtype)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])
    losses = []
    for micro_batches in batches:
        loss = reference.loss_of(wrapped, micro_batches)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, OPTIONS["clip"])
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


if __name__ == "__main__":
    sys.exit(main())
