"""What a training step does to the device: replay. And that a plan's bytes are those that are allocated."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu.gpu.device import Device
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import config_of
from tests.helpers.tiny import make_data, make_model

pytestmark = pytest.mark.gpu

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("replay")
    make_model(path / "model", **TINY)
    make_data(path / "train.jsonl", vocab=96)
    return path


def count_calls(monkeypatch: pytest.MonkeyPatch, device: Device) -> Counter[str]:
    """Counts every call that makes a GPU object or brings bytes to the host, from now on."""
    calls: Counter[str] = Counter()

    def watch(kind: Any, name: str) -> None:
        original = getattr(kind, name)

        def counted(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(kind, name, counted)

    handle = type(device.handle)
    makers = [n for n in dir(handle) if n.startswith("create_") and n != "create_command_encoder"]
    assert {"create_buffer", "create_bind_group", "create_compute_pipeline", "create_shader_module"} <= set(makers)
    for name in makers:
        watch(handle, name)
    for name in ("read_buffer", "read_texture"):
        watch(type(device.handle.queue), name)
    watch(type(device.engine), "read_after")
    return calls


@pytest.mark.parametrize("options", [{"accumulate": 2, "dropout": 0.1}, {"method": "full"}], ids=["qlora", "full"])
def test_ten_steps_make_no_gpu_object_and_read_back_one_report_each(folder, tmp_path, device, monkeypatch, options):
    trainer = Trainer(config_of(folder, str(tmp_path / "run"), steps=12, **options), kernels=KernelCache(device))
    steps = trainer.steps()
    next(steps)
    calls, allocated = count_calls(monkeypatch, device), device.allocated_bytes
    for _ in range(10):
        next(steps)
    assert device.allocated_bytes == allocated
    assert calls == {"read_after": 10}
    size = max(b for name, b in trainer.session.plan.buffers.items() if name.startswith("report."))
    assert size < 16384  # scalars, and the GPU's clock readings
    trainer.session.close()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "full", "eval": True},
        {"accumulate": 3, "dropout": 0.1, "trace_level": "kernel"},
        {"optimizer": "sgd"},
    ],
    ids=str,
)
def test_the_plan_counts_every_byte_that_is_allocated(folder, tmp_path, kernels, options):
    options = dict(options)
    if options.pop("eval", False):
        options["eval_data"] = str(folder / "train.jsonl")
    before = kernels.device.allocated_bytes
    trainer = Trainer(config_of(folder, str(tmp_path / "run"), steps=3, **options), kernels=kernels)
    peak = trainer.session.plan.peak_bytes
    assert kernels.device.allocated_bytes - before == peak
    for _ in trainer.steps():
        assert kernels.device.allocated_bytes - before == peak
    assert kernels.device.allocated_bytes - before == peak
    trainer.session.close()
    assert kernels.device.allocated_bytes == before


def test_losses_arrive_one_step_late(folder, tmp_path, kernels, monkeypatch):
    """While the device is at a step, the host prepares the next: its batch is made before the loss is waited for."""
    trainer = Trainer(config_of(folder, str(tmp_path / "run"), steps=4), kernels=kernels)
    order: list[str] = []
    launch, land = trainer._launch, trainer._land
    monkeypatch.setattr(trainer, "_launch", lambda n: (order.append(f"launch {n}"), launch(n))[1])
    monkeypatch.setattr(trainer, "_land", lambda f: (order.append(f"land {f.number}"), land(f))[1])
    list(trainer.steps())
    trainer.session.close()
    assert order == ["launch 1", "launch 2", "land 1", "launch 3", "land 2", "launch 4", "land 3", "land 4"]


def test_a_step_leaves_its_gradients_at_zero(folder, tmp_path, kernels):
    trainer = Trainer(config_of(folder, str(tmp_path / "run"), steps=1), kernels=kernels)
    list(trainer.steps())
    for name in trainer.session.trainable():
        assert not np.any(trainer.executor.read(f"{name}.grad"))
    assert trainer.executor.read("loss")[0] == 0
    trainer.session.close()
