"""Other programs beside a recorded run: a steady load, that neither begins nor ends nor changes while it lasts.

Each neighbour computes for 5 to 200 ms and sleeps for up to 50, as compilers and servers do, by a seed of its own. So
every part of a recording has the same load on average, and steps that carry no fault of the benchmark carry none of the
machine's either.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Final

COMPUTES: Final = (0.005, 0.2)  # seconds
SLEEPS: Final = (0.0, 0.05)


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """`count` processes that compute most of the time, ended with the block."""
    command = [sys.executable, "-m", "benchmarks.detection.neighbours"]
    running = [subprocess.Popen([*command, str(seed)], stdin=subprocess.PIPE) for seed in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.communicate()


def _compute_and_sleep(seed: int) -> None:
    chosen = random.Random(seed)
    while True:
        end = time.monotonic() + chosen.uniform(*COMPUTES)
        while time.monotonic() < end:
            sum(range(1000))
        time.sleep(chosen.uniform(*SLEEPS))


if __name__ == "__main__":
    _compute_and_sleep(int(sys.argv[1]))
