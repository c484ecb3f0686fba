"""What a person sees in the terminal: the plan, the start of a run, and its progress."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import IO, Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from entrenar_gpu.cli.text import printable
from entrenar_gpu.events import CheckpointRecord, EvalRecord, RunInfo, RunSummary, SampleRecord, StepRecord

_MEANINGS = {
    "nf4_bytes": "weights as NF4 codes",
    "scale_bytes": "scales of the codes",
    "embedding_bytes": "embedding and output projection",
    "dense_bytes": "norms, biases, what stays dense",
    "adapter_bytes": "trainable weights",
    "gradient_bytes": "their gradients",
    "optimizer_bytes": "moments and state",
    "copy_bytes": "weights as products read them",
    "cache_bytes": "keys and values of the answers' tokens",
    "activation_bytes": "activations",
    "scratch_bytes": "scratch",
    "transfer_bytes": "inputs and reports",
    "peak_bytes": "in all",
}


def size(nbytes: float) -> str:
    return f"{nbytes / 2**30:.3f} GiB" if nbytes >= 2**29 else f"{nbytes / 2**20:.1f} MiB"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def show_plan(parts: Mapping[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for key, meaning in _MEANINGS.items():
        if key == "cache_bytes" and not parts[key]:
            continue  # a training run has none
        table.add_row(key, size(parts[key]), meaning, style="bold" if key == "peak_bytes" else "")
    console = Console()
    console.print(table)
    console.print(
        _text(f"recompute: {parts['recompute']}; budget {size(parts['budget_bytes'])}; {parts['device']}"),
        soft_wrap=True,
    )
    for words, counts in (("recomputed", parts["recomputed"]), ("kept as fp16", parts["fp16"])):
        if counts:
            listed = ", ".join(f"{count} {name}" for name, count in counts.items())
            console.print(_text(f"{words}: {listed}"), highlight=False, soft_wrap=True)
    for use in parts["kernels"]:
        layers = f" in {counted(use['layers'], 'layer')}" if use["layers"] else ""
        passes = "; ".join(f"{phase} {', '.join(shaders)}" for phase, shaders in use["kernels"].items())
        console.print(_text(f"{use['what']}, {use['variant']}{layers}: {passes}"), highlight=False, soft_wrap=True)


def show_bench(result: Mapping[str, Any]) -> None:
    """The result of `bench train`."""
    console = Console()
    lines = [
        f"{result['shape']} {result['batch']}x{result['seq']} rank {result['rank']} {result['precision']}"
        f" on {result['adapter']} ({result['driver']})",
        f"{result['tokens_per_second']:,.1f} tokens/s, {result['step_seconds'] * 1e3:.1f} ms per step,"
        f" {result['tflops']:.2f} TFLOP/s ({result['ceiling_share']:.0%} of the {result['ceiling_tflops']:.2f} that a"
        " product alone reaches here)",
        "  ".join(f"{phase} {seconds * 1e3:.1f} ms" for phase, seconds in result["seconds"].items()),
        f"planned {size(result['planned_bytes'])}, allocated {size(result['allocated_bytes'])}"
        + (f", driver {size(result['driver_bytes'])}" if result["driver_bytes"] else "")
        + f"; recompute: {result['recompute']}",
    ]
    lines += [
        f"{row['share']:6.1%} {row['seconds'] * 1e3:9.2f} ms {row['count']:5}x {row['tflops']:7.2f} TFLOP/s"
        f" {row['gbytes_per_second']:8.1f} GB/s  {row['kernel']}"
        for row in result["kernels"][:20]
    ]
    for line in lines:
        console.print(_text(line), highlight=False, soft_wrap=True)


def show_start(trainer: Any, console: Console | None = None) -> None:
    """Model, data, device and memory of a run that is about to begin."""
    session, samples = trainer.session, trainer.train_samples
    console = console or Console()

    def line(name: str, text: str) -> None:
        console.print(Text.assemble((f"{name:9}", "dim"), _text(text)), highlight=False, soft_wrap=True)

    shapes = session.trainable().values()
    trainable = sum(math.prod(shape) for shape in shapes)
    total = session.shape.model.parameters
    line("model", f"{trainer.config.model}  {total / 1e6:,.1f} M parameters, {trainable / 1e6:,.2f} M trained")
    for note in session.checkpoint.notes:
        line("weights", note)
    for note in session.adapters.notes if session.adapters is not None else ():
        line("adapter", note)
    if trainer.config.cache:
        line("weights", session.weights_from)
    dropped = [f"{samples.skipped} skipped without a token to train"] if samples.skipped else []
    dropped += [f"{samples.cut} cut at --seq"] if samples.cut else []
    line(
        "data",
        ", ".join([f"{len(samples):,} samples, {samples.trained_tokens:,} trained tokens", *dropped, *samples.notes]),
    )
    info = session.gpu_info
    line("device", f"{info['adapter']} ({info['backend']}, {info['driver']})")
    if session.plan is not None and session.budget is not None:
        recompute = f"recompute: {session.fitted.recompute.describe()}"
        budget = f"budget {size(session.budget.nbytes)} ({session.budget.source})"
        line("memory", f"{size(session.plan.peak_bytes)}; {budget}; {recompute}")


def _text(text: str, style: str = "") -> Text:
    """Text that may quote models, data and names."""
    return Text(printable(text), style=style)


class LastingOutput:
    """Standard output that ends no run: a training is worth more than its lines.

    Where nobody reads any more, as behind `| head`, it goes on silently; where it cannot be written, as on a full disk,
    it says so once on standard error.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (OSError, ValueError) as error:  # the second: closed
            descriptor = os.open(os.devnull, os.O_WRONLY)
            with contextlib.suppress(OSError, ValueError):
                os.dup2(descriptor, self._stream.fileno())  # what is still buffered goes there
            self._stream = os.fdopen(descriptor, "w", encoding="utf-8")
            if not isinstance(error, BrokenPipeError):
                with contextlib.suppress(OSError):
                    reason = getattr(error, "strerror", None) or error
                    print(f"standard output: {reason}; training goes on without it", file=sys.stderr, flush=True)


