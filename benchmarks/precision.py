"""What low-precision products cost in quality: `python -m benchmarks.precision`.

Trains the demo's model, or the pretrained one that --model names, on the demo's data (docstrings of the standard
library) for 200 steps in each precision over three seeds (adapters' first values and the order of samples), with
everything else equal, and prints the final evaluation losses beside those of f32 as markdown. With --engine given
several times, every engine's; all are held to f32 on the first. Exits with status 1 where int8 differs from f32 by
more than a percent, or f16 by more than 0.3. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from entrenar_gpu.cli import docstrings
from entrenar_gpu.cli.demo import RUN
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.events import EvalRecord
from entrenar_gpu.gpu import KernelCache, open_device
from entrenar_gpu.train import Trainer

SEEDS, STEPS = "0,1,2", 200
LARGEST_DIFFERENCE = {"f32": 0.001, "f16": 0.003, "int8": 0.01}  # of evaluation losses from f32's, relative


class _Last:
    """Observer that keeps the last evaluation."""

    loss = float("nan")

    def eval_finished(self, record: EvalRecord) -> None:
        self.loss = record.loss


def final_loss(config: TrainConfig, kernels: KernelCache) -> tuple[float, int]:
    """(evaluation loss after the last step, steps skipped because something overflowed) of a run; stderr is told."""
    with tempfile.TemporaryDirectory() as folder:
        last = _Last()
        trainer = Trainer(replace(config, output=folder), [last], kernels)
        try:
            summary = trainer.run()
        finally:
            trainer.session.close()
        if summary.status != "finished":
            sys.exit(f"a run was {summary.status}: what was measured so far stands above")
        run = f"seed {config.seed}, {config.precision} on {kernels.device.engine.name}"
        print(f"{run}: {last.loss:.4f}, {summary.skipped_steps} skipped", file=sys.stderr, flush=True)
        return last.loss, summary.skipped_steps


def compare(
    engines: Mapping[str, KernelCache], precisions: Sequence[str], config: TrainConfig, seeds: Sequence[int]
) -> Iterator[tuple[str, bool]]:
    """(a row of the table, whether every difference in it is within its bar), seed by seed.

    The first column is f32 on the first engine; the others are `columns`."""
    for seed in seeds:
        want, skipped = final_loss(replace(config, precision="f32", seed=seed), next(iter(engines.values())))
        cells, held = [f"{want:.4f}"], not skipped
        for engine, precision in columns(engines, precisions):
            loss, skipped = final_loss(replace(config, precision=precision, seed=seed), engines[engine])
            difference = loss / want - 1
            held = held and abs(difference) <= LARGEST_DIFFERENCE[precision]
            cells.append(f"{loss:.4f} ({difference:+.2%}, {skipped} skipped)")
        yield f"| {seed} | {' | '.join(cells)} |", held


def columns(engines: Mapping[str, KernelCache], precisions: Sequence[str]) -> list[tuple[str, str]]:
    """(engine, precision) of the runs that are held to the first engine's f32."""
    pairs = [(engine, precision) for engine in engines for precision in precisions]
    return [pair for pair in pairs if pair != (next(iter(engines)), "f32")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pretrained model, trained at the default learning rate")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", default=SEEDS, help="by their numbers (default: %(default)s)")
    parser.add_argument("--device")
    parser.add_argument("--engine", action="append", help="wgpu or dawn; may be given again (default: as in training)")
    parser.add_argument("--precisions", default="f16,int8", help="beside the first engine's f32 (default: %(default)s)")
    args = parser.parse_args(arguments)
    precisions, seeds = args.precisions.split(","), [int(seed) for seed in args.seeds.split(",")]
    if unknown := set(precisions) - LARGEST_DIFFERENCE.keys():
        parser.error(f"--precisions: no {', '.join(sorted(unknown))}; there are {', '.join(LARGEST_DIFFERENCE)}")
    engines: dict[str, KernelCache] = {}
    for name in args.engine or [None]:
        device = open_device(args.device, name)
        engines[device.engine.name] = KernelCache(device)
        print(f"{device.engine.name}: {device.caps.name}, {device.info['description']}")
    config = replace(RUN, steps=args.steps, device=args.device)
    if args.model:
        config = replace(config, model=args.model, lr=TrainConfig().lr)
    print(f"\nEvaluation loss after {args.steps} steps\n")
    names = ["f32", *(f"{precision} on {engine}" for engine, precision in columns(engines, precisions))]
    print(f"| seed | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}", flush=True)
    all_held = True
    with tempfile.TemporaryDirectory() as folder:
        docstrings.collect().write(folder)
        for line, held in compare(engines, precisions, replace(config, data=folder), seeds):
            print(line, flush=True)
            all_held = all_held and held
    if not all_held:
        sys.exit(f"a difference is over its bar: {', '.join(f'{p} {b:.1%}' for p, b in LARGEST_DIFFERENCE.items())}")


if __name__ == "__main__":
    main()
