"""Whether a driver's matrix units compute what they should: tried once per GPU and driver, before they are used.

A feature bit tells that a driver knows matrices, not that it multiplies them. So a product of random operands is held
against the same product without matrix units. The outcome is kept in the cache folder; a driver that crashes on the way
has left "running" there, and is not tried again.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

from entrenar_gpu.compiler import make_plan
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import cache_folder, new_folder, read_json, write_text
from entrenar_gpu.gpu.device import Device
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.gpu.measure import TOLERANCES, Product, Program
from entrenar_gpu.gpu.replay import Replay

VERSION = 1  # of the kernels on matrix units
PASSED = "passed"
# Whole tiles and edges, both layouts of B; K of several slices' length.
_PRODUCTS = [
    Product("matrix check", "f16", m, 128, 512, transpose_b=by_columns, weight=True)
    for m in (256, 70)
    for by_columns in (True, False)
]


def open_device(choice: str | None = None, engine: str | None = None) -> Device:
    """`Device.open`, without matrix units where they do not compute what they should; that is said on stderr."""
    device = Device.open(choice, engine=engine)
    if not device.caps.matrices:
        return device
    path = check_path(device)
    found = read_outcome(path)
    if found is None:
        new_folder(path.parent)
        _keep(path, "running")
        found = try_matrices(device)
        _keep(path, found)
    if found == PASSED:
        return device
    told = "a driver that did not come back from the check" if found == "running" else found
    print(f"matrix units of {device.caps.name} are not used: {told} (remembered in {path})", file=sys.stderr)
    device.caps = replace(device.caps, matrices=())
    return device


def try_matrices(device: Device) -> str:
    """PASSED, or in words what was wrong."""
    kernels = KernelCache(device)
    for product in _PRODUCTS:
        program = Program(product)
        try:
            replay = Replay(device, make_plan({"gemm": program.graph}, device.caps), kernels)
            try:
                program.write(replay)
                replay.run("gemm")
                error = program.error(replay)
            finally:
                replay.close()
        except (RuntimeError, device.engine.api.GPUError) as failure:
            return str(failure).splitlines()[0]
        if not error <= TOLERANCES["f16"]:
            return f"a product of {product.m}x{product.n}x{product.k} is off by {error:.1e}"
    return PASSED


def check_path(device: Device) -> Path:
    """Where the outcome for this GPU, driver and engine is kept."""
    words = f"{device.caps.name} {device.info['description']} {device.engine.name} {device.engine.version}"
    return cache_folder() / "matrices" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', words).strip('-')}.json"


def read_outcome(path: Path) -> str | None:
    """What was found before; None where nothing was, or of other kernels."""
    try:
        held = read_json(path)
        return str(held["outcome"]) if held["version"] == VERSION else None
    except (UserError, KeyError, TypeError):
        return None


def _keep(path: Path, outcome: str) -> None:
    write_text(path, json.dumps({"version": VERSION, "outcome": outcome}) + "\n")
