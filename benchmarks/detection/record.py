"""Records a real training run for the benchmark, without the steps that other programs plainly held up.

What counts as clean must not be the detector's opinion. While the run trains, the kernel's own accounting is sampled:
how long its threads stood ready to run but had no processor (/proc/PID/task/*/schedstat, Linux). A step that waited so
for more than `MOST_WAITING` of its time was slowed by somebody else, and is left out; the steps on either side are
joined. Everything else stays in, bursts and outliers included.
"""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.detection import recording
from observability.otlp_read import read_trace
from observability.steps import StepTable, step_table

MOST_WAITING: Final = 0.25  # of a step's wall time, summed over threads
_EVERY: Final = 0.02  # seconds between samples
_WARM_UP: Final = 20  # steps


def record_run(run: Path, command: list[str], output: Path) -> None:
    """Runs `command`, which trains with a trace into the folder `run`, and stores its step times in `output`."""
    process = subprocess.Popen(command)
    samples: list[tuple[float, float]] = []
    sampler = threading.Thread(target=_sample, args=(process, samples))
    sampler.start()
    status = process.wait()
    sampler.join()
    if status != 0:
        raise SystemExit(f"record: the training command failed with status {status}")
    spans = read_trace(run)
    table = step_table(spans, str(run))
    first = int(spans.start[spans.level == 2].min()) / 1e9
    waiting = _waiting(table, first, np.array(samples))
    clean = waiting <= MOST_WAITING
    clean[:_WARM_UP] = False
    recording.save(
        recording.rows(table, np.flatnonzero(clean)),
        output,
        {
            "command": " ".join(command),
            "adapter": str(table.facts.get("entrenar.gpu.adapter", "")),
            "steps_recorded": len(table),
            "steps_kept": int(clean.sum()),
            "steps_held_up_by_others": int((waiting > MOST_WAITING).sum()),
        },
    )
    print(f"record: kept {int(clean.sum())} of {len(table)} steps in {output}")


def _sample(process: subprocess.Popen[bytes], samples: list[tuple[float, float]]) -> None:
    """(seconds since the epoch, seconds that the process's threads have waited for a processor so far)."""
    threads: dict[str, float] = {}
    while process.poll() is None:
        for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            try:
                threads[path.parent.name] = int(path.read_text().split()[1]) / 1e9
            except (OSError, IndexError, ValueError):
                continue  # the thread has ended
        samples.append((time.time(), sum(threads.values())))
        time.sleep(_EVERY)


def _waiting(table: StepTable, first: float, samples: np.ndarray) -> np.ndarray:
    """Share of each step's time in which threads waited; a sample lies between two steps, so it counts for both."""
    begin = first + table.start - _EVERY
    end = first + table.start + table.wall_seconds + _EVERY
    waited = np.interp(end, *samples.T) - np.interp(begin, *samples.T)
    return waited / table.wall_seconds
