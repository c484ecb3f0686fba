"""Devices that run out of memory or go away: really so on a software GPU, under the system's limit of a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from entrenar_gpu.errors import DeviceLost, OutOfDeviceMemory
from entrenar_gpu.gpu.device import Device
from entrenar_gpu.gpu.failures import meaning
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.train.trainer import Trainer
from tests import ROOT
from tests.helpers.runs import config_of, train
from tests.helpers.tiny import make_data, make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}

# Leaves so many MiB of addresses from a moment on: before the device is opened, or before its first buffer.
LIMITED = """
import resource, sys
moment, mebibytes, *command = sys.argv[1:]
from entrenar_gpu.cli import main
from entrenar_gpu.gpu import device

limited_to = []

def limit():
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limited_to[:] = limited_to or [held + (int(mebibytes) << 20)]
    resource.setrlimit(resource.RLIMIT_AS, (limited_to[0],) * 2)

def before(owner, name):
    real = getattr(owner, name)
    def limited(*arguments, **options):
        limit()
        return real(*arguments, **options)
    setattr(owner, name, limited)

before(*{"open": (device, "_request"), "buffers": (device.Device, "buffer")}[moment])
sys.exit(main.run(command))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("failures")
    make_model(path / "model", **TINY)
    make_data(path / "train.jsonl", vocab=96)
    return path


@pytest.mark.gpu
@pytest.mark.skipif(sys.platform != "linux", reason="limits the process by /proc and RLIMIT_AS")
@pytest.mark.parametrize(("moment", "mebibytes"), [("open", 500), ("open", 200), ("buffers", 8)])
def test_memory_that_runs_out_is_one_line_with_what_to_lower(folder, tmp_path, device, moment, mebibytes):
    if not device.caps.software:
        pytest.skip("a card has memory of its own")
    paths = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--output", str(tmp_path / "run")]
    shape = ["--steps", "3", "--batch", "64", "--seq", "512", "--quiet"]
    command = [sys.executable, "-c", LIMITED, moment, str(mebibytes), "train", *paths, *shape]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert any(words in lines[0] for words in ("no memory left", "MiB left for", "has run out"))
    assert any(words in lines[0] for words in ("lower --", "ulimit -v"))


# The first buffers fit, what a write needs on the way does not.
SUBMITS = """
import resource, sys
import numpy as np
from entrenar_gpu.errors import OutOfDeviceMemory
from entrenar_gpu.gpu import Device
device = Device.open(engine="wgpu")
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (200 << 20),) * 2)
buffers = []
try:
    while True:
        buffers.append(device.buffer(48 << 20, "a part"))
except OutOfDeviceMemory:
    pass
data = np.zeros(48 << 20, np.uint8)
try:
    for _ in range(20):
        device.write(buffers[0], data)
        device.read(buffers[0], 0, 4)
except OutOfDeviceMemory as error:
    print(error)
"""


@pytest.mark.gpu
@pytest.mark.skipif(sys.platform != "linux", reason="limits the process by /proc and RLIMIT_AS")
def test_memory_that_runs_out_on_the_way_to_the_device_is_no_lost_device(device):
    """wgpu only logs it, and says of the next call that the device is lost."""
    if not device.caps.software:
        pytest.skip("a card has memory of its own")
    command = [sys.executable, "-c", SUBMITS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "has no memory left; lower --memory-budget" in done.stdout, done.stderr
    assert "LOST" not in done.stderr


class GPUError(Exception):
    """As every WebGPU library has one."""


class GPUOutOfMemoryError(GPUError):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (GPUOutOfMemoryError("no"), OutOfDeviceMemory),
        (GPUError("Validation Error\n\nCaused by:\n  Not enough memory left."), OutOfDeviceMemory),
        (RuntimeError("VK_ERROR_OUT_OF_DEVICE_MEMORY"), OutOfDeviceMemory),
        (RuntimeError("a buffer could not be mapped: Parent device is lost"), DeviceLost),
        (GPUError("Device lost"), DeviceLost),
        (GPUError("the binding is too large"), None),
    ],
)
def test_what_an_error_means(error, kind):
    told = meaning(error, "Voodoo 2")
    assert type(told) is (type(None) if kind is None else kind)
    assert told is None or "Voodoo 2" in str(told)


def test_a_shader_that_mentions_loss_is_a_fault_of_ours():
    error = RuntimeError("shader x does not compile: bad\n 1 var lost = 1;")
    error.__cause__ = GPUError("bad")
    assert meaning(error, "a GPU") is None


@pytest.mark.gpu
@pytest.mark.parametrize("moment", ["planned", "loading", "steps"])
def test_a_device_lost_while_a_run_is_set_up_is_one_line(folder, tmp_path, monkeypatch, moment):
    """Which says that there is no checkpoint; resumed, which one stands."""
    opened: list[Device] = []

    def losing(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def lost(self: Any, *arguments: Any, **options: Any) -> Any:
            opened[-1].handle.destroy()
            return real(self, *arguments, **options)

        monkeypatch.setattr(owner, name, lost)

    def attempt(**options: Any) -> str:
        opened.append(Device.open())
        with pytest.raises(DeviceLost, match="was lost") as caught:
            Trainer(config_of(folder, str(tmp_path / "run"), steps=3, **options), kernels=KernelCache(opened[-1])).run()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    from entrenar_gpu.session.session import Session
    from entrenar_gpu.train.step_pipeline import StepPipeline

    owners = {"planned": (Replay, "__init__"), "loading": (Session, "_load"), "steps": (StepPipeline, "launch")}
    losing(*owners[moment])
    assert attempt().endswith("; there is no checkpoint yet")
    monkeypatch.undo()
    train(folder, str(tmp_path / "run"), device="numpy", steps=2)
    losing(*owners[moment])
    assert attempt(resume="latest").endswith(f"; the last checkpoint stands: {tmp_path / 'run/checkpoint-000002'}")
