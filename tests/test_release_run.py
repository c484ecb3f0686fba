"""What the first release left on disks (golden/make_release_run.py) goes on, loads and reads with today's code."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from entrenar_gpu.adapters import load_adapter
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import SafetensorsFile
from entrenar_gpu.gpu.autotune import read_cache
from entrenar_gpu.model import HFCheckpoint
from entrenar_gpu.session import WeightCache
from entrenar_gpu.train.run_checkpoint import load_run, read_state
from entrenar_gpu.train.trainer import Trainer
from observability import report
from tests import ROOT

RELEASE = ROOT / "tests" / "golden" / "release_run"
CONTINUED: dict[str, list[list[float]]] = json.loads((RELEASE / "continuation.json").read_text())
CHECKPOINT = "checkpoint-000006"


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    """A copy of the release's folders, which name each other relative to where they lie."""
    shutil.copytree(RELEASE, tmp_path / "release")
    monkeypatch.chdir(tmp_path / "release")
    return tmp_path / "release"


def resumed(run: str, **options: Any) -> TrainConfig:
    """The options of a run as its run.json keeps them, to go on from its checkpoint on NumPy."""
    saved = json.loads(Path(run, "run.json").read_text())["config"]
    config = TrainConfig.from_mapping(saved, f"{run}/run.json")
    paths = {"output": "continued", "resume": f"{run}/{CHECKPOINT}", "device": "numpy"}
    return replace(config, tune=False, steps=CONTINUED[run][-1][0], **(paths | options))


@pytest.mark.parametrize("run", CONTINUED)
def test_checkpoints_go_on(there, run):
    """Losses as the release itself made them. Sums of another BLAS may end in other digits."""
    trainer = Trainer(resumed(run, cache=False))
    made = [[record.step, record.loss, record.grad_norm] for record in trainer.steps()]
    trainer.session.close()
    np.testing.assert_allclose(made, CONTINUED[run], rtol=1e-6)


@pytest.mark.parametrize("run", CONTINUED)
def test_tensors_of_a_checkpoint_arrive_bit_equal(there, run):
    trainer = Trainer(resumed(run, cache=False))
    session, folder = trainer.session, there / run / CHECKPOINT
    load_run(session, read_state(folder))
    stored = load_file(folder / "optimizer.safetensors")
    if run == "full":
        stored |= load_file(folder / "model.safetensors")
        stored["model.embed_tokens.weight.shard0"] = stored.pop("model.embed_tokens.weight")
    else:
        held = load_file(folder / "adapter_model.safetensors")
        stored |= {name.removeprefix("base_model.model."): values for name, values in held.items()}
    assert session.trainable().keys() <= stored.keys()
    for name, values in stored.items():
        np.testing.assert_array_equal(session.executor.read(name), values, err_msg=name)
    session.close()


def test_the_checkpoint_of_another_model_is_still_told(there):
    path = there / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))
    with pytest.raises(UserError, match=r"trainer_state.json: the checkpoint of another model than model"):
        list(Trainer(resumed("qlora", cache=False)).steps())


def test_adapters_load(there):
    spec, values = load_adapter(there / "qlora", HFCheckpoint.open(there / "model").config)
    stored = load_file(there / "qlora/adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in spec.shapes()} == stored.keys()
    assert {module.rank for module in spec.modules.values()} == {2}
    for name, array in values.items():
        np.testing.assert_array_equal(array, stored[f"base_model.model.{name}"])


def test_quantised_weights_are_taken_or_made_again(there):
    """Under the path and times that the release saw; either way they are the bits of a fresh start."""
    (kept,) = (there / "weights").iterdir()
    ((_, _, changed),) = json.loads(SafetensorsFile(kept).metadata["sources"])
    os.utime(there / "model/model.safetensors", ns=(changed, changed))
    cache = WeightCache(HFCheckpoint.open(there / "model"), True, there / "weights")
    kept.rename(cache.path)
    trainer = Trainer(resumed("qlora"))
    used, session = trainer.session.weights_from, trainer.session
    assert used == str(Path("weights") / cache.path.name) or used.startswith("checkpoint; quantised weights kept in")
    taken = {n: session.executor.read(n) for n, t in session.executor.tensors.items() if t.role == "weight"}
    session.close()
    fresh = Trainer(resumed("qlora", cache=False)).session
    for name, values in taken.items():
        np.testing.assert_array_equal(values, fresh.executor.read(name), err_msg=name)
    fresh.close()


def test_measured_tiles_are_read(there):
    """From the cache, unless their version is another, and from the checkpoint."""
    (path,) = (there / "caches/entrenar-gpu/tiles").iterdir()
    held = json.loads(path.read_text())
    wanted = {name: tuple(numbers) for name, numbers in held["tiles"].items()}
    assert read_cache(path) in (wanted, {})
    assert read_state(there / "qlora" / CHECKPOINT).tiles.items() <= wanted.items()


def test_the_report_reads_the_trace(there, capsys):
    assert report.main([str(there / "qlora"), "--json", str(there / "report.json")]) == 0
    assert "6 steps" in capsys.readouterr().out
