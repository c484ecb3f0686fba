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


def test_cpu_time_is_that_since_the_last_sample() -> None:
    with HostSampler() as sampler:
        begin = time.process_time()
        while time.process_time() - begin < 0.1:
            pass
        assert 0.09 <= sampler.sample().cpu_seconds <= 0.5
        assert sampler.sample().cpu_seconds < 0.05


@linux
def test_a_stopped_process_was_held_up() -> None:
    """SIGSTOP for a second: no counter of the kernel has it, the thread that sleeps does."""
    program = textwrap.dedent(
        """
        import sys, time
        from entrenar_gpu.train.host_stats import HostSampler
        with HostSampler() as sampler:
            time.sleep(0.3)
            quiet = sampler.sample().held_seconds
            print("ready", flush=True)
            sys.stdin.readline()
            print(quiet, sampler.sample().held_seconds, flush=True)
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
        sampler.sample()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_a_sample_is_cheap() -> None:
    with HostSampler() as sampler:
        times = []
        for _ in range(200):
            begin = time.perf_counter()
            sampler.sample()
            times.append(time.perf_counter() - begin)
    assert sorted(times)[100] < 1e-3  # 20 to 50 µs; a millisecond would show in small steps
