"""What low-precision products cost in quality: `python -m benchmarks.precision`.

Trains the demo's model on the demo's data for 200 steps in each precision over three seeds (adapters' first values and
the order of samples), with everything else equal, and prints the final evaluation losses beside f32's as markdown.
Exits with status 1 when one differs from f32's by more than a percent. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from entrenar_gpu.cli import docstrings
from entrenar_gpu.cli.demo import RUN
from entrenar_gpu.events import EvalRecord
from entrenar_gpu.gpu import KernelCache, open_device
from entrenar_gpu.train import Trainer

PRECISIONS = ("f32", "f16", "int8")
SEEDS, STEPS = 3, 200
LARGEST_DIFFERENCE = 0.01


class _Last:
    """Observer that keeps the last evaluation."""

    loss = float("nan")

    def eval_finished(self, record: EvalRecord) -> None:
        self.loss = record.loss


def final_loss(precision: str, seed: int, steps: int, data: Path, kernels: KernelCache) -> tuple[float, int]:
    """(evaluation loss after the last step, steps skipped because something overflowed) of a run of the demo."""
    with tempfile.TemporaryDirectory() as folder:
        config = replace(RUN, data=str(data), output=folder, steps=steps, precision=precision, seed=seed)
        last = _Last()
        trainer = Trainer(config, [last], kernels)
        try:
            summary = trainer.run()
        finally:
            trainer.session.close()
        return last.loss, summary.skipped_steps


def compare(kernels: KernelCache, found: docstrings.Corpus, seeds: int, steps: int) -> Iterator[tuple[str, float]]:
    """(a row of the table, largest relative difference from f32 in it), seed by seed."""
    with tempfile.TemporaryDirectory() as folder:
        found.write(folder)
        for seed in range(seeds):
            losses, skipped = {}, {}
            for precision in PRECISIONS:
                losses[precision], skipped[precision] = final_loss(precision, seed, steps, Path(folder), kernels)
            differences = {p: losses[p] / losses["f32"] - 1 for p in PRECISIONS[1:]}
            cells = [f"{losses[p]:.4f} ({differences[p]:+.2%}, {skipped[p]} skipped)" for p in PRECISIONS[1:]]
            yield f"| {seed} | {losses['f32']:.4f} | {' | '.join(cells)} |", max(map(abs, differences.values()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--device")
    args = parser.parse_args(arguments)
    device = open_device(args.device)
    print(f"{device.caps.name}, {device.info['description']}: evaluation loss after {args.steps} steps\n")
    print(f"| seed | {' | '.join(PRECISIONS)} |\n|{'---|' * (len(PRECISIONS) + 1)}", flush=True)
    worst = 0.0
    for line, difference in compare(KernelCache(device), docstrings.collect(), args.seeds, args.steps):
        print(line, flush=True)
        worst = max(worst, difference)
    print(f"\nLargest difference from f32: {worst:.2%}")
    if not worst <= LARGEST_DIFFERENCE:
        sys.exit(1)


if __name__ == "__main__":
    main()
