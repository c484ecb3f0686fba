"""One matmul timed on a device, and checked against float64."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from entrenar_gpu import ops
from entrenar_gpu.compiler import Plan, PlanOptions, Step, make_plan
from entrenar_gpu.gpu.device import Device
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph import Caps, Graph, Node, Target, Tensor
from entrenar_gpu.ops.gemm.linear import transposed
from entrenar_gpu.ops.gemm.tiles import Arithmetic, TileTable, choose, to_numbers
from entrenar_gpu.ops.quantize import dequantized
from entrenar_gpu.ops.registry import OPS
from entrenar_gpu.quant import BLOCK

WARM_UP_SECONDS = 0.1
TIMED_SECONDS = 0.1


CHECKED_ROWS = 4
# Relative Frobenius error against the exact result that a precision may show on normal deviates (docs/gemm.md).
# Of int8 by rows, an absmax of 4.3 deviations at K = 9728 is 4.3 / 127 / sqrt(12) for each operand.
TOLERANCES: dict[Arithmetic, float] = {"f32": 2.7e-6, "f16": 1.2e-3, "int8": 1.2e-2, "int8_rows": 1.6e-2}


@dataclass(frozen=True)
class MatmulCase:
    """One matmul to time: C[m, n] over k, as the op that training records for it."""

    name: str
    arithmetic: Arithmetic
    m: int
    n: int
    k: int
    transpose_a: bool = False
    transpose_b: bool = False
    weight: bool = False  # B is an NF4 weight: in low precision, one of `ops.linear`

    @property
    def layout(self) -> str:
        if self.arithmetic != "f32":
            return "nt"
        return ("t" if self.transpose_a else "n") + ("t" if self.transpose_b else "n")


def measure(
    device: Device,
    kernels: KernelCache,
    case: MatmulCase,
    tiles: TileTable | None = None,
    check: bool = True,
    alone: bool = True,
) -> dict[str, Any]:
    """One matmul: see `bench_gemm`. `tiles` overrides the choice of tiles; `check` compares with float64;
    `alone` times the multiplication by itself too, and with its weight's copy kept."""
    caps, tiles = device.caps, tiles or {}
    program = Program(case)
    plan = make_plan({"gemm": program.graph}, caps, PlanOptions(tiles=tiles))
    (step,) = plan.steps["gemm"]
    # lavapipe is timed too, in tests, on one repetition
    repeats = 1 if caps.software else max(4, min(64, int(5e11 / OPS[step.node.op].flops(step.node))))
    _repeat(plan, step, repeats)
    replay = Replay(device, plan, kernels)
    try:
        program.write(replay)
        seconds = time_run(replay, "gemm") / repeats
        fewer = dict.fromkeys(("alone", "kept"), seconds)
        for name in fewer:
            if alone and name in plan.steps:
                fewer[name] = time_run(replay, name) / repeats
        error = program.error(replay) if check else None
    finally:
        replay.close()
    flops = 2 * case.m * case.n * case.k
    return {
        "name": case.name,
        "arithmetic": case.arithmetic,
        "sizes": [case.m, case.n, case.k],
        "seconds": seconds,
        "tflops": flops / seconds / 1e12,
        "product_tflops": flops / fewer["alone"] / 1e12,
        "kept_tflops": flops / fewer["kept"] / 1e12,
        "gbytes_per_second": _bytes(step.node) / seconds / 1e9,
        "error": error,
        "within": error is None or error <= TOLERANCES[case.arithmetic],
        "tile": list(to_numbers(choice_of(case, Target.of(caps, tiles)))),
        "matrices": any("_matrix" in launch.shader for launch in step.launches),
    }


def choice_of(case: MatmulCase, caps: Caps) -> Any:
    return choose(case.arithmetic, case.m, case.n, case.k, case.layout, caps)


def _bytes(node: Node) -> int:
    return sum(t.nbytes for t in (*node.inputs.values(), *node.outputs))


