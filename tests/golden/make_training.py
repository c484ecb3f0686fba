"""Record ten steps of transformers + PEFT on each case of training_cases.py: writes training.json beside this file.

Run in an environment that has torch, transformers and peft (`make parity` installs one), from the project's root:
    .venv-parity/bin/python -m tests.golden.make_training
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from entrenar_gpu.data.batches import TrainBatches
from entrenar_gpu.data.load import load_samples
from tests.golden.training_cases import BASE, CASES, FILE, OPTIONS, write
from tests.parity.reference import gradients, load_model, loss_of


def record(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Losses, gradient norms before clipping, and the norm of each tensor's gradient at the first step."""
    quantised = options.get("double_quant", True) if options["method"] == "qlora" else None
    base = load_model(folder / "model", quantised)
    model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])
    samples = load_samples(folder / "train.jsonl", None, vocab_size=BASE["vocab_size"], seq=OPTIONS["seq"])
    batches = TrainBatches(samples, **{key: OPTIONS[key] for key in ("batch", "seq", "accumulate", "shuffle")})
    result: dict[str, Any] = {"losses": [], "grad_norms": []}
    for _ in range(OPTIONS["steps"]):
        loss = loss_of(model, next(batches).micro_batches)
        optimizer.zero_grad()
        loss.backward()
        if "gradients" not in result:
            result["gradients"] = {name: float(np.linalg.norm(g)) for name, g in gradients(model).items()}
        result["grad_norms"].append(float(torch.nn.utils.clip_grad_norm_(trained, OPTIONS["clip"])))
        optimizer.step()
        result["losses"].append(loss.item())
    return result


def main() -> None:
    cases = {}
    for name, (_, options) in CASES.items():
        with tempfile.TemporaryDirectory() as temporary:
            cases[name] = record(write(Path(temporary), name), options)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    FILE.write_text(json.dumps({"made_with": versions, "cases": cases}, indent=1) + "\n")
    print(f"{FILE}: {FILE.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
