"""What the host and the GPU did while a step ran: evidence for why it was slow.

Counters come from the kernel: `getrusage`, and on Linux `/proc`. A thread reads them 50 times a second, some 20 µs each
time, and a step gets what they rose by between its beginning and its end: the host is a step or more ahead of the
device, so that where the host stands when a step is told of says nothing of when it ran. The thread also sees how long
the whole process was held up (stopped, swapped out, outrun by other programs, the machine asleep), as then it wakes
late: nothing else counts that time. Once a second it asks the GPU for its clock, temperature and power, as drivers may
take milliseconds to answer.
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar_gpu.events import HostStats

if sys.platform != "win32":
    import resource

_BEAT_SECONDS = 0.02  # between two looks of the thread that sleeps
_HELD_SECONDS = 0.05  # a sleep so much longer than asked for is no scheduler's rounding
_GPU_EVERY_SECONDS = 1.0
_TASKS_EVERY = 16  # readings between two looks for new threads
_KEPT = 100_000  # readings, of half an hour: a longer step gets the share of it that they cover
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of `ru_maxrss`'s unit
# Reasons for a lower clock, nvml.h's nvmlClocksThrottleReason*; idle and application settings are no throttling.
_NVML_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "temperature",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


@dataclass
class _Gpu:
    """The newest figures of a GPU; NaN and "" where unknown."""

    clock_mhz: float = math.nan
    temperature_c: float = math.nan
    power_w: float = math.nan
    throttle: str = ""


class HostSampler:
    """Reads the host's counters over time. Use as a context manager: its thread ends with it."""

    def __init__(self, gpu: str = "") -> None:
        """`gpu` is the name of the GPU whose clock is asked for, where its driver tells; "" asks none."""
        self._stat = _opened("/proc/stat")
        self._tasks: dict[str, list[int]] = {}  # by thread: its open file, and the nanoseconds last read there
        self._samples = 0
        self._read_gpu = _gpu_reader(gpu)
        self._gpu = _Gpu()
        self._delay = 0.0
        self._peak = 0
        self._held = 0.0  # seconds, written by the thread only
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="host-stats", daemon=True)
        self._lock = threading.Lock()
        self._readings: deque[tuple[float, ...]] = deque(maxlen=_KEPT)  # nanoseconds since the epoch, then counters
        self._read()

    def __enter__(self) -> HostSampler:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join(1.0)
        for fd in (*(task[0] for task in self._tasks.values()), *([] if self._stat is None else [self._stat])):
            os.close(fd)
        self._tasks, self._stat = {}, None

    def between(self, start_ns: int, end_ns: int) -> HostStats:
        """Figures of an interval that has passed, nanoseconds since the epoch; earlier readings are forgotten.

        Between two readings counters are taken to rise evenly.
        """
        if self._readings[-1][0] < end_ns:
            self._read()
        with self._lock:
            while len(self._readings) > 2 and self._readings[1][0] <= start_ns:
                self._readings.popleft()
            start, end = self._at(start_ns), self._at(end_ns)
        cpu, delay, machine, held, major, waited, preempted = (max(b - a, 0.0) for a, b in zip(start, end, strict=True))
        gpu = self._gpu
        return HostStats(
            cpu_seconds=cpu,
            run_delay_seconds=delay if self._tasks else math.nan,
            held_seconds=held,
            others_cpu_seconds=max(machine - cpu, 0.0) if self._stat is not None else math.nan,
            major_faults=round(major),
            voluntary_switches=round(waited),
            involuntary_switches=round(preempted),
            peak_resident_bytes=self._peak,
            gpu_clock_mhz=gpu.clock_mhz,
            gpu_temperature_c=gpu.temperature_c,
            gpu_power_w=gpu.power_w,
            gpu_throttle=gpu.throttle,
        )

    def _at(self, time_ns: int) -> list[float]:
        """The counters at a time, between the two readings around it."""
        for index in range(len(self._readings) - 1, 0, -1):  # most are about now
            if self._readings[index - 1][0] <= time_ns:
                break
        else:
            return list(self._readings[0][1:])
        before, after = self._readings[index - 1], self._readings[index]
        share = min((time_ns - before[0]) / max(after[0] - before[0], 1), 1.0)
        return [a + share * (b - a) for a, b in zip(before[1:], after[1:], strict=True)]

    def _read(self) -> None:
        with self._lock:
            self._readings.append((time.time_ns(), *self._counters()))

    def _counters(self) -> tuple[float, ...]:
        switches = (0, 0, 0)
        if sys.platform != "win32":
            usage = resource.getrusage(resource.RUSAGE_SELF)
            switches = (usage.ru_majflt, usage.ru_nvcsw, usage.ru_nivcsw)
            self._peak = usage.ru_maxrss * _MAXRSS_UNIT
        return (time.process_time(), self._run_delay(), self._machine_cpu(), self._held, *map(float, switches))

    def _run_delay(self) -> float:
        """Seconds that this process's threads were ready to run and did not, summed; never falls."""
        if self._samples % _TASKS_EVERY == 0:
            self._find_tasks()
        self._samples += 1
        for name, task in list(self._tasks.items()):
            try:
                told = int(_read(task[0], 100).split()[1])
            except (OSError, IndexError, ValueError):  # the thread has ended
                os.close(self._tasks.pop(name)[0])
                continue
            self._delay += max(told - task[1], 0) / 1e9
            task[1] = told
        return self._delay

    def _find_tasks(self) -> None:
        with contextlib.suppress(OSError):
            for task in set(os.listdir("/proc/self/task")) - self._tasks.keys():
                fd = _opened(f"/proc/self/task/{task}/schedstat")
                if fd is not None:
                    self._tasks[task] = [fd, 0]

    def _machine_cpu(self) -> float:
        """Processor seconds that the machine has spent, all programs together."""
        if self._stat is None:
            return 0.0
        # cpu user nice system idle iowait irq softirq steal guest guest_nice, in clock ticks; guests are in user
        _, user, nice, system, _, _, irq, softirq, steal = _read(self._stat, 256).split(None, 9)[:9]
        return sum(map(int, (user, nice, system, irq, softirq, steal))) / _ticks_per_second()

    def _beat(self) -> None:
        """Sleep and see how much longer it took. CLOCK_BOOTTIME also counts the time that a machine sleeps."""
        asked_at = -math.inf
        while not self._stop.is_set():
            before = _now()
            if before - asked_at >= _GPU_EVERY_SECONDS and self._read_gpu is not None:
                asked_at = before
                with contextlib.suppress(Exception):  # a driver that stops answering is no reason to stop training
                    self._gpu = self._read_gpu()
                before = _now()
            self._stop.wait(_BEAT_SECONDS)
            late = _now() - before - _BEAT_SECONDS
            if late > _HELD_SECONDS:
                self._held += late
            self._read()


