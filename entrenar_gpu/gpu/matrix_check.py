"""Whether a driver's matrix units compute what they should: tried once per GPU and driver, before they are used.

A feature bit tells that a driver knows matrices, not that it multiplies them. So matmuls, a layer with its adapter and
attention, both passes, over random operands are held against the same without matrix units. The outcome is kept in the
cache folder; a driver that crashes on the way has left "running" there, and is not tried again. Of several processes
that start at once one tries, and the others wait for what it finds.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from entrenar_gpu.compiler import PlanOptions, backward, make_plan
from entrenar_gpu.errors import UserError
from entrenar_gpu.executors import run_node
from entrenar_gpu.files import cache_folder, new_folder, read_json, turn, write_text
from entrenar_gpu.gpu.device import Device
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.gpu.measure import TOLERANCES, MatmulCase, Program
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph import Graph
from entrenar_gpu.ops.attention import attention
from entrenar_gpu.ops.gemm.linear import linear
from entrenar_gpu.ops.gemm.tiles import Arithmetic, int8_matrices_of, matrix_tiles
from entrenar_gpu.ops.quantize import Nf4Tensors

INT8 = "int8"
VERSION = 4  # of the kernels on matrix units
PASSED = "passed"
RUNNING = "running"  # left by a process that did not come back
_ROUNDED = 3e-3  # relative error of what is computed from operands rounded to f16, once or twice


def _cases(device: Device) -> Iterator[MatmulCase]:
    """Whole tiles and edges, both layouts of B; K of several slices' length. In f32 too, where that has matrices."""
    arithmetics: tuple[Arithmetic, ...] = ("f16", "f32")
    for arithmetic in arithmetics:
        if arithmetic == "f16" or matrix_tiles(arithmetic, device.caps):
            for m in (256, 70):
                for by_columns in (True, False):
                    yield MatmulCase("matrix check", arithmetic, m, 128, 512, False, by_columns, arithmetic != "f32")


def open_device(choice: str | None = None, engine: str | None = None) -> Device:
    """`Device.open`, without matrix units where they do not compute what they should; that is said on stderr."""
    device = Device.open(choice, engine=engine)
    caps = device.caps
    if caps.matrices and not _passes(device, "", try_matrices):
        device.caps = replace(caps, matrices=())
    elif int8_matrices_of(caps) is not None and not _passes(device, INT8, try_int8):
        device.caps = replace(caps, matrices=tuple(c for c in caps.matrices if c.component != "i8"))
    return device


def _passes(device: Device, kind: str, tries: Callable[[Device], str]) -> bool:
    """Whether the device's matrix units, of one kind, were found to work, now or before; that they do not is said."""
    path = check_path(device, kind)
    found = read_outcome(path)
    if found is None or found == RUNNING:  # a driver that crashed, or another process that is trying it now
        new_folder(path.parent)
        with turn(path):
            found = read_outcome(path)
            if found is None:
                _keep(path, RUNNING)
                try:
                    found = tries(device)
                except BaseException:  # an interrupt: the driver did nothing wrong
                    path.unlink()
                    raise
                _keep(path, found)
    if found != PASSED:
        told = "a driver that did not come back from the check" if found == RUNNING else found
        unused = f"matrix units of {device.caps.name} are not used{f' for {kind}' if kind else ''}"
        print(f"{unused}: {told} (remembered in {path})", file=sys.stderr)
    return found == PASSED


def try_matrices(device: Device) -> str:
    """PASSED, or in words what was wrong."""
    kernels = KernelCache(device)
    for case in _cases(device):
        program = Program(case)
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
        if not error <= TOLERANCES[case.arithmetic]:
            return f"a matmul of {case.m}x{case.n}x{case.k} is off by {error:.1e}"
    return _first_wrong(device, kernels, [_layer("f16"), _attention()])


def try_int8(device: Device) -> str:
    """The same of matrices of int8: layers of whole tiles and of edges, of K of several slices' length."""
    return _first_wrong(device, KernelCache(device), [_layer("int8_rows"), _layer("int8_rows", 70, 1024)])


def _first_wrong(device: Device, kernels: KernelCache, graphs: Sequence[Graph]) -> str:
    for graph in graphs:
        try:
            error = _error(device, kernels, graph)
        except (RuntimeError, device.engine.api.GPUError) as failure:
            return str(failure).splitlines()[0]
        if not error <= _ROUNDED:
            return f"{graph.name} is off by {error:.1e}"
    return PASSED


def _layer(precision: Arithmetic, t: int = 128, k: int = 256) -> Graph:
    """A projection with its adapter, onto a residual, and back."""
    graph, (n, r) = Graph("a layer"), (128, 16)
    x, a, b = (graph.tensor(name, s, requires_grad=True) for name, s in (("x", (t, k)), ("a", (r, k)), ("b", (n, r))))
    weight = Nf4Tensors.declare(graph, "weight", (n, k), False, "float32")
    out = linear(x, weight, residual=graph.tensor("residual", (t, n)), precision=precision, lora=(a, b, 0.5))
    backward(out, [x, a, b], graph.tensor("upstream", out.shape))
    return graph


def _attention() -> Graph:
    graph, tokens = Graph("attention"), 192
    sizes = {"q": 256, "k": 128, "v": 128}
    q, k, v = (graph.tensor(name, (tokens, size), requires_grad=True) for name, size in sizes.items())
    out = attention(q, k, v, graph.tensor("segment_start", (tokens,), "u32"), 1, 2, 1, "f16")
    backward(out, [q, k, v], graph.tensor("upstream", out.shape))
    return graph


def _error(device: Device, kernels: KernelCache, graph: Graph) -> float:
    """The largest relative Frobenius error of an output of a graph against NumPy."""
    rng, arrays = np.random.default_rng(0), dict[str, np.ndarray]()
    for name, tensor in graph.persistents.items():
        values: np.ndarray = rng.standard_normal(tensor.shape, dtype=np.float32)
        if tensor.dtype == "u8":
            values = rng.integers(0, 256, tensor.shape, dtype=np.uint8)
        elif tensor.dtype == "u32":  # two segments
            values = np.repeat(np.array([0, 100], np.uint32), [100, tensor.size - 100])
        arrays[name] = values
    values_of = {t.id: arrays[name] for name, t in graph.persistents.items()}
    for node in graph.nodes:
        run_node(node, values_of)
    replay = Replay(device, make_plan({graph.name: graph}, device.caps, PlanOptions(keep=True)), kernels)
    try:
        for name, array in arrays.items():
            replay.write(name, array)
        replay.run(graph.name)
        outputs = [t for node in graph.nodes for t in node.outputs]
        return max(_off(replay.read_temporary(t), values_of[t.id]) for t in outputs)
    finally:
        replay.close()


def _off(got: np.ndarray, want: np.ndarray) -> float:
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    return error if np.isfinite(error) else np.inf


def check_path(device: Device, kind: str = "") -> Path:
    """Where the outcome for this GPU, driver and engine is kept, and kind of matrices."""
    words = f"{kind} {device.caps.name} {device.info['description']} {device.engine.name} {device.engine.version}"
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
