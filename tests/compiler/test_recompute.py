"""Recomputation: the same bits for less memory, and half precision where it may be, for less still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu.compiler.memory import FittedPlan
from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.compiler.recompute import Fate, Recompute, handed_on, rewrite
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.ops.half import halvable
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import config_of, gradients, run_micro_batches
from tests.helpers.tiny import make_data, make_model

ELEMENTWISE = ("rms_norm", "rope", "swiglu", "dropout")


def by_hand(graph: Graph, elementwise: int = 0, whole: int = 0, fp16: bool = False) -> Recompute:
    """Elementwise ops of the first so many layers, or all of their ops, computed again; the rest in half precision."""
    kept, fates = handed_on(graph), dict[Any, Fate]()
    for node in (n for n in graph.nodes if n.phase == "forward" and n.output.updates is None):
        fixed = node.layer is None or any(t.id in kept for t in node.outputs)
        if not fixed and (node.layer < whole or (node.layer < elementwise and node.op in ELEMENTWISE)):
            fates[node] = "recompute"
        elif fp16 and halvable(node.output) and (node.layer is not None or node.output.id in kept):
            fates[node] = "fp16"
    return Recompute(fates)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sizes that f16 and int8 products take: multiples of 64."""
    path = tmp_path_factory.mktemp("recompute")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "vocab_size": 96, "num_hidden_layers": 3}
    make_model(path / "model", **sizes)
    make_data(path / "train.jsonl", vocab=96)
    return path


def micro_batches(
    folder: Path, output: Path, kernels: Any, monkeypatch: Any, hand: dict[str, Any], **options: Any
) -> Any:
    """(loss, gradients, peak bytes) of a step's micro-batches, planned by hand."""

    def planned(graphs: Any, caps: Any, options: Any) -> Any:
        choice = by_hand(graphs["micro"], **hand)
        rewritten = {name: rewrite(graph, choice) for name, graph in graphs.items()}
        assert any(n.op == "to_half" for n in rewritten["micro"].nodes) == hand.get("fp16", False)
        return FittedPlan(make_plan(rewritten, caps), rewritten, choice)

    monkeypatch.setattr("entrenar_gpu.session.graphs.fit", planned)
    trainer = Trainer(config_of(folder, str(output), accumulate=2, **options), kernels=kernels)
    try:
        if "rng" in trainer.executor.tensors:
            trainer.executor.write("rng", np.array([0, 1, 0]))
        rng = np.random.default_rng(0)
        for name, shape in trainer.session.trainable().items():
            if "lora_B" in name:  # from zero on, no gradient reaches A
                trainer.executor.write(name, 0.1 * rng.standard_normal(shape))
        run_micro_batches(trainer, next(trainer.batches))
        return trainer.executor.read("loss"), gradients(trainer), trainer.session.plan.peak_bytes
    finally:
        trainer.session.close()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["qlora", "full"])
def test_every_level_gives_the_same_bits(folder, tmp_path, kernels, monkeypatch, method):
    """Loss and every gradient, dropout included: its masks are drawn again from the same counters."""
    hands = [{}, {"elementwise": 2}, {"elementwise": 3}, {"elementwise": 3, "whole": 1}, {"whole": 3}]
    runs = [
        micro_batches(folder, tmp_path / str(number), kernels, monkeypatch, hand, method=method, dropout=0.2)
        for number, hand in enumerate(hands)
    ]
    loss, grads, peak = runs[0]
    assert np.isfinite(loss[0])
    for hand, (other_loss, others, _) in zip(hands, runs, strict=True):
        assert other_loss.tobytes() == loss.tobytes(), hand
        for name, gradient in grads.items():
            np.testing.assert_array_equal(others[name], gradient, err_msg=f"{name} at {hand}")
    assert runs[-1][2] < peak


def distances(run: Any, other: Any) -> dict[str, float]:
    """How far each gradient of one run is from the other's, relative."""
    return {name: float(np.linalg.norm(run[1][name] - g) / np.linalg.norm(g)) for name, g in other[1].items()}


@pytest.mark.gpu
def test_half_precision_leaves_the_loss_and_rounds_the_gradients(folder, tmp_path, kernels, monkeypatch):
    """The forward pass reads what it made: its loss has the same bits. The backward pass reads activations that are
    off by 2^-12 of each at most, and a gradient is made of products of a few of them."""
    kept = micro_batches(folder, tmp_path / "keep", kernels, monkeypatch, {})
    half = micro_batches(folder, tmp_path / "fp16", kernels, monkeypatch, {"elementwise": 3, "fp16": True})
    assert kept[0].tobytes() == half[0].tobytes()
    assert half[2] < kept[2]
    for name, distance in distances(half, kept).items():
        assert 1e-5 < distance < 8 * 2.0**-12, f"{name}: {distance:.1e}"


@pytest.mark.gpu
def test_half_precision_rounds_less_than_int8_does(folder, tmp_path, kernels, monkeypatch):
    """What moves by 2^-12 is one time in sixty quantised to the next of 127 steps, which makes half of the noise that
    all steps make (the root of 12 / 60)."""
    hand = {"elementwise": 3, "fp16": True}
    exact = micro_batches(folder, tmp_path / "f32", kernels, monkeypatch, {})
    kept = micro_batches(folder, tmp_path / "keep", kernels, monkeypatch, {}, precision="int8")
    half = micro_batches(folder, tmp_path / "fp16", kernels, monkeypatch, hand, precision="int8")
    assert kept[0].tobytes() == half[0].tobytes()
    moved, off = distances(half, kept), distances(kept, exact)
    assert 1e-5 < np.mean([*moved.values()]) < np.mean([*off.values()]) / 2