def _read(descriptor: int, nbytes: int) -> bytes:
    """The beginning of a file of the system's, which only Linux has."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, nbytes)


def _ticks_per_second() -> int:
    if sys.platform == "win32":
        return 100
    else:
        return os.sysconf("SC_CLK_TCK")


def _now() -> float:
    """Seconds, of a sleeping machine too where the system counts them."""
    if sys.platform == "win32":
        return time.monotonic()
    else:
        return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _opened(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return None


def _gpu_reader(name: str) -> Callable[[], _Gpu] | None:
    """What reads the figures of the GPU called `name`, or None where nothing tells of it."""
    if not name:
        return None
    with contextlib.suppress(Exception):  # no driver of NVIDIA's, or one too old
        import pynvml

        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            told = pynvml.nvmlDeviceGetName(handle)
            if told in name or name in told:
                return lambda: _read_nvml(pynvml, handle)
    for folder in glob.glob("/sys/class/drm/card*/device/hwmon/hwmon*"):
        if "AMD" in name.upper() or "RADEON" in name.upper():
            return lambda: _read_amdgpu(Path(folder))
    return None


def _read_nvml(pynvml: Any, handle: Any) -> _Gpu:
    reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    return _Gpu(
        clock_mhz=float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        temperature_c=float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        power_w=pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        throttle=", ".join(text for bit, text in _NVML_REASONS.items() if reasons & bit),
    )


def _read_amdgpu(folder: Path) -> _Gpu:
    """docs.kernel.org/gpu/amdgpu/thermal.html: Hz, millidegrees, microwatts."""

    def figure(file: str, unit: float) -> float:
        try:
            return int((folder / file).read_text()) / unit
        except (OSError, ValueError):
            return math.nan

    return _Gpu(figure("freq1_input", 1e6), figure("temp1_input", 1e3), figure("power1_average", 1e6))
