"""Clipping, skipping and the optimizers against plain float64 formulas, on both executors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.executors.numpy_executor import NumpyExecutor
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.ops import optimizer
from entrenar_gpu.ops.optimizer import STATE, STATE_FIELDS
from tests.helpers.equivalence import fault

SIZES = {"a": (300, 67), "b": (5,)}  # 20,100 elements: two chunks of the norm, the second short
LR, BETAS, EPS = 1e-2, (0.9, 0.95), 1e-8


@dataclass(frozen=True)
class Optimizer:
    kind: str
    decay: float = 0.0
    clip: float = 0.0
    momentum: float = 0.0
    adapts: bool = False

    def graph(self, sizes=SIZES) -> Graph:
        graph = Graph("update")
        state, loss = graph.tensor("state", (STATE,), role="state"), graph.tensor("loss", (1,), role="state")
        lr = graph.tensor("lr", (1,))
        pages = {
            name: [graph.tensor(f"{name}.{part}", (math.prod(s),), role="state") for part in ("p", "g", "m", "v")]
            for name, s in sizes.items()
        }
        scale, partials = graph.tensor("scale", (1,), role="state"), [ops.sum_of_squares(p[1]) for p in pages.values()]
        state = ops.decide(state, loss, scale, partials, self.clip, BETAS, self.adapts)
        for p, g, m, v in pages.values():
            if self.kind == "sgd":
                ops.sgd(p, g, m if self.momentum else None, state, lr, self.momentum, self.decay)
            else:
                ops.adam(p, g, m, v, state, lr, BETAS, EPS, self.decay, self.kind == "adamw")
        return graph


KINDS = {
    "adamw": Optimizer("adamw", decay=0.1, clip=1.0),
    "adamw-plain": Optimizer("adamw"),
    "adam": Optimizer("adam", decay=0.1, clip=100.0),
    "sgd": Optimizer("sgd", decay=0.1, clip=1.0),
    "sgd-momentum": Optimizer("sgd", momentum=0.9, decay=0.05),
}


@dataclass
class Plain:
    """The update in float64, written as the papers have it."""

    optimizer: Optimizer
    p: dict[str, np.ndarray]
    m: dict[str, np.ndarray] = field(default_factory=dict)
    v: dict[str, np.ndarray] = field(default_factory=dict)
    taken: int = 0

    def step(self, grads: dict[str, np.ndarray], loss: float) -> float:
        o = self.optimizer
        norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
        factor = min(1.0, o.clip / (norm + 1e-6)) if o.clip else 1.0
        self.taken += 1
        for name, gradient in grads.items():
            p, g = self.p[name], gradient.astype(np.float64) * factor
            m, v = self.m.get(name, 0.0), self.v.get(name, 0.0)
            if o.kind == "sgd":
                self.m[name] = o.momentum * m + g + o.decay * p
                self.p[name] = p - LR * self.m[name]
                continue
            if o.kind == "adam":
                g = g + o.decay * p
            else:
                p = p - LR * o.decay * p
            self.m[name] = BETAS[0] * m + (1 - BETAS[0]) * g
            self.v[name] = BETAS[1] * v + (1 - BETAS[1]) * g**2
            corrected = self.m[name] / (1 - BETAS[0] ** self.taken), self.v[name] / (1 - BETAS[1] ** self.taken)
            self.p[name] = p - LR * corrected[0] / (np.sqrt(corrected[1]) + EPS)
        return norm


@pytest.fixture(
    params=["numpy", pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("limited", marks=pytest.mark.gpu)]
)
def execute(request: pytest.FixtureRequest) -> Callable[[Graph], NumpyExecutor | Replay]:
    if request.param == "numpy":
        return lambda graph: NumpyExecutor({"update": graph})
    prefix = "limited_" if request.param == "limited" else ""
    device, kernels = (request.getfixturevalue(prefix + name) for name in ("device", "kernels"))
    return lambda graph: Replay(device, make_plan({"update": graph}, device.caps), kernels)


def read_state(executor) -> dict[str, float]:
    return dict(zip(STATE_FIELDS, executor.read("state").tolist(), strict=False))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - want.reshape(-1)) / np.linalg.norm(want))


def check_twenty_steps(optimizer: Optimizer, execute, rng: np.random.Generator) -> None:
    executor = execute(optimizer.graph())
    plain = Plain(optimizer, {name: rng.standard_normal(math.prod(s)) for name, s in SIZES.items()})
    for name, p in plain.p.items():
        executor.write(f"{name}.p", p)
    executor.write("lr", np.array([LR]))
    for step in range(20):
        grads = {
            n: (rng.standard_normal(p.size) * 10.0 ** (step % 3 - 2)).astype(np.float32) for n, p in plain.p.items()
        }
        for name, gradient in grads.items():
            executor.write(f"{name}.g", gradient)
        executor.write("loss", np.array([step + 0.5]))
        executor.run("update")
        norm = plain.step(grads, step + 0.5)
        state = read_state(executor)
        assert state["grad_norm"] == pytest.approx(norm, rel=1e-6)
        assert (state["loss"], state["taken"], state["apply"]) == (step + 0.5, step + 1, 1)
    for name in SIZES:
        assert relative(executor.read(f"{name}.p"), plain.p[name]) <= 1e-6, name
        if optimizer.kind != "sgd" or optimizer.momentum:
            assert relative(executor.read(f"{name}.m"), plain.m[name]) <= 1e-6
        if optimizer.kind != "sgd":
            assert relative(executor.read(f"{name}.v"), plain.v[name]) <= 2e-6  # squares double the error
            for field_name, beta in zip(("correction1", "correction2"), BETAS, strict=True):
                assert read_state(executor)[field_name] == pytest.approx(1 - beta**20, rel=1e-6)
        assert not executor.read(f"{name}.g").any()
    assert not executor.read("loss").any()
    executor.close()


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_equal_the_formulas(kind, execute, rng):
    check_twenty_steps(KINDS[kind], execute, rng)


@pytest.mark.parametrize("kind", ["adamw", "sgd-momentum"])
@pytest.mark.parametrize(
    ("gradient", "loss"), [(np.nan, 1.0), (np.inf, 1.0), (-np.inf, 1.0), (1e30, 1.0), (0.5, np.nan), (0.5, np.inf)]
)
def test_a_step_that_is_not_finite_is_skipped_and_counted(kind, gradient, loss, execute, rng):
    """1e30 is finite, but its square is not."""
    executor = execute(KINDS[kind].graph())
    executor.write("lr", np.array([LR]))

    def run(value: float, loss: float) -> dict[str, float]:
        for name, shape in SIZES.items():
            gradients = rng.standard_normal(math.prod(shape)).astype(np.float32)
            gradients[-1] = value
            executor.write(f"{name}.g", gradients)
        executor.write("loss", np.array([loss]))
        executor.run("update")
        return read_state(executor)

    run(0.5, 1.0)
    kept = [f"{name}.{part}" for name in SIZES for part in "pmv"]
    before = {name: executor.read(name).tobytes() for name in kept}
    corrections = read_state(executor)["correction1"]
    for times in (1, 2):
        state = run(gradient, loss)
        assert (state["taken"], state["skipped"], state["in_a_row"], state["apply"]) == (1, times, times, 0)
        assert state["correction1"] == corrections
        assert not np.isfinite([state["loss"], state["grad_norm"]]).all()
        assert {name: executor.read(name).tobytes() for name in kept} == before
        assert not any(executor.read(f"{name}.g").any() for name in SIZES)
        assert executor.read("loss") == 0
    state = run(0.5, 1.0)
    assert (state["taken"], state["skipped"], state["in_a_row"], state["apply"]) == (2, 2, 0, 1)
    assert executor.read("a.p").tobytes() != before["a.p"]
    executor.close()


def test_norm_of_more_pages_than_a_dispatch_binds(execute, rng):
    """Nine pages: on a device with eight bindings the partial sums are added up in two dispatches."""
    sizes = {f"page{i}": (i + 1,) for i in range(9)}
    executor = execute(Optimizer("sgd").graph(sizes))
    grads = {name: rng.standard_normal(s).astype(np.float32) for name, s in sizes.items()}
    for name, gradient in grads.items():
        executor.write(f"{name}.g", gradient)
    executor.run("update")
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
    assert read_state(executor)["grad_norm"] == pytest.approx(norm, rel=1e-6)
    executor.close()


FAULTS = [
    ("optimizer", "1.0 - rate *", "1.0 + rate *", "adamw"),
    ("optimizer", "* state[8]", "", "adamw"),
    ("optimizer", "/ sqrt(state[4])", "", "adamw"),
    ("optimizer", "rate / state[3]", "rate", "adamw"),
    ("optimizer", "* g * g", "* g", "adamw"),
    ("optimizer", "g += f32", "g -= f32", "adam"),
    ("optimizer", "v[i] = step", "", "sgd-momentum"),
    ("optimizer", "grad[i] = 0.0", "", "sgd"),
    ("optimizer", "i >= 20100u", "i >= 20099u", "sgd"),
    ("decide", "min(1.0, ", "(", "adam"),
    ("decide", "sqrt(total)", "total", "adamw-plain"),
    ("decide", "[0] += 1.0", "[0] += 2.0", "adamw-plain"),
    ("decide", "loss_sum[0] = 0.0", "", "adamw-plain"),
    ("sum_of_squares", "* page[i]", "", "sgd"),
    ("sum_of_squares", "(part + 1u) *", "(part + 1u) * 2u *", "sgd"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("shader", "old", "new", "kind"), FAULTS)
def test_a_planted_fault_is_caught(shader, old, new, kind, device, kernels, rng):
    def execute(graph: Graph) -> Replay:
        return Replay(device, make_plan({"update": graph}, device.caps), kernels)

    with fault(shader, old, new), pytest.raises(AssertionError):
        check_twenty_steps(KINDS[kind], execute, rng)


@pytest.mark.gpu
@pytest.mark.parametrize("old", ["finite(total) && finite(loss)", "== 1.0"])
def test_a_fault_in_skipping_is_caught(old, device, kernels, rng):
    def execute(graph: Graph) -> Replay:
        return Replay(device, make_plan({"update": graph}, device.caps), kernels)

    shader = "decide" if "finite" in old else "optimizer"
    with fault(shader, old, "true" if shader == "decide" else "< 2.0"), pytest.raises(AssertionError):
        test_a_step_that_is_not_finite_is_skipped_and_counted("adamw", np.nan, 1.0, execute, rng)


def test_the_loss_scale_comes_off_and_adapts(execute, rng, monkeypatch):
    """Gradients of 64 times their size give the step of the true ones; overflow halves the scale, good steps double."""
    monkeypatch.setattr(optimizer, "STEPS_TO_DOUBLE", 3.0)
    executor = execute(Optimizer("sgd", clip=1.0, adapts=True).graph())
    executor.write("lr", np.array([LR]))
    executor.write("scale", np.array([64.0]))
    plain = Plain(Optimizer("sgd", clip=1.0), {name: np.zeros(math.prod(shape)) for name, shape in SIZES.items()})
    scales = []
    for step in range(6):
        grads = {n: rng.standard_normal(p.size).astype(np.float32) for n, p in plain.p.items()}
        factor = float(executor.read("scale")[0])
        for name, gradient in grads.items():
            executor.write(f"{name}.g", gradient * np.float32(np.inf if step == 1 else factor))
        executor.write("loss", np.array([1.0]))
        executor.run("update")
        scales.append(float(executor.read("scale")[0]))
        if step != 1:
            assert read_state(executor)["grad_norm"] == pytest.approx(plain.step(grads, 1.0), rel=1e-6)
    assert scales == [64, 32, 32, 32, 64, 64]
    assert read_state(executor)["skipped"] == 1
    for name in SIZES:
        assert relative(executor.read(f"{name}.p"), plain.p[name]) <= 1e-6
    executor.close()
