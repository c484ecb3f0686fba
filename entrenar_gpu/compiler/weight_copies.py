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
from entrenar_gpu.ops.gemm.linear import has_panels, knowing, product_sizes, reading, weight_of
from entrenar_gpu.ops.gemm.low_precision import low_precision_weight
from entrenar_gpu.ops.gemm.rotated import rotated_largest
from entrenar_gpu.ops.quantize import Nf4Tensors

GRAPH = "weight_copies"  # runs once, when the weights are on the device
PARTS = (".low_precision", ".low_precision_scales", ".transposed", ".transposed_scales")  # what copies' names end with

LARGEST = {False: ".largest", True: ".transposed_largest"}  # of a copy's rows

Key = tuple[str, bool]  # the name of a weight, and whether the copy is transposed


def keep_copies(fitted: FittedPlan, budget_bytes: int, fill_bytes: int | None = None) -> FittedPlan:
    """The same with as many copies as the budget leaves room for, and the graph that makes them.

    Copies fill memory up to `fill_bytes` only, where that is given.

    Where tensors are computed again for want of memory no copy is kept. In int8 by rows products without a copy are
    at least told the largest values of its rows, which spares each a pass over its weight.
    """
    plan, products = fitted.plan, _products(fitted.graphs)
    fill_bytes = budget_bytes if fill_bytes is None else min(fill_bytes, budget_bytes)
    told = {key: node for key, node in products.items() if _has_largest(node)}
    chosen, left = dict[Key, Node](), fill_bytes - plan.peak_bytes - largest_bytes(fitted.graphs)
    for key, node in products.items() if not fitted.recompute.fates else ():
        nbytes = sum(t.nbytes for t in _copy(Graph(), key, node, plan.caps))
        if nbytes <= left:
            chosen[key] = node
            left -= nbytes
    while chosen or told:
        rewritten = _rewritten(fitted.graphs, chosen, told, plan.caps)
        larger = make_plan(rewritten, plan.caps, plan.options)
        if larger.peak_bytes <= (fill_bytes if chosen else budget_bytes):
            return FittedPlan(larger, rewritten, fitted.recompute)
        if chosen:
            chosen.popitem()  # without its workspace a node may be packed worse, by chance
        else:
            told = {}
    return fitted


def largest_bytes(graphs: Mapping[str, Graph]) -> int:
    """What the largest values of the rows of all copies take, which only int8 by rows wants."""
    return sum(4 * product_sizes(node)[1] for node in _products(graphs).values() if _has_largest(node))


def _has_largest(node: Node) -> bool:
    return node.attrs["arithmetic"] == "int8_rows"


def _products(graphs: Mapping[str, Graph]) -> dict[Key, Node]:
    """A product for each weight and direction. Transposed ones first: they take twice as long to make."""
    nodes = [n for graph in graphs.values() for n in graph.nodes if n.op == "linear"]
    return {_key(n): n for n in sorted(nodes, key=lambda n: not n.attrs["transposed"])}


def _key(node: Node) -> Key:
    return weight_of(node)[0].name.removesuffix(".codes"), node.attrs["transposed"]


def _copy(graph: Graph, key: Key, node: Node, caps: Caps) -> tuple[Tensor, ...]:
    """Records what makes the copy that a node reads, which stays in persistent tensors of the graph."""
    (name, transposed), arithmetic = key, node.attrs["arithmetic"]
    weight = _declared(graph, node)
    with graph.within(name):
        made = low_precision_weight(weight, arithmetic, transposed, has_panels(node, caps))
    suffixes = PARTS[2:] if transposed else PARTS[:2]
    return tuple(ops.keep(t, f"{name}{suffix}") for t, suffix in zip(made, suffixes, strict=False))


def _largest(graph: Graph, key: Key, node: Node) -> Tensor:
    """Records what makes the largest values of a copy's rows, which stay in a persistent tensor of the graph."""
    name, transposed = key
    weight = _declared(graph, node)
    with graph.within(name):
        return ops.keep(rotated_largest(weight, transposed), f"{name}{LARGEST[transposed]}")


def _declared(graph: Graph, node: Node) -> Nf4Tensors:
    """A node's weight in another graph."""
    parts = tuple(graph.tensor(t.name, t.shape, t.dtype, t.role) for t in weight_of(node))
    return Nf4Tensors(node.attrs["shape"], parts, node.attrs["rounded"])


def _rewritten(
    graphs: Mapping[str, Graph], chosen: Mapping[Key, Node], told: Mapping[Key, Node], caps: Caps
) -> dict[str, Graph]:
    """The graphs with products that read the chosen copies or else are told the largest values of their rows, after the
    graph that makes these."""
    maker = Graph(GRAPH)
    copies = {key: [t.updates for t in _copy(maker, key, node, caps)] for key, node in chosen.items()}
    largest = {key: _largest(maker, key, node).updates for key, node in told.items() if key not in chosen}
    result = {GRAPH: maker}
    for name, graph in graphs.items():
        copied = replace(graph, nodes=[], persistents=dict(graph.persistents))

        def here(tensor: Tensor, graph: Graph = copied) -> Tensor:
            return graph.tensor(tensor.name, tensor.shape, tensor.dtype, tensor.role)

        for node in graph.nodes:
            key = _key(node) if node.op == "linear" else None
            if key in copies:
                node = reading(node, [here(t) for t in copies[key] if t is not None])
            elif (held := largest.get(key) if key is not None else None) is not None:
                node = knowing(node, here(held))
            copied.append(node)
        result[name] = copied
    return result
