"""Matrix units are tried before they are used, once; a driver that fails or crashes is remembered and said."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from entrenar_gpu.files import write_text
from entrenar_gpu.gpu import matrix_check
from entrenar_gpu.gpu.device import Device
from entrenar_gpu.gpu.matrix_check import PASSED, check_path, open_device, read_outcome
from entrenar_gpu.graph.caps import Caps, MatrixConfig

CONFIG = MatrixConfig("f16", "f32", 16, 16, 16, 32, 32)
INT8 = MatrixConfig("i8", "i32", 16, 16, 32, 32, 32)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """Pretends that a card has matrix units, and counts how often they are tried."""
    monkeypatch.setattr(matrix_check, "cache_folder", lambda: tmp_path)
    caps = Caps(name="Card", f16=True, matrices=(CONFIG,))
    card = SimpleNamespace(caps=caps, info={"description": "1.0"}, engine=SimpleNamespace(name="dawn", version="0.32"))
    monkeypatch.setattr(Device, "open", lambda choice, engine=None: card)
    tried: list[str] = []

    def outcome_of(outcome: str | BaseException) -> None:
        def tries(device: Any) -> str:
            tried.append(str(outcome))
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(matrix_check, "try_matrices", tries)

    return SimpleNamespace(card=card, tried=tried, outcome_of=outcome_of)


def test_what_passed_is_used_and_not_tried_again(opened: Any, capsys: Any) -> None:
    opened.outcome_of(PASSED)
    assert open_device().caps.matrices == (CONFIG,)
    assert open_device().caps.matrices == (CONFIG,)
    assert opened.tried == [PASSED]
    assert capsys.readouterr().err == ""


def test_what_failed_is_not_used_and_said_each_time(opened: Any, capsys: Any) -> None:
    opened.outcome_of("a product is off by 1e+00")
    for _ in range(2):
        opened.card.caps = replace(opened.card.caps, matrices=(CONFIG,))
        assert open_device().caps.matrices == ()
        message = capsys.readouterr().err
        assert message.startswith("matrix units of Card are not used: a product is off by 1e+00 (remembered in ")
        assert message.count("\n") == 1
    assert len(opened.tried) == 1


def test_a_crash_is_remembered(opened: Any, capsys: Any) -> None:
    check_path(opened.card).parent.mkdir()
    write_text(check_path(opened.card), json.dumps({"version": matrix_check.VERSION, "outcome": "running"}))
    opened.outcome_of(PASSED)
    assert open_device().caps.matrices == ()
    assert "a driver that did not come back from the check" in capsys.readouterr().err
    assert opened.tried == []


def test_an_interrupt_is_no_crash(opened: Any) -> None:
    opened.outcome_of(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        open_device()
    opened.outcome_of(PASSED)
    assert open_device().caps.matrices == (CONFIG,)


def test_of_two_that_start_at_once_one_tries_and_the_other_waits(opened: Any, monkeypatch: Any, capsys: Any) -> None:
    trying, tried = threading.Event(), []

    def slow(device: Any) -> str:
        tried.append(device)
        trying.set()
        time.sleep(0.3)  # long enough for the other to find the check under way
        return PASSED

    monkeypatch.setattr(matrix_check, "try_matrices", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(open_device)
        assert trying.wait(10)
        second = pool.submit(open_device)
        assert first.result().caps.matrices == second.result().caps.matrices == (CONFIG,)
    assert len(tried) == 1
    assert capsys.readouterr().err == ""


def test_int8_that_fails_leaves_f16(opened: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened.outcome_of(PASSED)
    opened.card.caps = replace(opened.card.caps, matrices=(CONFIG, INT8), max_workgroup_bytes=49152)
    monkeypatch.setattr(matrix_check, "try_int8", lambda device: "a layer is off by 1e+00")
    assert open_device().caps.matrices == (CONFIG,)
    assert "are not used for int8: a layer is off by 1e+00" in capsys.readouterr().err


def test_another_driver_or_damaged_memory_is_tried_anew(opened: Any) -> None:
    opened.outcome_of("wrong")
    open_device()
    path = check_path(opened.card)
    opened.card.info = {"description": "2.0"}
    opened.card.caps = replace(opened.card.caps, matrices=(CONFIG,))
    assert check_path(opened.card) != path
    opened.outcome_of(PASSED)
    assert open_device().caps.matrices
    path.write_text("{")
    assert read_outcome(path) is None


@pytest.mark.gpu
def test_the_check_itself_passes_without_matrix_units_and_sees_a_wrong_product(device: Any) -> None:
    """Plain f16 kernels pass it; with a fault in them they do not."""
    from tests.helpers.equivalence import fault

    if not device.caps.f16:
        pytest.skip("the adapter has no f16")
    plain = SimpleNamespace(**{**vars(device), "caps": replace(device.caps, matrices=())})
    for name in ("buffer", "write", "read", "release", "watched", "staging"):
        setattr(plain, name, getattr(device, name))
    assert matrix_check.try_matrices(plain) == PASSED  # type: ignore[arg-type]
    with fault("matmul_f16", "acc0_0 +=", "acc0_0 -="):
        assert "is off by" in matrix_check.try_matrices(plain)  # type: ignore[arg-type]
