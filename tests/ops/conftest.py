"""Kernels on matrix units where there are none."""

from __future__ import annotations

from typing import Any

import pytest

from entrenar_gpu.gpu import kernel
from entrenar_gpu.gpu.kernel import KernelCache


@pytest.fixture
def emulated(device: Any, monkeypatch: pytest.MonkeyPatch) -> KernelCache:
    """Kernels whose matrices are spelled in plain WGSL."""
    monkeypatch.setitem(kernel._environment().globals, "dialect", "emulated")
    return KernelCache(device)
