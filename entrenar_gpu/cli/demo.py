"""The demo: a small model that ships with the project learns to answer questions about the standard library.

Nothing is downloaded. scripts/make_demo_model.py made the model; docstrings.py makes the data and holds some of it out.
"""

from __future__ import annotations

import math
import platform
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from entrenar_gpu.cli import docstrings
from entrenar_gpu.cli.text import printable
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.events import EvalRecord
from entrenar_gpu.gpu import KernelCache, is_host, open_device
from entrenar_gpu.infer import load
from entrenar_gpu.train import Trainer

MODEL = Path(__file__).parents[1] / "assets" / "demo-model"

# A third of the training questions, seen once: what two cores with a software adapter do in a minute.
RUN = TrainConfig(model=str(MODEL), method="qlora", rank=16, steps=120, batch=2, seq=256, lr=2e-3)

# Shown where it is among the held-out questions; else the first of them is.
SAMPLE = "What does decimal.Context.is_signed(a) do?"
SAMPLE_TOKENS, SAMPLE_SEQ = 48, 128
TO_TRY = "What does os.path.exists(path) do?"
LABEL_WIDTH = 10


@dataclass(frozen=True)
class DemoResult:
    """What a demo showed: held-out losses before and after, and the answers to a held-out question."""

    output: Path
    before: EvalRecord
    after: EvalRecord
    question: docstrings.Pair
    answer_before: str
    answer_after: str


class _Evaluations(list[EvalRecord]):
    """Observer that keeps the evaluations of a run."""

    def eval_finished(self, record: EvalRecord) -> None:
        self.append(record)


def default_output() -> str:
    return time.strftime("runs/demo-%Y%m%d-%H%M%S")


def run_demo(
    output: str | Path | None = None,
    steps: int | None = None,
    observers: Sequence[Any] = (),
    *,
    device: str | None = None,
    console: Console | None = None,
    found: docstrings.Corpus | None = None,
    kernels: KernelCache | None = None,
) -> DemoResult:
    """Fine-tune the demo model in a new folder, by default runs/demo-YYYYmmdd-HHMMSS, and print how it went.

    `steps` replaces RUN's, `found` the standard library's docstrings, `kernels` a device opened here. Raises UserError,
    with nothing written, when `output` is in use or there is no such device; KeyboardInterrupt when it was interrupted.
    """
    start = time.monotonic()
    console = console or Console()
    folder = Path(output or default_output())
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--output: {folder} is in use; choose another folder")
    config = replace(RUN, data=str(folder / "data"), output=str(folder), device=device)
    config = config if steps is None else replace(config, steps=steps)
    if kernels is None and not is_host(device):
        kernels = KernelCache(open_device(device))
    found = found or docstrings.collect()
    question = next((pair for pair in found.valid if pair.prompt == SAMPLE), found.valid[0])
    evaluations = _Evaluations()
    trainer = _trainer(config, found, [evaluations, *observers], kernels)
    _show_start(console, trainer, found)
    answer_before = _answer(config, question.prompt, None, kernels)
    status = trainer.run().status
    trainer.session.close()
    if status == "interrupted":
        raise KeyboardInterrupt
    answer_after = _answer(config, question.prompt, folder, kernels)
    result = DemoResult(folder, evaluations[0], evaluations[-1], question, answer_before, answer_after)
    _show_result(console, result, time.monotonic() - start)
    return result


def _trainer(
    config: TrainConfig, found: docstrings.Corpus, observers: Sequence[Any], kernels: KernelCache | None
) -> Trainer:
    """A trainer on `found`, written to the run folder, which was empty before and is gone again when this fails."""
    try:
        found.write(config.data_names[0])
        return Trainer(config, observers, kernels)
    except BaseException:
        shutil.rmtree(config.output, ignore_errors=True)
        raise


def _answer(config: TrainConfig, prompt: str, adapter: Path | None, kernels: KernelCache | None) -> str:
    """What the quantised model, with an adapter or without, says to a prompt: the likeliest token each time."""
    run: dict[str, Any] = {"method": config.method, "device": config.device}
    folder = None if adapter is None else str(adapter)
    with load(config.model, folder, context=SAMPLE_SEQ, slots=1, kernels=kernels, **run) as model:
        return " ".join(model.chat(prompt, max_tokens=SAMPLE_TOKENS).split())


def _show_start(console: Console, trainer: Trainer, found: docstrings.Corpus) -> None:
    session, config = trainer.session, trainer.config
    parameters = session.shape.model.parameters
    trained = sum(math.prod(shape) for shape in session.trainable().values())
    paths = session.adapters.modules if session.adapters is not None else ()
    targets = ", ".join(dict.fromkeys(path.rpartition(".")[2].removesuffix("_proj") for path in paths))
    python = f"{platform.python_implementation()} {platform.python_version()}"
    _line(console, "model", f"Qwen3 architecture, {parameters:,} parameters, pretrained on docstrings; base in NF4")
    _line(console, "adapter", f"rank {config.rank} on {targets}: {trained:,} parameters")
    _line(
        console, "data", f"{len(found.train):,} questions about the standard library of {python}, from its docstrings"
    )
    _line(console, "held out", f"{len(found.valid):,} more, in neither this training nor the model's own")
    _line(console, "device", f"{session.gpu_info['adapter']} ({session.gpu_info['backend']})")


def _show_result(console: Console, result: DemoResult, seconds: float) -> None:
    before, after = result.before, result.after
    console.print()
    _line(console, "held-out", f"loss {before.loss:.3f} -> {after.loss:.3f} nats a token", "bold")
    _line(console, "", f"perplexity {before.perplexity:.1f} -> {after.perplexity:.1f}, over {after.tokens:,} tokens")
    console.print()
    _line(console, "question", result.question.prompt)
    _line(console, "docstring", result.question.completion, "dim")
    _line(console, "before", result.answer_before)
    _line(console, "after", result.answer_after, "bold")
    _line(console, "", "It has learned the form of an answer; a million parameters hold few of the facts.", "dim")
    console.print()
    _line(console, "run", f"{result.output}  ({seconds:.0f} s: adapter_model.safetensors, metrics.jsonl, data/)")
    model = MODEL.relative_to(Path.cwd()) if MODEL.is_relative_to(Path.cwd()) else MODEL
    command = ["entrenar-gpu", "generate", "--model", str(model), "--adapter", str(result.output)]
    _line(console, "try", shlex.join([*command, "--prompt", TO_TRY]))


def _line(console: Console, label: str, text: str, style: str = "") -> None:
    """A labelled line. Text is never read as markup: it may be what a model said."""
    console.print(Text.assemble((f"{label:{LABEL_WIDTH}}", "cyan"), (printable(text), style)), soft_wrap=True)
