"""Launches of a decoder's pass made fewer: a token costs about as many of them as it costs arithmetic.

A pass over a graph without gradients, under the contract of `fuse.py`: gemv of one x that follow one another
become one node, two of them and the gate behind them too, and what is done to queries and keys before a cache becomes
one with writing it. A node binds no more buffers than the device has; what does not fit stays as it is.
"""

from __future__ import annotations

from collections import Counter

from entrenar_gpu.graph import Caps, Graph, Node
from entrenar_gpu.ops.activations import GATES
from entrenar_gpu.ops.cache_heads import cache_heads_node
from entrenar_gpu.ops.gemm.gemv import alike, bindings_of, can_merge, merged_gemv


def fuse_rows(graph: Graph, caps: Caps) -> None:
    """Rewrites the nodes of a graph in place."""
    readers = Counter(t.id for node in graph.nodes for t in node.inputs.values())
    pending, fused = list(graph.nodes), list[Node]()
    while pending:
        taken, node = _next(pending, readers, caps)
        del pending[:taken]
        for output in node.outputs:
            output.node = node
        fused.append(node)
    graph.nodes[:] = fused


def _next(nodes: list[Node], readers: Counter[int], caps: Caps) -> tuple[int, Node]:
    """How many of the first nodes one takes the place of, and that one."""
    heads = cache_heads_node(*nodes[:3]) if len(nodes) > 2 and readers[nodes[1].output.id] == 1 else None
    if heads is not None and len(heads.inputs) < caps.max_storage_buffers:  # the output is one more
        return 3, heads
    run = 0
    while run < len(nodes) and can_merge(nodes[run]) and alike(nodes[0], nodes[run]):
        run += 1
    if run == 2 and run < len(nodes) and _is_gate(nodes[0], nodes[1], nodes[2], readers):
        merged = merged_gemv(nodes[:2], gate=nodes[2])
        if bindings_of(merged) <= caps.max_storage_buffers:
            return 3, merged
    for count in range(run, 1, -1):
        merged = merged_gemv(nodes[:count])
        if bindings_of(merged) <= caps.max_storage_buffers:
            return count, merged
    return 1, nodes[0]


def _is_gate(first: Node, second: Node, node: Node, readers: Counter[int]) -> bool:
    """Whether a node is a gate of two products that nobody else reads."""
    if node.op not in GATES or (node.inputs["gate"], node.inputs["up"]) != (first.output, second.output):
        return False
    shapes = first.output.shape == second.output.shape
    return shapes and all(readers[n.output.id] == 1 and n.output.updates is None for n in (first, second))
