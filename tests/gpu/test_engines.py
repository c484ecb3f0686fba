"""Which engine is taken, and what is said where one cannot be: on made-up wheels and GPUs."""

from __future__ import annotations

import importlib.metadata
import json
import os
from types import SimpleNamespace
from typing import Any

import pytest

from entrenar_gpu import cli
from entrenar_gpu.errors import UserError
from entrenar_gpu.gpu import choice
from entrenar_gpu.gpu.choice import Gpu, is_useful
from entrenar_gpu.gpu.engines import Dawn, WgpuNative, engine
from entrenar_gpu.gpu.engines.dawn import installed_version
from entrenar_gpu.graph import MatrixConfig
from entrenar_gpu.train.run_checkpoint import STATE_FILE
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import config_of
from tests.helpers.tiny import make_data, make_model

F16 = MatrixConfig("f16", "f32", 16, 16, 16, 32, 32)
F16_SUMS = MatrixConfig("f16", "f16", 16, 16, 16, 32, 32)


class Adapter:
    def __init__(self, name: str, device_id: int = 1, kind: str = "DiscreteGPU") -> None:
        info = {"device": name, "adapter_type": kind, "backend_type": "Vulkan", "vendor": "", "description": ""}
        self.info = {**info, "vendor_id": 0x10DE, "device_id": device_id}


class Stand:
    """Stands in for an engine: its name, and the matrices of its GPUs by their id."""

    def __init__(self, name: str, matrices: dict[int, MatrixConfig]) -> None:
        self.name, self._matrices = name, matrices

    def matrix_configs(self, adapter: Adapter) -> tuple[MatrixConfig, ...]:
        config = self._matrices.get(adapter.info["device_id"])
        return () if config is None else (config,)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that the engines see these GPUs; `theirs` None: Dawn is not installed."""
    monkeypatch.delenv("ENTRENAR_DEVICE", raising=False)
    monkeypatch.delenv("ENTRENAR_ENGINE", raising=False)

    def install(ours: list[Adapter], theirs: list[Adapter] | None, matrices: MatrixConfig | None = F16) -> None:
        granted = {} if matrices is None else {1: matrices}
        stands = {"wgpu": Stand("wgpu", {}), "dawn": Stand("dawn", granted)}
        listed = {"wgpu": ours, "dawn": theirs}

        def gpus(name: str) -> tuple[Gpu, ...]:
            found = listed[name]
            if found is None:
                raise UserError("wgpudawn is not installed; pip install 'entrenar-gpu[dawn]'")
            return tuple(Gpu(stands[name], adapter) for adapter in found)  # type: ignore[arg-type]

        rows = {name: gpus(name) for name in listed if listed[name] is not None}
        monkeypatch.setattr(choice, "gpus", lambda name: rows[name] if name in rows else gpus(name))

    return install


def chosen(*arguments: Any) -> tuple[str, str, str]:
    made = choice.choose_gpu(*arguments)
    return made.gpu.engine.name, made.gpu.info["device"], made.why


def test_auto_takes_dawn_where_it_grants_matrix_units(machine: Any) -> None:
    machine([Adapter("H200")], [Adapter("NVIDIA H200")])
    assert chosen() == ("dawn", "NVIDIA H200", "it grants matrix units")
    machine([Adapter("H200")], [Adapter("H200")], None)
    assert chosen() == ("wgpu", "H200", "Dawn grants no matrix units here")
    machine([Adapter("H200")], [Adapter("H200")], F16_SUMS)  # too coarse to train with
    assert chosen()[0] == "wgpu"
    machine([Adapter("H200")], [])
    assert chosen() == ("wgpu", "H200", "Dawn does not offer this GPU")
    machine([Adapter("H200")], None)
    assert chosen() == ("wgpu", "H200", "wgpudawn is not installed; pip install 'entrenar-gpu[dawn]'")


def test_auto_takes_dawn_where_wgpu_finds_nothing(machine: Any) -> None:
    machine([], [Adapter("H200")], None)
    assert chosen() == ("dawn", "H200", "wgpu finds no GPU")
    machine([], [])
    with pytest.raises(UserError, match="no Vulkan, Metal or DX12 GPU"):
        choice.choose_gpu()


def test_the_same_card_is_taken_through_either_engine(machine: Any) -> None:
    """An index means the same whichever engine is taken; the second of two equal cards is out of Dawn's reach."""
    cards = [Adapter("A", 2), Adapter("B", 1), Adapter("B", 1)]
    machine(cards, [Adapter("B", 1), Adapter("A", 2)])
    assert chosen("1")[:2] == ("dawn", "B")
    assert chosen("2") == ("wgpu", "B", "Dawn does not offer this GPU")
    assert chosen("0")[:2] == ("wgpu", "A")


