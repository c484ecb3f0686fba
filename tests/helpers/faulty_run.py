"""A training run with real faults in it: `python -m tests.helpers.faulty_run FOLDER`, a process of its own.

On the NumPy device, so that it needs no GPU and a step takes some milliseconds. The loader sleeps once, the process is
stopped once, the disk takes its time over one checkpoint, and in the end other programs keep every processor busy.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import observability
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.train.trainer import Trainer
from observability.detect import LiveDetector
from tests.helpers.tiny import make_data, make_model

STEPS, LOADER, STOPPED, DISK, BUSY = 136, 40, 60, 80, 100
SAVE_EVERY = 8
SECONDS = 1.0  # of each single fault


class Faults:
    """Observer that lets other programs run, from the step before on."""

    def __init__(self) -> None:
        self.loops: list[subprocess.Popen[bytes]] = []

    def step_finished(self, record: Any) -> None:
        if record.step == BUSY - 1:
            loop = [sys.executable, "-c", "while True: pass"]
            self.loops = [subprocess.Popen(loop) for _ in range(4 * (os.cpu_count() or 1))]

    def run_finished(self, _summary: Any) -> None:
        self.end()

    def end(self) -> None:
        for loop in self.loops:
            loop.kill()
            loop.wait()


def late_loader(trainer: Trainer) -> None:
    """The batches of step LOADER come late, as from a slow disk or network."""
    batches, drawn = trainer.batches, iter(range(1, STEPS + 2))

    class Late:
        def __next__(self) -> Any:
            if next(drawn) == LOADER:
                time.sleep(SECONDS)
            return next(batches)

        def __getattr__(self, name: str) -> Any:
            return getattr(batches, name)

    trainer._pipeline._batches = Late()


def stopped_process(trainer: Trainer) -> None:
    """In the middle of step STOPPED the process is stopped: between two steps it would be told as a gap there."""
    run, launched = trainer.executor.run, iter(range(1, STEPS + 2))

    def stop(*_: Any) -> None:
        subprocess.Popen(["sh", "-c", f"sleep {SECONDS}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)

    def interrupted(name: str, *arguments: Any) -> Any:
        if name == "micro" and next(launched) == STOPPED:
            signal.setitimer(signal.ITIMER_REAL, 0.001)
        return run(name, *arguments)

    signal.signal(signal.SIGALRM, stop)
    trainer.executor.run = interrupted


def slow_fsync(folder: Path) -> None:
    """Of the first file of the checkpoint at step DISK, the system waits for the disk."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        if any(folder.glob(f"*{DISK:06d}*")) and not slow.done:  # type: ignore[attr-defined]
            slow.done = True  # type: ignore[attr-defined]
            time.sleep(SECONDS)
        fsync(descriptor)

    slow.done = False  # type: ignore[attr-defined]
    os.fsync = slow


def main(folder: Path) -> None:
    model, data = make_model(folder / "model"), make_data(folder / "train.jsonl", samples=64)
    config = TrainConfig(
        model=str(model), data=str(data), output=str(folder / "run"), steps=STEPS, batch=1, seq=16, rank=2,
        device="numpy", save_every=SAVE_EVERY,
    )  # fmt: skip
    trainer, tracer, faults = Trainer(config), observability.observe(config.output), Faults()
    trainer.observe(LiveDetector(on_finding=tracer.told), tracer, faults)
    late_loader(trainer)
    stopped_process(trainer)
    slow_fsync(folder / "run")
    try:
        trainer.run()
    finally:
        faults.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