def _repeat(plan: Plan, step: Step, repeats: int) -> None:
    """Run the matmul many times in a graph, and in others its multiplication alone, and without copying its weight."""
    plan.steps["gemm"] = [step] * repeats
    alone = tuple(launch for launch in step.launches if launch.shader.startswith("matmul"))
    kept = tuple(launch for launch in step.launches if not launch.shader.startswith("nf4"))
    for name, launches in (("alone", alone), ("kept", kept)):
        if len(launches) < len(step.launches):
            plan.steps[name] = [replace(step, launches=launches)] * repeats


def time_run(replay: Replay, name: str) -> float:
    """Seconds of one run of a graph, on a card that has warmed up."""
    replay.run(name)
    replay.wait()
    begin = time.perf_counter()
    runs = 0
    while runs == 0 or time.perf_counter() - begin < WARM_UP_SECONDS:
        replay.run(name)
        replay.wait()
        runs += 1
    each = (time.perf_counter() - begin) / runs
    if replay.device.caps.software:
        return each
    runs = max(1, int(TIMED_SECONDS / each))
    begin = time.perf_counter()
    for _ in range(runs):
        replay.run(name)
    replay.wait()
    return (time.perf_counter() - begin) / runs


@functools.cache
def _deviates(seed: int) -> np.ndarray:
    """A few million normal deviates, to be repeated: making 25 million takes longer than multiplying by them."""
    return np.random.default_rng(seed).standard_normal(3_000_017, dtype=np.float32)


class Program:
    """A graph of one matmul over random inputs."""

    def __init__(self, case: MatmulCase) -> None:
        self.case = case
        self.graph = Graph("gemm")
        self._rng = np.random.default_rng(0)
        self._makers: dict[str, Callable[[], np.ndarray]] = {}  # nothing is made before a plan has room for it
        self._arrays: dict[str, np.ndarray] = {}
        p = case
        self._a = self._normal("a", (p.k, p.m) if p.transpose_a else (p.m, p.k))
        if p.weight and p.arithmetic != "f32":
            self.output = self._linear()
        else:
            self._b: Tensor | ops.Nf4Tensors = self._normal("b", (p.n, p.k) if p.transpose_b else (p.k, p.n))
            self.output = ops.matmul(self._a, self._b, p.transpose_a, p.transpose_b)

    def _normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        seed = len(self._makers)
        self._makers[name] = lambda: np.resize(_deviates(seed), shape)
        return self.graph.tensor(name, shape)

    def _linear(self) -> Tensor:
        p = self.case
        shape = (p.n, p.k) if p.transpose_b else (p.k, p.n)
        weight = ops.Nf4Tensors.declare(self.graph, "weight", shape, False, "float32")
        size = shape[0] * shape[1]
        codes, absmax = weight.parts
        self._makers[codes.name] = lambda: self._rng.integers(0, 256, size // 2, dtype=np.uint8)
        self._makers[absmax.name] = lambda: self._rng.uniform(0.5, 1.5, size // BLOCK).astype(np.float32)
        self._b = weight
        if p.transpose_b:
            return ops.linear(self._a, weight, precision=p.arithmetic)
        return transposed(self._a, weight, p.arithmetic)

    def write(self, replay: Replay) -> None:
        self._arrays = {name: make() for name, make in self._makers.items()}
        for name, values in self._arrays.items():
            replay.write(name, values)

    def error(self, replay: Replay) -> float:
        """Relative Frobenius error of a few rows against float64."""
        p = self.case
        rows = np.sort(self._rng.choice(p.m, min(p.m, CHECKED_ROWS), replace=False))
        a = self._arrays["a"]
        left = (a[:, rows].T if p.transpose_a else a[rows]).astype(np.float64)
        b = self._b_values()
        exact = left @ (b.T if p.transpose_b else b)
        got = replay.read_temporary(self.output).reshape(p.m, p.n)[rows]
        return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))

    def _b_values(self) -> np.ndarray:
        if isinstance(self._b, Tensor):
            return self._arrays["b"]
        attrs = {"shape": self._b.shape, "rounded": "float32"}
        parts = [self._arrays[t.name] for t in self._b.parts]
        return dequantized(attrs, parts)
