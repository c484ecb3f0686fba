"""Where the time of a step went: groups of nodes to time, GPU ticks to host time, host time to spans.

A traced graph is cut into groups (phases, layers or single nodes). The GPU writes its clock between them; the ticks
come back with the step's report. WebGPU has no clock calibration: the offset between the two clocks comes from the
host times before and after the GPU reads its clock on an idle device, and is held to what must be true: no work of a
step begins before the host submitted it, none ends after its report arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from entrenar_gpu.graph import Node
from entrenar_gpu.ops.registry import OPS


@dataclass(frozen=True)
class TraceGroup:
    """Consecutive nodes timed together: `first` to `last` of a graph, both included."""

    first: int
    last: int
    phase: str
    layer: int | None
    name: str
    flops: int
    bytes: int
    shape: str


def trace_groups(nodes: Sequence[Node], level: str) -> list[TraceGroup]:
    """The groups of a graph at a level: runs of nodes of one phase, of one phase and layer, or single nodes."""
    if level == "step":
        return []
    groups: list[TraceGroup] = []
    start = 0
    for index in range(1, len(nodes) + 1):
        if index == len(nodes) or level == "kernel" or _key(nodes[index], level) != _key(nodes[start], level):
            groups.append(_group(nodes, start, index - 1, level))
            start = index
    return groups


def _key(node: Node, level: str) -> tuple[str, int | None]:
    return (node.phase, node.layer if level == "layer" else None)


def _group(nodes: Sequence[Node], first: int, last: int, level: str) -> TraceGroup:
    members, head = nodes[first : last + 1], nodes[first]
    layer = None if level == "phase" else head.layer
    name = head.label() if level == "kernel" else head.phase if layer is None else f"layer {layer}"
    moved = sum(t.nbytes for n in members for t in (*n.inputs.values(), *n.outputs))
    shape = "x".join(str(d) for d in head.output.shape) if level == "kernel" else ""
    return TraceGroup(first, last, head.phase, layer, name, sum(OPS[n.op].flops(n) for n in members), moved, shape)
