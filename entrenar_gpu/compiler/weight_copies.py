"""Copies of frozen weights in the format that products multiply, kept on the device where memory is left over.

A matmul in f16 or int8 makes a low-precision copy of its NF4 weight each time it runs (ops/gemm/linear.py): a tenth of
a step of Qwen3-4B's shape at 1x512. The weights never change. With memory to spare the copies are made once, after
loading, by a graph of their own, and hold the same bits, so that no result depends on how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from entrenar_gpu import ops
from entrenar_gpu.compiler.memory import FittedPlan
from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.graph import Caps, Graph, Node, Tensor
from entrenar_gpu.ops.gemm.linear import has_panels, reading, weight_of
from entrenar_gpu.ops.gemm.low_precision import low_precision_weight
from entrenar_gpu.ops.quantize import Nf4Tensors

GRAPH = "weight_copies"  # runs once, when the weights are on the device
PARTS = (".low_precision", ".low_precision_scales", ".transposed", ".transposed_scales")  # what copies' names end with

Key = tuple[str, bool]  # the name of a weight, and whether the copy is transposed


def keep_copies(fitted: FittedPlan, budget_bytes: int) -> FittedPlan:
    """The same with as many copies as the budget leaves room for, and the graph that makes them."""
    plan = fitted.plan
    chosen, left = dict[Key, Node](), budget_bytes - plan.peak_bytes
    for key, node in _products(fitted.graphs).items():
        nbytes = sum(t.nbytes for t in _copy(Graph(), key, node, plan.caps))
        if nbytes <= left:
            chosen[key] = node
            left -= nbytes
    while chosen:
        rewritten = _rewritten(fitted.graphs, chosen, plan.caps)
        larger = make_plan(rewritten, plan.caps, plan.options)
        if larger.peak_bytes <= budget_bytes:
            return FittedPlan(larger, rewritten, fitted.recompute)
        chosen.popitem()  # without its workspace a node may be packed worse, by chance
    return fitted


def _products(graphs: Mapping[str, Graph]) -> dict[Key, Node]:
    """A product for each weight and direction. Transposed ones first: they take twice as long to make."""
    nodes = [n for graph in graphs.values() for n in graph.nodes if n.op == "linear"]
    return {_key(n): n for n in sorted(nodes, key=lambda n: not n.attrs["transposed"])}


def _key(node: Node) -> Key:
    return weight_of(node)[0].name.removesuffix(".codes"), node.attrs["transposed"]


def _copy(graph: Graph, key: Key, node: Node, caps: Caps) -> tuple[Tensor, ...]:
    """Records what makes the copy that a node reads, which stays in persistent tensors of the graph."""
    (name, transposed), attrs = key, node.attrs
    parts = tuple(graph.tensor(t.name, t.shape, t.dtype, t.role) for t in weight_of(node))
    with graph.within(name):
        made = low_precision_weight(
            Nf4Tensors(attrs["shape"], parts, attrs["rounded"]),
            attrs["arithmetic"],
            transposed,
            has_panels(node, caps),
        )
    suffixes = PARTS[2:] if transposed else PARTS[:2]
    return tuple(ops.keep(t, f"{name}{suffix}") for t, suffix in zip(made, suffixes, strict=False))


def _rewritten(graphs: Mapping[str, Graph], chosen: Mapping[Key, Node], caps: Caps) -> dict[str, Graph]:
    """The graphs with products that read the chosen copies, after the graph that makes these."""
    maker = Graph(GRAPH)
    copies = {key: [t.updates for t in _copy(maker, key, node, caps)] for key, node in chosen.items()}
    result = {GRAPH: maker}
    for name, graph in graphs.items():
        copied = replace(graph, nodes=[], persistents=dict(graph.persistents))
        for node in graph.nodes:
            kept = copies.get(_key(node), []) if node.op == "linear" else []
            tensors = [copied.tensor(t.name, t.shape, t.dtype, t.role) for t in kept if t is not None]
            copied.append(reading(node, tensors) if tensors else node)
        result[name] = copied
    return result
