"""What a training step does to the device: replay. And that a plan's bytes are those that are allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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


def order_of(trainer: Trainer, monkeypatch: Any, go: Callable[[], Any]) -> list[str]:
    """What was done to each step, by number."""
    order: list[str] = []
    steps = trainer._pipeline
    draw, launch, land = steps.draw, steps.launch, steps.land
    monkeypatch.setattr(steps, "draw", lambda n: (order.append(f"draw {n}"), draw(n))[1])
    monkeypatch.setattr(steps, "launch", lambda d: (order.append(f"launch {d.number}"), launch(d))[1])
    monkeypatch.setattr(steps, "land", lambda f: (order.append(f"land {f.drawn.number}"), land(f))[1])
    go()
    trainer.session.close()
    return order


def test_in_a_run_the_host_is_one_step_ahead(folder, tmp_path, kernels, monkeypatch):
    """While the device is at a step it has the next one already: a loss arrives one step late."""
    trainer = Trainer(config_of(folder, str(tmp_path / "run"), steps=3), kernels=kernels)
    order = order_of(trainer, monkeypatch, trainer.run)
    assert order == ["draw 1", "launch 1", "draw 2", "launch 2", "land 1", "draw 3", "launch 3", "land 2", "land 3"]


def test_in_a_loop_a_step_waits_for_the_body_and_its_batches_do_not(folder, tmp_path, kernels, monkeypatch):
    trainer = Trainer(config_of(folder, str(tmp_path / "run"), steps=3), kernels=kernels)
    order = order_of(trainer, monkeypatch, lambda: list(trainer.steps()))
    assert order == ["draw 1", "launch 1", "draw 2", "land 1", "launch 2", "draw 3", "land 2", "launch 3", "land 3"]


def test_a_step_leaves_its_gradients_at_zero(folder, tmp_path, kernels):
    trainer = Trainer(config_of(folder, str(tmp_path / "run"), steps=1), kernels=kernels)
    list(trainer.steps())
    for name in trainer.session.trainable():
        assert not np.any(trainer.executor.read(f"{name}.grad"))
    assert trainer.executor.read("loss")[0] == 0
    trainer.session.close()