def test_engines_by_flag_and_variable(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine([Adapter("H200")], [Adapter("H200")])
    assert chosen(None, "wgpu")[0] == "wgpu"
    monkeypatch.setenv("ENTRENAR_ENGINE", "wgpu")
    assert chosen()[0] == "wgpu"
    assert chosen(None, "dawn")[0] == "dawn"
    monkeypatch.setenv("ENTRENAR_ENGINE", "metal")
    with pytest.raises(UserError, match="ENTRENAR_ENGINE 'metal': choose from auto, wgpu, dawn"):
        choice.choose_gpu()
    machine([Adapter("H200")], None)
    with pytest.raises(UserError, match="--engine dawn: wgpudawn is not installed"):
        choice.choose_gpu(None, "dawn")


def test_exact_sums_alone_are_useful() -> None:
    kinds = [("f16", "f32"), ("i8", "i32"), ("f32", "f32"), ("f16", "f16"), ("u8", "u32")]
    useful = [is_useful(MatrixConfig(*kind, 16, 16, 16, 32, 32)) for kind in kinds]
    assert useful == [True, True, True, False, False]


@pytest.mark.parametrize("version", ["0.32.0.3", "0.31.5", "0.33", "0.33.0.1", "1.0"])
def test_a_wheel_that_is_too_old_or_too_new_gets_one_line(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(UserError, match=rf"wgpudawn {version} is installed, this release works with >=0\.32\.0\.4,<0"):
        installed_version()


@pytest.mark.parametrize("version", ["0.32.0.4", "0.32.0.11", "0.32.1"])
def test_wheels_in_range_are_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert installed_version() == version


def test_a_missing_wheel_is_one_line_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(choice, "engine", lambda name: {"wgpu": WgpuNative, "dawn": Dawn}[name]())
    monkeypatch.setattr(choice, "gpus", choice.gpus.__wrapped__)
    assert cli.run(["plan", "--model", "x", "--engine", "dawn", "--device", "0"]) == 2
    message = capsys.readouterr().err
    assert message == "error: --engine dawn: wgpudawn is not installed; pip install 'entrenar-gpu[dawn]'\n"


def test_bounds_are_checked_for_whole_devices_or_modules() -> None:
    """What shaders may rely on differs: where a whole device goes unchecked, those that are not trusted do too."""
    assert (WgpuNative.unchecked, Dawn.unchecked) == (False, True)


@pytest.mark.gpu
def test_a_checkpoint_tells_its_engine_and_a_resumed_run_says_what_differs(
    tmp_path: Any, kernels: Any, capsys: Any
) -> None:
    make_model(tmp_path / "model", num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=8, vocab_size=96)
    make_data(tmp_path / "train.jsonl", vocab=96)
    run = str(tmp_path / "run")
    Trainer(config_of(tmp_path, run, steps=2, device="numpy")).run()
    state = next((tmp_path / "run").glob("checkpoint-*")) / STATE_FILE
    assert json.loads(state.read_text())["engine"] == "numpy"
    Trainer(config_of(tmp_path, run, steps=3, resume="latest"), kernels=kernels).run()
    name = kernels.device.engine.name
    assert f"the run began on numpy and goes on on {name}" in capsys.readouterr().err
    newest = sorted((tmp_path / "run").glob("checkpoint-*"))[-1] / STATE_FILE
    assert json.loads(newest.read_text())["engine"] == name
    Trainer(config_of(tmp_path, run, steps=4, resume="latest"), kernels=kernels).run()
    assert "the run began" not in capsys.readouterr().err


def test_a_checkpoint_tells_its_arithmetic_and_a_resumed_run_says_what_differs(tmp_path: Any, capsys: Any) -> None:
    make_model(tmp_path / "model", num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=8, vocab_size=96)
    make_data(tmp_path / "train.jsonl", vocab=96)
    run = str(tmp_path / "run")
    Trainer(config_of(tmp_path, run, steps=1, device="numpy", precision="int8")).run()
    path = next((tmp_path / "run").glob("checkpoint-*")) / STATE_FILE
    state = json.loads(path.read_text())
    assert state.pop("arithmetic") == "int8"
    del state["checksum"]  # as before there was one
    for told, said in ((None, False), ("int8", False), ("int8_rows", True)):
        path.write_text(json.dumps(state | ({"arithmetic": told} if told else {})))
        options = {"steps": 2, "resume": str(path.parent), "device": "numpy", "precision": "int8"}
        Trainer(config_of(tmp_path, str(tmp_path / str(told)), **options)).close()
        assert ("were multiplied in int8_rows and go on in int8:" in capsys.readouterr().err) == said
    path.write_text(json.dumps(state | {"arithmetic": "int4"}))
    with pytest.raises(UserError, match="not the state of a training run"):
        Trainer(config_of(tmp_path, run, steps=2, resume="latest", device="numpy", precision="int8"))


@pytest.mark.gpu
def test_a_resumed_run_takes_the_engine_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is asked for, and it is there."""
    from entrenar_gpu.config import TrainConfig
    from entrenar_gpu.session import session

    asked: list[str | None] = []

    def opened(device: str | None, engine: str | None = None) -> str:
        asked.append(engine)
        if engine == "dawn":
            raise UserError("not installed")
        return str(engine)

    monkeypatch.setattr(session, "open_device", opened)
    monkeypatch.delenv("ENTRENAR_ENGINE", raising=False)
    assert session._opened(TrainConfig(), "wgpu") == "wgpu"
    assert session._opened(TrainConfig(), "dawn") == "None"
    assert asked == ["wgpu", "dawn", None]
    assert session._opened(TrainConfig(engine="wgpu"), "dawn") == "wgpu"
    monkeypatch.setenv("ENTRENAR_ENGINE", "wgpu")
    assert session._opened(TrainConfig(), "dawn") == "None"


def test_engines_are_loaded_once() -> None:
    assert engine("wgpu") is engine("wgpu")


def test_what_dawn_writes_about_adapters_that_it_leaves_out_is_kept_for_info(capfd: Any) -> None:
    """It goes past sys.stderr, at every start of every command."""

    def enumerate_adapters_sync() -> list[Any]:
        os.write(2, b"Warning: Vulkan something required.\n")
        return []

    dawn = Dawn.__new__(Dawn)  # the wheel need not be there
    dawn.api = SimpleNamespace(gpu=SimpleNamespace(enumerate_adapters_sync=enumerate_adapters_sync))
    dawn._extras = SimpleNamespace(set_instance_extras=lambda **_: None)
    assert dawn.adapters() == []
    assert dawn.said == "Warning: Vulkan something required.\n"
    assert capfd.readouterr().err == ""
