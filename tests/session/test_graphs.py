"""The graphs of a run: evaluation and last-token logits do what a forward pass takes, and nothing for gradients."""

from __future__ import annotations

from collections import Counter

import pytest

from entrenar_gpu.adapters import AdapterSpec
from entrenar_gpu.compiler.autodiff import backward
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.graph.caps import Caps
from entrenar_gpu.graph.tensor import Graph, Node
from entrenar_gpu.model import ModelConfig, Storage, parse_model_config
from entrenar_gpu.ops.registry import OPS
from entrenar_gpu.session.graphs import RunShape, evaluate_graph, logits_graph, micro_graph
from tests.helpers.tiny import QWEN3

MATRIX_OPS = ("matmul", "linear", "attention", "cross_entropy")
CAPS = Caps(f16=True)
RAW = {**QWEN3, "head_dim": 64, "intermediate_size": 192}
MODEL = parse_model_config(RAW, "a test")
RUNS = [(method, precision) for method in ("qlora", "lora", "full") for precision in ("f32", "f16", "int8")]


def shape_of(method: str, precision: str) -> RunShape:
    config = TrainConfig(method=method, precision=precision, batch=2, seq=64, rank=8)
    adapters = {} if method == "full" else AdapterSpec.from_config(config, MODEL).modules
    return RunShape(MODEL, Storage(method, adapters=adapters), config)


def matrix_flops(nodes: list[Node]) -> int:
    return sum(OPS[n.op].flops(n) for n in nodes if n.op in MATRIX_OPS)


def forward_flops(model: ModelConfig, rows: int, seq: int, rank: int) -> int:
    """Of the matmuls of a forward pass, from the model's sizes alone; of S x S scores half are attended."""
    tokens, d, f = rows * seq, model.hidden_size, RAW["intermediate_size"]
    heads, kv_heads, e = RAW["num_attention_heads"], RAW["num_key_value_heads"], RAW["head_dim"]
    weights = [(heads * e, d), (kv_heads * e, d), (kv_heads * e, d), (d, heads * e), (f, d), (f, d), (d, f)]
    sums = sum(n * k + rank * (n + k) for n, k in weights)
    attended = 2 * rows * heads * seq * seq * e
    return len(model.layers) * (2 * tokens * sums + attended) + 2 * tokens * d * model.vocab_size


@pytest.mark.parametrize(("method", "precision"), RUNS)
def test_evaluation_takes_a_forward_pass_and_nothing_else(method, precision):
    shape = shape_of(method, precision)
    evaluate, micro = evaluate_graph(shape, CAPS), micro_graph(shape, CAPS)
    assert matrix_flops(evaluate.nodes) == forward_flops(MODEL, 2, 64, 0 if method == "full" else 8)
    forward = Counter(n.op for n in micro.nodes if n.phase == "forward")
    assert Counter(n.op for n in evaluate.nodes) == forward - Counter(["mul"])  # by 1 / tokens: sums are reported
    assert not [t for t in evaluate.persistents.values() if t.requires_grad or t.role == "grad"]


@pytest.mark.parametrize(("method", "precision"), RUNS)
def test_evaluation_computes_the_loss_as_training_does(method, precision):
    shape = shape_of(method, precision)
    found = [
        next(n.attrs["arithmetic"] for n in graph.nodes if n.op == "cross_entropy")
        for graph in (evaluate_graph(shape, CAPS), micro_graph(shape, CAPS))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_logits_hold_no_gradients(method):
    graph = logits_graph(shape_of(method, "f32"), CAPS)
    assert not [t for t in graph.persistents.values() if t.requires_grad or t.role == "grad"]


def test_a_graph_without_gradients_is_not_differentiated():
    graph = Graph("evaluate", differentiable=False)
    parameter = graph.parameter("w", (3,))
    with pytest.raises(ValueError, match="evaluate: recorded without gradients"):
        backward(parameter, [parameter])
