"""How fast a checkpoint gets onto the device, and what memory the host needs: `python -m benchmarks.loading`.

Writes a random checkpoint of a model's shape (or takes the one in --folder), then measures, each in a process of its
own: reading the files from end to end, loading them with the projections quantised to NF4, the same with the checksums
that training makes of the files as they pass, with --cache, and the start after that. `cold` is after the system was
told to drop the files from its memory, `warm` with them there. Host memory is the peak of anonymous and shared memory
(RssAnon + RssShmem) above what the process held before it loaded; on a software adapter, less the device's own buffers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.random_checkpoint import make_checkpoint
from entrenar_gpu.compiler import make_plan
from entrenar_gpu.config import SHAPES, TrainConfig
from entrenar_gpu.gpu import Device, Replay, open_device
from entrenar_gpu.model import HFCheckpoint, declared_weights
from entrenar_gpu.session import BaseIdentity, WeightCache, load_weights, storage_of

BLOCK_BYTES = 16 << 20
TIME_LIMIT = 300.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-4b", choices=SHAPES)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or goes (default: a temporary folder)")
    parser.add_argument("--device")
    parser.add_argument("--measure", choices=("read", "load", "sum", "cache"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder, args.device)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / args.shape
        if not (folder / "config.json").exists():
            begin = time.perf_counter()
            make_checkpoint(SHAPES[args.shape], folder)
            print(f"written in {time.perf_counter() - begin:.1f} s", flush=True)
        run_all(folder, args.device)


def run_all(folder: Path, device: str | None) -> None:
    """Every measurement, in an order in which the cold ones find the files dropped; a line each, then the ratios."""
    files = HFCheckpoint.open(folder).files()
    print(f"{sum(path.stat().st_size for path in files) / 1e9:.2f} GB in {len(files)} files", flush=True)
    found = {}
    for what, label in [
        ("read", "read"),
        ("load", "load and quantise"),
        ("sum", "with checksums"),
        ("cache", "the same, kept"),
        ("cache", "next"),
    ]:
        for state in ("cold", "warm") if label != "the same, kept" else ("warm",):
            if state == "cold":
                _drop([*files, *_kept(folder).glob("*")])
            row = found[label, state] = _in_process(what, folder, device)
            rest = f"  host memory {row['peak_bytes'] / 2**20:.0f} MiB  from {row['source']}" if "source" in row else ""
            print(f"{label:18} {state}  {row['seconds']:6.2f} s{rest}", flush=True)
    for state in ("cold", "warm"):
        reading = found["read", state]["seconds"]
        loading, starting = (found[label, state]["seconds"] for label in ("load and quantise", "next"))
        print(f"{state}: loading takes {loading / reading:.2f} times reading, the next start {starting / reading:.2f}")
        print(f"{state}: checksums cost {found['with checksums', state]['seconds'] / loading - 1:+.1%} of loading")


def measure(what: str, folder: Path, device: str | None) -> dict[str, Any]:
    """Seconds of one measurement; for those that load, where weights came from and the peak of host memory too."""
    checkpoint = HFCheckpoint.open(folder)
    if what == "read":
        return {"seconds": _read(checkpoint.files())}
    config = TrainConfig(model=str(folder), method="qlora")
    storage, opened = storage_of(checkpoint, config, None), open_device(device)
    weights = declared_weights(checkpoint.config.weights, storage, opened.caps)
    graph = weights[0].tensors[0].graph  # holds them and nothing else
    replay = Replay(opened, make_plan({"weights": graph}, opened.caps))
    cache = WeightCache(checkpoint, config.double_quant, _kept(folder)) if what == "cache" else None
    with PeakMemory(opened) as peak:
        begin = time.perf_counter()
        # Sums that are kept are taken, so that what is measured would be nothing.
        base = BaseIdentity(checkpoint, known={}) if what == "sum" else None
        source = load_weights(replay, checkpoint, weights, cache)
        if base is not None:
            base.value()
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "peak_bytes": peak.nbytes, "source": source}


class PeakMemory:
    """The peak of this process's anonymous and shared memory while the block runs, above what it was before."""

    def __init__(self, device: Device) -> None:
        self._device, self._done, self.nbytes = device, threading.Event(), 0

    def _now(self) -> int:
        """0 where the system does not tell."""
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return 0
        held = sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
        return held - (self._device.allocated_bytes if self._device.caps.software else 0)

    def _watch(self) -> None:
        while not self._done.is_set():
            self.nbytes = max(self.nbytes, self._now() - self._start)
            time.sleep(0.002)

    def __enter__(self) -> PeakMemory:
        self._start = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def _kept(folder: Path) -> Path:
    return folder / "kept"


def _read(files: Sequence[Path]) -> float:
    """Seconds to read files from end to end."""
    block = bytearray(BLOCK_BYTES)
    begin = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as stream:
            while stream.readinto(block):
                pass
    return time.perf_counter() - begin


def _drop(files: Sequence[Path]) -> None:
    """Ask the system to forget what it holds of files; where it cannot be asked, cold is warm."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_process(what: str, folder: Path, device: str | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.loading", "--measure", what, "--folder", str(folder)]
    command += ["--device", device] if device is not None else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    if done.returncode:
        sys.exit(f"{what}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
