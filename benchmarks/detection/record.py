"""Records a real training run for the benchmark: every step after the first few, with all the noise of its machine.

Nothing is filtered: whatever decided which steps are clean would be a detector of its own. So steps that other
programs held up count as clean, and an alarm on one of them as a false alarm.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.detection import recording
from benchmarks.detection.bench import SEGMENT
from benchmarks.detection.neighbours import neighbours
from observability import schema
from observability.errors import TraceError
from observability.read.step_table import step_table
from observability.read.trace_reader import read_trace

_WARM_UP: Final = 20  # steps


def record_run(run: Path, command: list[str], output: Path, beside: int = 0) -> None:
    """Runs `command`, which trains with a trace into the folder `run`, and stores its step times in `output`.

    `beside` programs compute meanwhile.
    """
    try:
        with neighbours(beside):
            status = subprocess.call(command)
    except OSError as error:
        raise SystemExit(f"record: {command[0]}: {error.strerror}") from None
    if status != 0:
        raise SystemExit(f"record: the training command failed with status {status}")
    store(run, " ".join(command), output, beside)


def store(run: Path, command: str, output: Path, beside: int = 0) -> None:
    """Stores the step times of the run in the folder `run`, which `command` made with `beside` programs beside it.

    Raises SystemExit where there is no trace, or too little of it for a run of either half of the benchmark.
    """
    try:
        table = step_table(read_trace(run), str(run))
    except TraceError as error:
        raise SystemExit(f"record: {error}") from None
    kept = np.arange(_WARM_UP, len(table))
    if len(kept) < 2 * SEGMENT:
        raise SystemExit(f"record: {run}: {len(table)} steps; the benchmark needs {_WARM_UP + 2 * SEGMENT} and more")
    about = {
        "command": command,
        "adapter": str(table.facts.get(schema.GPU_ADAPTER, "")),
        "steps": len(kept),
        "processors": os.cpu_count(),
        "beside": beside,
    }
    recording.save(recording.rows(table, kept), output, about)
    print(f"record: {len(kept)} steps in {output}")
