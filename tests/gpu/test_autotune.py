"""Runs with measured tiles: what was chosen is kept with checkpoints, and a resumed run measures nothing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from entrenar_gpu.cli.bench.gemm import forward
from entrenar_gpu.cli.bench.train import bench_train
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.gpu import autotune
from entrenar_gpu.ops.gemm.tiles import Choice, Tile, TileTable, from_numbers, to_numbers
from entrenar_gpu.train.run_checkpoint import STATE_FILE
from tests.helpers.runs import train
from tests.helpers.tiny import make_data, make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}
OPTIONS: dict[str, Any] = {"steps": 4, "save_every": 2, "tune": True}


@pytest.fixture
def measured(monkeypatch, tmp_path) -> list[str]:
    """Names of products in the order they were measured. Deep tiles win, which sizes alone would not choose."""
    names: list[str] = []

    def measure(device: Any, kernels: Any, product: Any, tiles: TileTable, check: bool, alone: bool) -> dict[str, Any]:
        ((name, numbers),) = tiles.items()
        names.append(name)
        tile = from_numbers(numbers).tile
        return {"seconds": tile.BM * tile.BN / tile.BK}

    monkeypatch.setattr(autotune, "measure", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return names


@pytest.mark.gpu
def test_a_resumed_run_keeps_its_tiles(measured, tmp_path, kernels, monkeypatch):
    make_model(tmp_path / "model", **TINY)
    make_data(tmp_path / "train.jsonl", vocab=96)
    whole = train(tmp_path, str(tmp_path / "whole"), kernels, **OPTIONS)
    saved = tmp_path / "whole/checkpoint-000002"
    tiles = json.loads((saved / STATE_FILE).read_text())["tiles"]
    assert set(tiles) == set(measured)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(autotune, "autotune", refuse)
    resumed = train(tmp_path, str(tmp_path / "resumed"), kernels, resume=str(saved), **OPTIONS)
    assert resumed == whole[2:]
    again = json.loads((tmp_path / "resumed/checkpoint-000004" / STATE_FILE).read_text())["tiles"]
    assert again == tiles


@pytest.mark.gpu
def test_nothing_is_measured_unasked(measured, tmp_path, kernels):
    make_model(tmp_path / "model", **TINY)
    make_data(tmp_path / "train.jsonl", vocab=96)
    train(tmp_path, str(tmp_path / "run"), kernels, **(OPTIONS | {"tune": False}))
    state = json.loads((tmp_path / "run/checkpoint-000002" / STATE_FILE).read_text())
    assert (state["tiles"], measured) == ({}, [])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "numbers",
    [[1, 2], [0] * 9, [64, 64, 16, 7, 8, 1, 1, 1, 0], [4, 4, 4, 4, 4, 1, 1, 1, 0], [float("inf")] * 9],
    ids=str,
)
def test_choices_that_were_never_made_are_measured_again(numbers, measured, tmp_path, kernels):
    make_model(tmp_path / "model", **TINY)
    make_data(tmp_path / "train.jsonl", vocab=96)
    train(tmp_path, str(tmp_path / "run"), kernels, **OPTIONS)
    path, first = autotune.cache_path(kernels.device), list(measured)
    whole = path.read_text()
    held = json.loads(whole)
    path.write_text(json.dumps(held | {"tiles": dict.fromkeys(held["tiles"], numbers)}))
    train(tmp_path, str(tmp_path / "again"), kernels, **OPTIONS)
    assert measured == 2 * first
    assert path.read_text() == whole


@pytest.mark.gpu
def test_a_cache_folder_that_cannot_be_made_is_said_before_measuring(measured, kernels, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(UserError, match=r"/dev/null/entrenar-gpu/tiles: cannot be written"):
        autotune.autotune(kernels.device, [forward(64, 64, "f32", 8)], kernels)
    assert measured == []


@pytest.mark.parametrize("tune", [True, False])
def test_bench_train_tunes_where_asked(tune, measured, monkeypatch):
    """Up to the plan, which is all that `bench train` does with tiles."""
    planned: list[TileTable] = []

    class Enough(Exception):
        pass

    def stop(device: Any, plan: Any, kernels: Any) -> None:
        planned.append(plan.options.tiles)
        raise Enough

    monkeypatch.setattr("entrenar_gpu.cli.bench.train.Replay", stop)
    with pytest.raises(Enough):
        bench_train("qwen3-0.6b", TrainConfig(batch=1, seq=64, tune=tune), 1)
    assert set(planned[0]) == set(measured)
    assert bool(measured) == tune


@pytest.mark.gpu
def test_tiles_of_a_larger_device_give_way_on_a_smaller_one(measured, tmp_path, kernels, limited_kernels):
    """A run goes on wherever it is resumed; with a tile that a workgroup cannot hold, no pipeline is made."""
    make_model(tmp_path / "model", **TINY)
    make_data(tmp_path / "train.jsonl", vocab=96)
    whole = train(tmp_path, str(tmp_path / "whole"), kernels, **OPTIONS)
    saved = tmp_path / "whole/checkpoint-000002"
    state = json.loads((saved / STATE_FILE).read_text())
    large = Choice(Tile(256, 128, 8, 16, 8, unroll=8, buffers=2))
    state["tiles"] = dict.fromkeys(state["tiles"], to_numbers(large))
    del state["checksum"]  # as a checkpoint of the first release, which has none
    (saved / STATE_FILE).write_text(json.dumps(state))
    resumed = train(tmp_path, str(tmp_path / "resumed"), limited_kernels, resume=str(saved), **OPTIONS)
    np.testing.assert_allclose(resumed, whole[2:], rtol=0, atol=1e-5)
