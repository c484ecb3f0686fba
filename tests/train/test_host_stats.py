"""What the host did while a step ran: counted where it happened, and cheap."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from entrenar_gpu.train.host_stats import HostSampler

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


def test_cpu_time_is_that_of_the_interval() -> None:
    with HostSampler() as sampler:
        start, begin = time.time_ns(), time.process_time()
        while time.process_time() - begin < 0.2:
            pass
        middle = time.time_ns()
        time.sleep(0.2)
        end = time.time_ns()
        busy, idle = sampler.between(start, middle), sampler.between(middle, end)
    assert 0.15 <= busy.cpu_seconds <= 0.5
    assert idle.cpu_seconds < 0.5 * busy.cpu_seconds


@linux
def test_a_stopped_process_was_held_up() -> None:
    """SIGSTOP for a second: no counter of the kernel has it, the thread that sleeps does."""
    program = textwrap.dedent(
        """
        import sys, time
        from entrenar_gpu.train.host_stats import HostSampler
        with HostSampler() as sampler:
            start = time.time_ns()
            time.sleep(0.3)
            middle = time.time_ns()
            print("ready", flush=True)
            sys.stdin.readline()
            quiet, held = sampler.between(start, middle), sampler.between(middle, time.time_ns())
            print(quiet.held_seconds, held.held_seconds, flush=True)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(child.pid, signal.SIGCONT)
        time.sleep(0.2)
        quiet, held = map(float, child.communicate("\n")[0].split())
    assert held >= 0.8
    assert quiet <= 0.5 * held


@linux
def test_nothing_stays_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with HostSampler() as sampler:
        sampler.between(0, time.time_ns())
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_step_pays_little() -> None:
    with HostSampler() as sampler:
        times = []
        for _ in range(200):
            begin, now = time.perf_counter(), time.time_ns()
            sampler.between(now - 10**8, now)
            times.append(time.perf_counter() - begin)
    assert sorted(times)[100] < 2e-3  # some 0.1 ms; more would show in small steps
