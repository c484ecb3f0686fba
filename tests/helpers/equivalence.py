"""Cases as programs, run by the references or on a device, and what it means that two results agree."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.autodiff import backward
from entrenar_gpu.compiler.plan import Plan, PlanOptions, make_plan
from entrenar_gpu.dtypes import NUMPY_TYPES
from entrenar_gpu.executors.numpy_executor import run_node
from entrenar_gpu.gpu import kernel
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.caps import Caps
from entrenar_gpu.graph.launch import Launch
from entrenar_gpu.graph.tensor import Graph, Node, Tensor
from entrenar_gpu.ops import loss as loss_ops
from entrenar_gpu.ops.registry import OPS
from tests.helpers.cases import Case

# Relative Frobenius error of an op's output, GPU against NumPy float32, as a multiple of 1e-6. Products have a bar of
# their own below. WGSL grants exp and the like 3 + 2 |x| ulp and division 2.5: hence factors above 1.
FACTORS = {
    "gelu": 2,  # erf's fit is good for 1.2e-7 of erfc, and 1 + erf(x) cancels for negative x
    "gelu_grad": 2,
    "gelu_tanh": 2,  # 1 + tanh cancels for negative x
    "gelu_tanh_grad": 2,
    "geglu": 2,
    "geglu_grad": 2,
    "geglu_tanh": 2,
    "geglu_tanh_grad": 2,
    "softmax": 2,
    "attention": 4,  # two products and a softmax
    "attention_statistics": 4,
    "attention_grad": 8,  # weights from exp of scores recomputed, minus a sum that cancels against them
    "cross_entropy": 4,  # exp of logits, themselves a product
    "cross_entropy_grad": 4,
    "norm_grad": 2,
    "norm_rope_grad": 2,
}
# The worst element may be this many times the bar away, relative to the largest element: the bar is about a root mean
# square over the tensor, and of a million normal deviates the largest is five.
WORST = 10


@dataclass
class Program:
    """A case with an op before it (so that its inputs are temporaries) and random upstream gradients behind it."""

    graph: Graph
    output: Tensor
    upstream: Tensor
    arrays: dict[str, np.ndarray]
    leaves: list[Tensor]
    gradients: dict[Tensor, Tensor] = field(default_factory=dict)


@contextmanager
def forced_chunks(case: Case) -> Iterator[None]:
    """Cross-entropy in chunks as small as the case asks for, while it is planned."""
    saved = loss_ops.LOGITS_BYTES
    loss_ops.LOGITS_BYTES = case.logits_bytes or saved
    try:
        yield
    finally:
        loss_ops.LOGITS_BYTES = saved


def build(case: Case) -> Program:
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    graph, arrays, leaves, tensors = Graph(case.name), {}, [], []
    for number, spec in enumerate(case.inputs):
        name = f"in{number}"
        arrays[name] = spec.make(rng, spec.shape).astype(NUMPY_TYPES[spec.dtype])
        if spec.role == "param":
            tensor = graph.parameter(name, spec.shape)
            arrays[f"{name}.grad"] = rng.standard_normal(spec.shape).astype(np.float32)
        else:
            role = "weight" if spec.role == "weight" else "input"
            tensor = graph.tensor(name, spec.shape, spec.dtype, role, requires_grad=spec.role == "temp")
        if tensor.requires_grad:
            leaves.append(tensor)
        tensors.append(ops.scale(tensor, 1.25) if spec.role == "temp" else tensor)
    output = case.apply(*tensors)
    upstream = graph.tensor("upstream", output.shape)
    arrays["upstream"] = rng.standard_normal(output.shape).astype(np.float32)
    program = Program(graph, output, upstream, arrays, leaves)
    if leaves:
        program.gradients = backward(output, leaves, upstream)
    return program


def run_reference(program: Program, dtype: Any = np.float32, **changed: np.ndarray) -> dict[int, np.ndarray]:
    """Every tensor by id, floats in `dtype`; `changed` replaces inputs by name."""
    values = {}
    for name, tensor in program.graph.persistents.items():
        array = changed.get(name, program.arrays[name])
        values[tensor.id] = array.astype(dtype) if tensor.dtype == "f32" else array
    for node in program.graph.nodes:
        run_node(node, values)
    return values


def run_device(program: Program, device: Any, kernels: Any, plan: Plan) -> dict[int, np.ndarray]:
    """Every tensor by id whose storage nothing has overwritten by the end of the run."""
    replay = Replay(device, plan, kernels)
    try:
        for name, array in program.arrays.items():
            replay.write(name, array)
        replay.run(program.graph.name)
        return {t.id: replay.read_temporary(t) for t in intact(program.graph, plan)}
    finally:
        replay.close()


def intact(graph: Graph, plan: Plan) -> list[Tensor]:
    """Tensors that lie undisturbed in their storage when the graph has run."""
    owner: dict[Any, Tensor] = {plan.slices[t.id]: t for t in graph.persistents.values()}
    for step in plan.steps[graph.name]:
        for tensor in (*step.workspace, *step.node.outputs):
            place = plan.slices[tensor.id]
            for other in [p for p in owner if p.buffer == place.buffer and _overlap(p, place)]:
                del owner[other]
            owner[place] = tensor
    return [t for t in owner.values() if t.persistent or t in t.node.outputs]


def _overlap(a: Any, b: Any) -> bool:
    return bool(a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes)


def plan_of(case: Case, program: Program, caps: Caps, keep: bool) -> Plan:
    with forced_chunks(case):
        return make_plan({program.graph.name: program.graph}, caps, PlanOptions(keep=keep))


@functools.cache
def expected(case_name: str) -> tuple[Program, dict[int, np.ndarray]]:
    """The program of a case and its float32 reference, once for all tests."""
    from tests.helpers.cases import CASES

    program = build(CASES[case_name])
    return program, run_reference(program)


def needs(device: Any, precision: str) -> None:
    """Skips where the adapter lacks a precision's arithmetic; CI's software adapter has all of them."""
    if precision == "f16" and not device.caps.f16:
        pytest.skip(f"{device.caps.name} has no f16")


def tolerance(node: Node) -> float:
    """The bar for the outputs of a node: relative error in the Frobenius norm."""
    if node.op == "matmul":
        return 5e-8 * math.sqrt(inner_length(node)) + 1e-7
    return 1e-6 * FACTORS.get(node.op, 1)


def inner_length(node: Node) -> int:
    """Of the product and, where it is there, of what is of low rank."""
    summed = [node.inputs[name] for name in ("a", "low_rank.0") if name in node.inputs]
    return sum(t.rows if node.attrs["transpose_a"] else t.columns for t in summed)


def size_of(
    node: Node, values: Mapping[int, np.ndarray], sizes: Mapping[int, np.ndarray], out: np.ndarray
) -> np.ndarray:
    """What an error is relative to: the result, or, where its terms cancel, their size."""
    if node.op == "scale":
        a = node.inputs["a"].id
        return np.abs(sizes.get(a, values[a]) * np.float32(node.attrs["factor"]))
    if node.op == "sum":
        return OPS["sum"].reference(node, np.abs(values[node.inputs["x"].id]))[0]
    if node.op == "attention_grad":  # dP - delta is all cancellation where a token sees only itself
        q, k, statistics = (values[node.inputs[name].id] for name in ("q", "k", "statistics"))
        scale = math.sqrt(node.attrs["heads"] / node.inputs["q"].columns)
        return np.abs(out) + _rms(statistics[1]) * max(_rms(q), _rms(k)) * scale
    return out


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).mean()))


def check_close(got: np.ndarray, want: np.ndarray, size: np.ndarray, bar: float, what: str) -> None:
    if want.dtype.kind in "ui":
        np.testing.assert_array_equal(got, want, err_msg=what)
        return
    error = got.astype(np.float64) - want
    norm, worst = np.linalg.norm(size.astype(np.float64)), np.abs(size).max(initial=0)
    assert np.isfinite(error).all(), f"{what}: not finite"
    assert np.linalg.norm(error) <= bar * norm, f"{what}: error {np.linalg.norm(error) / norm:.2e} above {bar:.1e}"
    assert np.abs(error).max(initial=0) <= WORST * bar * worst, f"{what}: an element is {np.abs(error).max():.2e} off"


def check_program(program: Program, got: Mapping[int, np.ndarray], want: Mapping[int, np.ndarray]) -> None:
    """Compare every node output and every gradient that is in both."""
    # An error made by one node shows in those after it: the bar is the largest along the way.
    bars: dict[int, float] = {}
    sizes: dict[int, np.ndarray] = {}
    for node in program.graph.nodes:
        bar = max([tolerance(node), *(bars.get(t.id, 0.0) for t in node.inputs.values())])
        for tensor in node.outputs:
            bars[tensor.id], sizes[tensor.id] = bar, size_of(node, want, sizes, want[tensor.id])
            if tensor.id in got:
                what = f"{program.graph.name}: {tensor!r}"
                check_close(got[tensor.id], want[tensor.id], sizes[tensor.id], bar, what)


@contextmanager
def fault(shader: str, old: str, new: str) -> Iterator[None]:
    """Replaces `old` by `new` in the rendered WGSL of one shader; fails if no kernel compiled meanwhile holds it."""
    render, hits = kernel.render, []

    def broken(launch: Launch) -> str:
        code = render(launch)
        if launch.shader == shader and old in code:
            hits.append(launch)
            code = code.replace(old, new)
        return code

    kernel.render = broken
    try:
        yield
    finally:
        kernel.render = render
    assert hits, f"{shader} holds no {old!r}"
