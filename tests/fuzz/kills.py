"""Runs that are killed at random moments, and go on: `python -m tests.fuzz.kills [N] [--seed S]`.

Each round trains a small run on the NumPy device to its end, through one or two ends before it: kill -9, SIGTERM, or a
disk that is full (a limit on the size of files). After each, the run is resumed, or started again where it had no
checkpoint. At the end losses, weights and metrics must be those of the run that was never stopped, to the bit, and the
trace must hold every step; but for full disks, which cost spans by design.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from entrenar_gpu.train.run_checkpoint import find_checkpoints
from observability.read import read_trace, step_table
from tests import ROOT
from tests.helpers.tiny import make_data, make_model

STEPS = 30
SECONDS = 900  # for a run that takes a few; the machine may be busy with other things
TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}


def command(folder: Path, output: Path) -> list[str]:
    paths = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--output", str(output)]
    shape = ["--steps", str(STEPS), "--save-every", "2", "--batch", "2", "--seq", "32", "--rank", "4", "--quiet"]
    resume = ["--resume"] if find_checkpoints(output) else []
    return [sys.executable, "-m", "entrenar_gpu.cli", "train", *paths, *shape, "--device", "numpy", *resume]


def result(output: Path, disk_was_full: bool = False) -> tuple[dict[int, float], bytes]:
    """Losses by step, and the adapter; metrics and trace have been looked at."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "metrics with a hole, or a step twice"
    for line in (output / "trace.jsonl").read_text().splitlines():
        json.loads(line)
    traced = set(step_table(read_trace(output), str(output)).step.tolist())
    assert disk_was_full or traced == set(range(1, STEPS + 1)), f"a trace with a hole: {sorted(traced)}"
    return {row["step"]: row["loss"] for row in rows}, (output / "adapter_model.safetensors").read_bytes()


def interrupted(arguments: list[str], how: str, seconds: float, rng: random.Random) -> str:
    """Run a command and end it; returns what it said."""
    limit = rng.randrange(2_000, 40_000)

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = subprocess.Popen(
        arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=full if how == "full disk" else None
    )
    if how != "full disk":
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL if how == "kill -9" else signal.SIGTERM)
    said = process.communicate(timeout=SECONDS)[1]
    assert "Traceback" not in said, said
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int, nargs="?", default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, ends = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model", **TINY)
        make_data(folder / "train.jsonl", vocab=96)
        begin = time.monotonic()
        subprocess.run(command(folder, folder / "whole"), cwd=ROOT, check=True)
        seconds, whole = time.monotonic() - begin, result(folder / "whole")
        number = 0
        while ends < args.n:
            output, number, disk_was_full = folder / f"run{number}", number + 1, False
            for _ in range(rng.choice((1, 2, 2, 3))):
                how = rng.choice(("kill -9", "kill -9", "SIGTERM", "full disk"))
                disk_was_full |= how == "full disk"
                before = [path.name for path in find_checkpoints(output)]
                interrupted(command(folder, output), how, rng.uniform(0.2, 1.0) * seconds, rng)
                after = [path.name for path in find_checkpoints(output)]
                assert before == after[: len(before)], f"{how}: lost {before} {after}"
                ends += 1
            subprocess.run(command(folder, output), cwd=ROOT, check=True)
            assert result(output, disk_was_full) == whole, (
                f"run {number}, seed {args.seed}: not the run that never stopped"
            )
            print(f"{ends} ends, {number} runs, all as if never stopped", flush=True)


if __name__ == "__main__":
    main()
