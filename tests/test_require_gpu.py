"""--require-gpu: a test that needs an adapter and finds none is skipped without it, and fails with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

ASKS_FOR_DEVICE = "def test_inner(device): pass\n"
IS_MARKED = "import pytest\n@pytest.mark.gpu\ndef test_inner(): pass\n"


def summary(folder: Path, test: str, *options: str) -> str:
    """The last line of pytest for a test, on a machine that has not the adapter that the user chose."""
    (folder / "test_inner.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-p", "tests.conftest", *options, folder]
    environment = dict(os.environ, ENTRENAR_DEVICE="no such adapter")
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    return result.stdout.strip().rpartition("\n")[2]


@pytest.mark.parametrize("test", [ASKS_FOR_DEVICE, IS_MARKED])
def test_without_adapter_tests_are_skipped_and_counted(tmp_path: Path, test: str) -> None:
    assert " 1 skipped in " in summary(tmp_path, test)


@pytest.mark.parametrize("test", [ASKS_FOR_DEVICE, IS_MARKED])
def test_without_adapter_tests_fail_where_one_is_required(tmp_path: Path, test: str) -> None:
    assert " 1 error in " in summary(tmp_path, test, "--require-gpu")


def test_asking_for_the_device_marks_a_test(tmp_path: Path) -> None:
    assert " 1 deselected in " in summary(tmp_path, ASKS_FOR_DEVICE, "-m", "not gpu")
