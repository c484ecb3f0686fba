"""The demo: a small model that ships with the project, fine-tuned on the running Python's docstrings.

Nothing is downloaded. scripts/make_demo_model.py made the model; corpus.py says which docstrings are held out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from entrenar_gpu import corpus
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.events import EvalRecord, RunInfo
from entrenar_gpu.generate import Generator
from entrenar_gpu.train import Trainer

MODEL = Path(__file__).parent / "assets" / "demo-model"
STEPS = 200
RUN = {"model": str(MODEL), "method": "qlora", "rank": 16, "batch": 8, "seq": 256, "lr": 2e-3}

# The sample: a held-out question, and room for a long answer. Its first word is what most machines agree on.
SAMPLE = "What does decimal.Context.is_signed(a) do?"
SAMPLE_TOKENS = 48
SAMPLE_SEQ = 128


@dataclass(frozen=True)
class DemoResult:
    """What a demo run showed: held-out losses (nats a token) and answers to `question` before and after training."""

    output: Path
    before: EvalRecord
    after: EvalRecord
    question: corpus.Pair
    answer_before: str
    answer_after: str
    seconds: float


class _Watch:
    """Observer that keeps what the demo shows."""

    def __init__(self) -> None:
        self.evals: list[EvalRecord] = []

    def run_started(self, info: RunInfo) -> None:
        self.info = info

    def eval_finished(self, record: EvalRecord) -> None:
        self.evals.append(record)


def run_demo(
    output: str | Path | None = None,
    steps: int | None = None,
    observers: Sequence[Any] = (),
    *,
    device: str | None = None,
    console: Console | None = None,
    found: corpus.Corpus | None = None,
) -> DemoResult:
    """Fine-tune the demo model in a new folder, by default runs/demo-YYYYmmdd-HHMMSS, and print how it went.

    `steps` defaults to STEPS; `found` to the standard library's docstrings. Raises UserError when `output` is in use.
    """
    start = time.monotonic()
    console = console or Console(highlight=False)
    folder = Path(output or time.strftime("runs/demo-%Y%m%d-%H%M%S"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output: {folder} is in use; choose another folder")
    found = found or corpus.collect()
    found.write(folder / "data")
    question = next((pair for pair in found.valid if pair.prompt == SAMPLE), found.valid[0])
    config = TrainConfig(
        **RUN,
        data=str(folder / "data"),
        output=str(folder),
        steps=STEPS if steps is None else steps,
        device=device,
    )
    watch = _Watch()
    trainer = Trainer(config, [watch, *observers])
    _introduce(console, trainer, found)
    answer_before = _answer(config, question.prompt, None)
    trainer.run()
    trainer.session.close()
    answer_after = _answer(config, question.prompt, folder)
    seconds = time.monotonic() - start
    before, after = watch.evals[0], watch.evals[-1]
    result = DemoResult(folder, before, after, question, answer_before, answer_after, seconds)
    return result


def _answer(config: TrainConfig, prompt: str, adapter: Path | None) -> str:
    """What the quantised model says to a prompt, with the adapter or without: the likeliest token each time."""
    start = None if adapter is None else str(adapter)
    generator = Generator(replace(config, seq=SAMPLE_SEQ, adapter_init=start), with_adapter=adapter is not None)
    try:
        return generator.text(prompt, SAMPLE_TOKENS)
    finally:
        generator.close()
