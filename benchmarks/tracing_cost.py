"""What tracing costs.

    python -m benchmarks.tracing_cost                      by part, on made-up records of a 36-layer model
    python -m benchmarks.tracing_cost --train --steps 200  in a real training of the demo's model, on and off in turn
    python -m benchmarks.tracing_cost --train --model DIR --precision int8 --batch 1 --seq 512
                                                           the same for another model, on random tokens

The training thread hands each record over; the tracing thread then works while the next step runs on the device. Both
hold Python's global lock, so the second figure says the most that a step can lose, and the alternation what it does.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entrenar_gpu.events import notify
from entrenar_gpu.train.host_stats import HostSampler
from observability import observe, schema
from observability.detect.live import LiveDetector
from observability.write.export import encode_line, line_head
from observability.write.tracing import OwnSpans, SpanBuilder
from tests.helpers.step_records import KERNELS, run_info, run_summary, step_record

LAYERS = 36
KERNELS_A_LAYER = KERNELS * 3  # 21, as a block with seven adapted projections has
_RESAMPLES = 2000


@dataclass(frozen=True)
class Parts:
    """Costs of one step record at a level."""

    spans: int
    handover_us: float  # wall time, training thread
    work_ms: float  # CPU time, tracing thread: building, encoding, writing
    kilobytes: float  # in the file


def cost_by_part(level: schema.Level, steps: int) -> Parts:
    """Time `steps` records of a 36-layer model; those with kernels only at the level that keeps them."""
    kernels = KERNELS_A_LAYER if level == "kernel" else ()
    records = [step_record(step, LAYERS, kernels) for step in range(1, steps + 1)]
    build = SpanBuilder(run_info(), level, None, OwnSpans())
    head = line_head(build.resource, schema.SCOPE_NAME, "0.1.0")
    start = time.thread_time()
    lines = [encode_line(build.step(record), head) for record in records]
    work = time.thread_time() - start
    with tempfile.TemporaryDirectory() as folder:
        observer = observe(folder, level=level)
        observer.run_started(run_info())
        start = time.perf_counter()
        for record in records:
            observer.step_finished(record)
        handover = time.perf_counter() - start
        observer.run_finished(run_summary(steps))
    spans = len(build.step(records[0]))
    return Parts(spans, handover / steps * 1e6, work / steps * 1e3, len(lines[0]) / 1e3)


def sampler_cost(readings: int) -> float:
    """CPU microseconds of one reading of the host's counters, of which HostSampler's thread makes 50 a second."""
    sampler = HostSampler()
    start = time.process_time()
    for _ in range(readings):
        sampler._read()
    return (time.process_time() - start) / readings * 1e6


class Switch:
    """An observer that passes steps on to others in every second block of `block` steps, and times all of them."""

    def __init__(self, observers: Sequence[Any], block: int) -> None:
        self._observers = observers
        self._block = block
        self._last = 0.0
        self.seconds: list[float] = []  # from each record to the next, which is when the first one's cost is paid

    def run_started(self, info: Any) -> None:
        notify(self._observers, "run_started", info)

    def step_finished(self, record: Any) -> None:
        now = time.perf_counter()
        if self._last:
            self.seconds.append(now - self._last)
        self._last = now
        if len(self.seconds) // self._block % 2 == 1:
            notify(self._observers, "step_finished", record)

    def run_finished(self, summary: Any) -> None:
        notify(self._observers, "run_finished", summary)


@dataclass(frozen=True)
class Overhead:
    """Relative extra wall time with tracing on: the median over pairs of neighbouring blocks, and its 95% interval."""

    step_seconds: float  # median with tracing off
    relative: float
    low: float
    high: float
    pairs: int


def alternate(train: Callable[[Sequence[Any]], Any], level: schema.Level, block: int) -> Overhead:
    """Run `train(observers)` once, with tracing and live detection on in every second block of steps."""
    with tempfile.TemporaryDirectory() as folder:
        switch = Switch([observe(Path(folder), level=level), LiveDetector(emit=lambda line: None)], block)
        train([switch])
    return overhead(switch.seconds, block)


def overhead(seconds: Sequence[float], block: int) -> Overhead:
    """From wall times of steps, blocks of tracing off and on in turn; the first pair, where shaders warm up, is out."""
    medians = [statistics.median(seconds[at : at + block]) for at in range(0, len(seconds) - block + 1, block)]
    pairs = list(zip(medians[2::2], medians[3::2], strict=False))
    if len(pairs) < 2:
        raise SystemExit(f"tracing_cost: {len(seconds)} steps make no two pairs of blocks of {block}")
    ratios = [on / off - 1 for off, on in pairs]
    draw = random.Random(0)
    again = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    low, high = again[round(0.025 * _RESAMPLES)], again[round(0.975 * _RESAMPLES)]
    return Overhead(statistics.median(off for off, _ in pairs), statistics.median(ratios), low, high, len(pairs))


def train_demo(steps: int) -> Callable[[Sequence[Any]], Any]:
    """Training of the demo's model on the demo's data, in a folder that is thrown away."""
    from entrenar_gpu.cli import docstrings
    from entrenar_gpu.cli.demo import RUN
    from entrenar_gpu.train import Trainer

    def train(observers: Sequence[Any]) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            docstrings.collect().write(Path(folder) / "data")
            config = replace(RUN, data=f"{folder}/data/train.jsonl", output=f"{folder}/run", steps=steps)
            return Trainer(config, list(observers)).run()

    return train


def train_model(folder: str, steps: int, batch: int, seq: int, precision: str) -> Callable[[Sequence[Any]], Any]:
    """Training of the model in `folder` on rows of random tokens."""
    from entrenar_gpu.config import TrainConfig
    from entrenar_gpu.model import load_model_config
    from entrenar_gpu.train import Trainer

    def train(observers: Sequence[Any]) -> Any:
        vocabulary = load_model_config(Path(folder)).vocab_size
        with tempfile.TemporaryDirectory() as scratch:
            data = Path(scratch) / "train.jsonl"
            with data.open("w") as stream:
                draw = random.Random(0)
                for _ in range(8 * batch):
                    stream.write(json.dumps({"input_ids": draw.choices(range(vocabulary), k=seq)}) + "\n")
            config = TrainConfig(
                model=folder,
                data=str(data),
                output=f"{scratch}/run",
                steps=steps,
                batch=batch,
                seq=seq,
                precision=precision,
            )
            return Trainer(config, list(observers)).run()

    return train


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what tracing costs.")
    parser.add_argument("--train", action="store_true", help="alternate on and off in a real training")
    parser.add_argument("--model", help="folder of the model to train instead of the demo's")
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--block", type=int, default=5, help="steps before tracing is switched")
    parser.add_argument("--level", choices=schema.LEVELS, default=schema.DEFAULT_LEVEL)
    options = parser.parse_args()
    if not options.train:
        for level in schema.LEVELS:
            parts = cost_by_part(level, options.steps)
            print(
                f"{level:7} {parts.spans:5} spans a step: {parts.handover_us:6.1f} us in the training thread,"
                f" {parts.work_ms:7.2f} ms in the tracing thread, {parts.kilobytes:7.1f} kB in the file"
            )
        cost = sampler_cost(2000)
        print(f"host    50 readings a second of {cost:.1f} us: {50 * cost / 1e6:.2%} of a processor")
        return
    train = train_demo(options.steps)
    if options.model:
        train = train_model(options.model, options.steps, options.batch, options.seq, options.precision)
    found = alternate(train, options.level, options.block)
    print(
        f"{options.level}: {found.relative:+.2%} of wall time, 95% interval {found.low:+.2%} to {found.high:+.2%},"
        f" {found.pairs} pairs of blocks, steps of {found.step_seconds * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    main()
