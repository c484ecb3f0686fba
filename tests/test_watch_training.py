"""A real training with a real sleep in its data loader and a real slow disk write: explained live and afterwards."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import observability
from entrenar_gpu import checkpoint
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.kernel import KernelCache
from entrenar_gpu.train import Trainer
from observability import report
from observability.live import LiveDetector
from tests.tiny import make_data, make_model

STALLED, SAVED, STEPS = 50, 64, 80
STALL_SECONDS, DISK_SECONDS = 1.5, 1.5


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
    trainer.observe(observability.observe(config.output, level="layer"), LiveDetector(emit=lines.append))
    _sleep_before(trainer, STALLED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_result", _slow_at(SAVED, checkpoint.save_result))
        trainer.run()
    trainer.session.close()
    return folder / "run", lines


def _sleep_before(trainer: Trainer, step: int) -> None:
    """The batches of `step` come late, as from a slow disk or network."""
    batches, count = trainer.batches, iter(range(1, STEPS + 2))

    class Late:
        def __next__(self) -> Any:
            if next(count) == step:
                time.sleep(STALL_SECONDS)
            return next(batches)

        def state(self) -> Any:
            return batches.state()

    trainer.batches = Late()  # type: ignore[assignment]


def _slow_at(step: int, save: Any) -> Any:
    def slow(session: Any, folder: Path) -> None:
        if str(step) in folder.name:
            time.sleep(DISK_SECONDS)
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
    assert report.main([str(folder), "--json", str(out)]) == 0
    told = json.loads(out.read_text())
    assert told["steps"] == STEPS
    causes = {a["step"]: a["cause"] for a in told["anomalies"] if a["severity"] in ("medium", "high")}
    assert causes.get(STALLED) == "data-stall", told["anomalies"]
    assert causes.get(SAVED) == "checkpoint-stall", told["anomalies"]
    stall = next(a for a in told["anomalies"] if a["step"] == STALLED)
    assert stall["duration_seconds"] >= 0.8 * STALL_SECONDS