class Progress:
    """Observer: a bar with loss, learning rate, tokens per second, time left; evaluations and checkpoints as lines."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(file=cast(IO[str], LastingOutput(sys.stdout)))
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Bar(
            *columns, console=self.console, disable=quiet or not (self.console.is_terminal or self.console.is_jupyter)
        )
        self._quiet = quiet
        self._shown = 0

    def run_started(self, info: RunInfo) -> None:
        self._task = self._bar.add_task("", total=info.total_steps, completed=info.first_step - 1)
        self._every = info.config.get("steps_per_report") or max((info.total_steps - info.first_step + 1) // 20, 1)
        self._total = info.total_steps
        self._bar.start()

    def step_finished(self, record: StepRecord) -> None:
        text = f"loss {record.loss:.4f}  lr {record.lr:.2e}  {record.tokens_per_second:,.0f} tok/s"
        self._bar.update(self._task, completed=record.step, description=text)
        if record.skipped:
            self.say(f"step {record.step}: skipped, loss or gradient not finite", "yellow")
        elif self._bar.disable and not self._quiet and (record.step % self._every == 0 or record.step == self._total):
            self.say(f"step {record.step}/{self._total}  {text}")

    def eval_finished(self, record: EvalRecord) -> None:
        self.say(f"step {record.step}: evaluation loss {record.loss:.4f}, perplexity {record.perplexity:.2f}", "cyan")

    def samples_drawn(self, record: SampleRecord) -> None:
        for row, text in zip(record.rows, record.texts, strict=True):
            asked = row["prompt"] if "messages" not in row else row["messages"][-1].get("content")
            self.say(f"step {record.step}: {' '.join(str(asked).split())}", "dim")
            self.say(f"  {' '.join(text.split())}")

    def checkpoint_saved(self, record: CheckpointRecord) -> None:
        self.say(f"step {record.step}: saved {record.path} ({size(record.bytes)})", "dim")

    def run_finished(self, summary: RunSummary) -> None:
        self._bar.stop()
        rate = summary.steps / summary.seconds if summary.seconds else 0.0
        skipped = f", {summary.skipped_steps} skipped" if summary.skipped_steps else ""
        self.say(
            f"{summary.status.partition(':')[0]}: {counted(summary.steps, 'step')}{skipped} in {summary.seconds:.1f} s"
            f" ({rate:.2f} steps/s), last loss {summary.final_loss:.4f}; {summary.output}",
            "bold",
        )
        for note in filter(None, (summary.stopped, summary.result)):
            self.say(note)

    def say(self, text: str, style: str = "") -> None:
        """A line above the bar."""
        if not self._quiet:
            self._bar.console.print(_text(text, style), highlight=False, soft_wrap=True)
