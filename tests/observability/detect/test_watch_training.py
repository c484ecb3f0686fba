"""A real training with a real sleep in its data loader and a real slow disk write: explained live and afterwards."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import observability
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.train import run_checkpoint
from entrenar_gpu.train.trainer import Trainer
from observability.detect.live import LiveDetector
from observability.report import command
from tests.helpers.tiny import make_data, make_model

STALLED, SAVED, STEPS = 50, 64, 80
LEAST_SECONDS = 1.5
# A fault stands out by its size against the machine's own noise: so many times the longest step, and the longest write,
# that came before it. 0.7 of such an excess is the most that one sigma of steps can be, and 4 are an alarm.
STALL_FACTOR = 4.0
DISK_FACTOR = 16.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, kernels: KernelCache) -> tuple[Path, list[str]]:
    """(run folder, lines told live) of a training whose loader slept before one step, and whose disk was slow once."""
    folder = tmp_path_factory.mktemp("watched")
    model, data = make_model(folder / "model"), make_data(folder / "train.jsonl", samples=64)
    config = TrainConfig(
        model=str(model), data=str(data), output=str(folder / "run"), steps=STEPS, batch=2, seq=48, rank=4,
        save_every=SAVED // 8,
    )  # fmt: skip
    lines: list[str] = []
    trainer = Trainer(config, kernels=kernels)
    longest = Longest()
    trainer.observe(observability.observe(config.output, level="layer"), LiveDetector(emit=lines.append), longest)
    _sleep_before(trainer, STALLED, longest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_checkpoint, "save_result", _slow_at(SAVED, run_checkpoint.save_result, longest))
        trainer.run()
    trainer.session.close()
    return folder / "run", lines


class Longest:
    """Observer that knows the longest step after the first few, which compile, and the longest write; seconds."""

    step = checkpoint = 0.0

    def step_finished(self, record: Any) -> None:
        if record.step > 3:
            self.step = max(self.step, (record.end_ns - record.start_ns) / 1e9)

    def checkpoint_saved(self, record: Any) -> None:
        self.checkpoint = max(self.checkpoint, (record.end_ns - record.start_ns) / 1e9)


def _sleep_before(trainer: Trainer, step: int, longest: Longest) -> None:
    """The batches of `step` come late, as from a slow disk or network."""
    batches, count = trainer.batches, iter(range(1, STEPS + 2))

    class Late:
        def __next__(self) -> Any:
            if next(count) == step:
                time.sleep(max(LEAST_SECONDS, STALL_FACTOR * longest.step))
            return next(batches)

        def state(self) -> Any:
            return batches.state()

    trainer._pipeline._batches = Late()


def _slow_at(step: int, save: Any, longest: Longest) -> Any:
    def slow(session: Any, folder: Path) -> None:
        if str(step) in folder.name:
            time.sleep(max(LEAST_SECONDS, DISK_FACTOR * longest.checkpoint))
        save(session, folder)

    return slow


@pytest.mark.gpu
def test_told_live(run: tuple[Path, list[str]]) -> None:
    _, lines = run
    assert any(line.startswith(f"step {STALLED}:") and "data" in line for line in lines), lines
    assert any(f"step {SAVED}" in line and "checkpoint" in line for line in lines), lines


@pytest.mark.gpu
def test_explained_afterwards(run: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = run
    out = tmp_path / "report.json"
    assert command.main([str(folder), "--json", str(out)]) == 0
    told = json.loads(out.read_text())
    assert told["steps"] == STEPS
    causes = {a["step"]: a["cause"] for a in told["anomalies"] if a["severity"] in ("medium", "high")}
    assert causes.get(STALLED) == "data-stall", told["anomalies"]
    assert causes.get(SAVED) == "checkpoint-stall", told["anomalies"]
    stall = next(a for a in told["anomalies"] if a["step"] == STALLED)
    assert stall["duration_seconds"] >= 0.8 * LEAST_SECONDS
