"""Damaged files for every reader: `python -m tests.fuzz [--minutes N] [--jobs N] [--seed S]`.

Inputs are tried in processes of their own. One that takes more than SECONDS or MEMORY_BYTES, ends its process, or
raises anything but the error that becomes one line, is a fault: it is printed and kept in `found/`, from where every
test run reads it again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path

from tests.fuzz.readers import MEMORY_BYTES, SECONDS, corpus, outcome

FOUND = Path(__file__).parent / "found"
_ROOM = 1 << 30  # of address space beyond MEMORY_BYTES: threads reserve some that they never touch


class Worker:
    """A process that tries inputs in a folder of its own, and who watches it. `tried` counts inputs by kind."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.tried: Counter[str] = Counter()
        folder.mkdir()
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        # When the input that is being read was given, or 0, and the processor's time of the process then.
        self._since = multiprocessing.Array("d", 2)
        self._process = multiprocessing.Process(target=_work, args=(folder, seed, sender, self._since), daemon=True)
        self._process.start()
        sender.close()
        self._kind = self._path = ""

    def faults(self) -> list[tuple[str, bytes, str]]:
        """(kind, input, what happened) since the last call."""
        found: list[tuple[str, bytes, str]] = []
        try:
            while self._receiver.poll():
                kind, data, what = self._receiver.recv()
                if data is None:
                    self._kind, self._path = kind, what
                    self.tried[kind] += 1
                else:
                    found.append((kind, data, what))
        except EOFError:
            self._process.join()
        if not self._process.is_alive() and self._process.exitcode != 0:
            found.append(self._interrupted(f"ended its process: status {self._process.exitcode}"))
        elif self._is_stuck():
            self.stop()
            found.append(self._interrupted(f"no end after {SECONDS:.0f} s"))
        return found

    def _is_stuck(self) -> bool:
        """Whether an input takes too long; where the process hardly got a processor in that time, wait longer."""
        since, used_before = self._since
        if not since:
            return False
        seconds = time.monotonic() - since
        return seconds > (SECONDS if _cpu_seconds(self._process.pid) - used_before > SECONDS / 2 else 10 * SECONDS)

    def _interrupted(self, what: str) -> tuple[str, bytes, str]:
        """What the process was at when it ended."""
        if not self._kind:
            raise SystemExit("the files that are to be damaged cannot be made")
        return self._kind, Path(self._path).read_bytes(), what

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def _work(folder: Path, seed: int, sender: Connection, since: SynchronizedArray[float]) -> None:
    kinds = corpus(folder)
    contents = {name: kind.path.read_bytes() for name, kind in kinds.items()}
    for name, content in contents.items():
        if what := outcome(kinds[name], content):
            raise SystemExit(f"{name}: a valid one is refused: {what}")
    used, rng = _status("VmSize"), random.Random(seed)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES + _ROOM,) * 2)
    while True:
        name = rng.choice(list(kinds))
        data = kinds[name].mutated(contents[name], rng)
        before = _reset_peak()
        sender.send((name, None, str(kinds[name].path)))
        since[:] = time.monotonic(), time.process_time()
        what = outcome(kinds[name], data)
        since[:] = 0.0, 0.0
        if not what and _status("VmHWM") - before > MEMORY_BYTES:
            what = f"took {(_status('VmHWM') - before) / 2**30:.1f} GiB"
        if what:
            sender.send((name, data, what))
        kinds[name].path.write_bytes(contents[name])


def _cpu_seconds(pid: int | None) -> float:
    """What a process has used of the processor, its threads included; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _status(field: str) -> int:
    """Bytes, by a name in the kernel's account of this process."""
    with open("/proc/self/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) << 10 for line in stream if line.startswith(f"{field}:"))


def _reset_peak() -> int:
    """Have the peak of memory begin anew; returns where."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
        stream.write("5")
    return _status("VmRSS")


def keep(name: str, data: bytes, seed: int) -> Path:
    FOUND.mkdir(exist_ok=True)
    path = FOUND / f"{name.replace(' ', '_')}-{seed}-{len(list(FOUND.iterdir()))}"
    path.write_bytes(data)
    return path


def campaign(minutes: float, jobs: int, seed: int) -> tuple[int, int]:
    """(inputs tried, faults). Prints each fault, once per kind and last line of what happened."""
    end, seen, total = time.monotonic() + 60 * minutes, Counter[tuple[str, str]](), 0
    with tempfile.TemporaryDirectory() as temporary:
        workers = [Worker(Path(temporary) / f"{seed + job}", seed + job) for job in range(jobs)]
        while time.monotonic() < end:
            time.sleep(0.2)
            for job, worker in enumerate(workers):
                for name, data, what in worker.faults():
                    key = (name, what.strip().splitlines()[-1][:80])
                    seen[key] += 1
                    if seen[key] == 1:
                        print(f"{name}: {what}\n  kept as {keep(name, data, seed)}", flush=True)
                if not worker.alive:
                    total += sum(worker.tried.values())
                    seed += jobs
                    workers[job] = Worker(Path(temporary) / f"{seed + job}", seed + job)
        for worker in workers:
            worker.stop()
            total += sum(worker.tried.values())
    return total, sum(seen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    tried, faults = campaign(args.minutes, args.jobs, args.seed)
    print(f"{tried:,} inputs, {faults} faults, seed {args.seed}")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
