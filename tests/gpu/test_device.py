"""Which adapter is taken, and what is asked of it: on made-up adapters, so that every kind can be tried anywhere."""

from pathlib import Path
from typing import Any

import pytest

from entrenar_gpu.api import evaluate
from entrenar_gpu.cli import info
from entrenar_gpu.errors import UserError
from entrenar_gpu.gpu import choice, device
from entrenar_gpu.gpu.choice import Gpu
from entrenar_gpu.gpu.engines import engine
from tests.helpers.tiny import make_model

LIMITS = {
    "max-storage-buffer-binding-size": 2**31 - 1,
    "max-buffer-size": 2**40,
    "max-compute-workgroup-storage-size": 49152,
    "max-compute-invocations-per-workgroup": 1024,
    "max-compute-workgroup-size-x": 1024,
    "max-compute-workgroups-per-dimension": 65535,
    "max-storage-buffers-per-shader-stage": 16,
}


class Adapter:
    """As wgpu's; what is asked of it is kept."""

    def __init__(self, name: str, kind: str, features: tuple[str, ...] = ()) -> None:
        info = {"device": name, "adapter_type": kind, "backend_type": "Vulkan", "vendor": "", "description": "1.0"}
        self.info = {**info, "vendor_id": 0, "device_id": 0}
        self.features, self.limits = set(features), LIMITS
        self.requests: list[set[str]] = []

    def request_device_sync(self, required_features: Any = (), required_limits: Any = None) -> str:
        self.requests.append(set(required_features))
        assert set(required_features) <= self.features
        return f"device of {self.info['device']}"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that these GPUs are there."""
    monkeypatch.delenv("ENTRENAR_DEVICE", raising=False)
    monkeypatch.setenv("ENTRENAR_ENGINE", "wgpu")

    def install(*found: Adapter) -> None:
        ordered = sorted(found, key=lambda a: choice._RANKS[a.info["adapter_type"]])
        listed = tuple(Gpu(engine("wgpu"), adapter) for adapter in ordered)
        monkeypatch.setattr(choice, "gpus", lambda name: listed if name == "wgpu" else ())

    return install


CARD = ("Radeon RX 7800", "DiscreteGPU")
IGPU = ("Intel Arc", "IntegratedGPU")
SOFT = ("llvmpipe", "CPU")


def test_discrete_before_integrated_before_software(machine: Any) -> None:
    machine(Adapter(*SOFT), Adapter(*IGPU), Adapter(*CARD))
    assert choice.choose_gpu().gpu.info["device"] == "Radeon RX 7800"
    machine(Adapter(*SOFT), Adapter(*IGPU))
    assert choice.choose_gpu().gpu.info["device"] == "Intel Arc"


def test_choice_by_index_name_and_variable(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(Adapter(*SOFT), Adapter(*IGPU), Adapter(*CARD))
    assert choice.choose_gpu("2").gpu.info["device"] == "llvmpipe"
    assert choice.choose_gpu("intel").gpu.info["device"] == "Intel Arc"
    monkeypatch.setenv("ENTRENAR_DEVICE", "llvm")
    assert choice.choose_gpu().gpu.info["device"] == "llvmpipe"
    assert choice.choose_gpu("0").gpu.info["device"] == "Radeon RX 7800"
    with pytest.raises(UserError, match="--device 'voodoo' matches no GPU of 0: Radeon"):
        choice.choose_gpu("voodoo")
    for index in ("3", "7800"):  # digits of a name, which is what an index is not
        with pytest.raises(UserError, match=f"--device '{index}' matches no GPU of 0: Radeon RX 7800"):
            choice.choose_gpu(index)


def test_numpy_by_the_variable(machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In place of any GPU, unless --device names one."""
    machine(Adapter(*SOFT))
    monkeypatch.setenv("ENTRENAR_DEVICE", "numpy")
    model = make_model(tmp_path / "model")
    found = evaluate(model, [{"input_ids": [1, 2, 3]}], seq=8)
    assert found == evaluate(model, [{"input_ids": [1, 2, 3]}], seq=8, device="numpy")
    assert choice.choose_gpu("llvm").gpu.info["device"] == "llvmpipe"
    told = info.describe()
    assert (told["engine"], told["chosen"], len(told["adapters"])) == ("numpy", None, 1)


def test_no_adapter_names_the_packages(machine: Any) -> None:
    machine()
    with pytest.raises(UserError) as caught:
        choice.choose_gpu()
    for name in ("mesa-vulkan-drivers", "Fedora", "macOS", "Windows"):
        assert name in str(caught.value)


def test_only_features_in_use_are_requested(machine: Any) -> None:
    card = Adapter(*CARD, features=("shader-f16", "subgroup", "mappable-primary-buffers", "cooperative-matrix"))
    machine(card)
    opened = device.Device.open()
    assert card.requests == [{"shader-f16", "subgroup"}]
    assert opened.caps.f16
    assert opened.caps.subgroups
    assert not opened.caps.timestamps


def test_info_lists_no_feature_that_a_device_is_refused(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Adapter(*CARD, features=("shader-f16", "cooperative-matrix"))
    machine(card)
    monkeypatch.setattr(info, "gpus", choice.gpus)
    (row,) = info.describe()["adapters"]
    assert row["features"] == ["shader-f16"]
    assert not row["uses"]["matrices"]


def test_limited_device_asks_for_nothing(machine: Any) -> None:
    card = Adapter(*CARD, features=("shader-f16", "subgroup", "timestamp-query"))
    machine(card)
    opened = device.Device.open(limited=True)
    assert card.requests == [set()]
    assert (opened.caps.f16, opened.caps.subgroups, opened.caps.timestamps) == (False, False, False)
    assert opened.caps.max_binding_bytes == 128 << 20
    assert opened.caps.max_storage_buffers == 8


@pytest.mark.gpu
def test_opengl_twins_are_not_listed() -> None:
    assert all(gpu.info["backend_type"] != "OpenGL" for gpu in choice.gpus("wgpu"))


@pytest.mark.gpu
def test_info_tells_what_would_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from entrenar_gpu import cli

    assert cli.run(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    chosen = told["adapters"][told["chosen"]]
    assert chosen["uses"]["name"] == choice.choose_gpu().gpu.info["device"]
    assert chosen["uses"]["max_binding_bytes"] <= chosen["limits"]["max-storage-buffer-binding-size"]
    assert cli.run(["info"]) == 0
    assert chosen["device"] in capsys.readouterr().out
