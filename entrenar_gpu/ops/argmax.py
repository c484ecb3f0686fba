"""Where the largest value of each row is: what greedy decoding goes on with, without logits that travel to the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.registry import Op, Placement, Spec, record, register

CHUNK = 4096  # values of a row that a workgroup goes through
NOT_FINITE = 0xFFFFFFFF  # in place of an index


def argmax(x: Tensor) -> Tensor:
    """The index of the largest value of each row of f32 [.., N], the first of equal ones, u32 [..].

    NOT_FINITE for a row whose largest value is not finite, or that has a NaN.
    """
    return record("argmax", x=x)[0]


def _reference(node: Node, x: np.ndarray) -> Sequence[np.ndarray]:
    return [np.where(np.isfinite(x.max(-1)), x.argmax(-1), NOT_FINITE).astype(np.uint32)]


def _workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    """Of each chunk of each row: its largest value, as a number that orders as values do, and where it is."""
    x = node.inputs["x"]
    chunks = ceil_div(x.columns, CHUNK)
    return [((x.rows, chunks, 2), "u32")] if chunks > 1 else []


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    x = node.inputs["x"]
    chunks = ceil_div(x.columns, CHUNK)
    sizes = {"ROWS": x.rows, "N": x.columns, "CHUNK": CHUNK, "CHUNKS": chunks}
    target = placed.workspace[0] if placed.workspace else node.output
    bindings = (reads("x", x), writes("found" if placed.workspace else "out", target))
    launches = [Launch("argmax", bindings, sizes | {"mode": "values"}, (chunks, x.rows, 1), trusted=True)]
    if placed.workspace:
        joined = (reads("found", target), writes("out", node.output))
        launches.append(Launch("argmax", joined, sizes | {"mode": "chunks"}, (1, x.rows, 1), trusted=True))
    return launches


register(
    Op(
        "argmax",
        lambda node: [(node.inputs["x"].shape[:-1], "u32")],
        _reference,
        _launch,
        workspace=_workspace,
        flops=lambda node: node.inputs["x"].size,
    )
)
