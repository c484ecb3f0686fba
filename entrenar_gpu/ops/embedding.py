"""Rows of a table by index, and the gradient that goes back to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, grid_of, reads, writes
from entrenar_gpu.ops.elementwise import copy_launch
from entrenar_gpu.ops.registry import (
    GradientContext,
    Gradients,
    Op,
    Placement,
    Spec,
    in_place,
    record,
    register,
    same_as,
)


def embedding(ids: Tensor, shards: Sequence[Tensor], order: Tensor | None = None) -> Tensor:
    """The rows `ids` u32 [T] of a table [V, D] held as consecutive shards of rows, in f32, bf16 or half:
    f32 [T, D].

    `order` u32 [T], a stable argsort of the ids, is needed to differentiate with respect to the table: its gradient
    is a sum over runs of equal ids, so that no two invocations add to one row and the order of the sum is fixed.
    """
    return record("embedding", ids=ids, order=order, shards=list(shards))[0]


def _infer(node: Node) -> Sequence[Spec]:
    return [((node.inputs["ids"].size, node.inputs["shards.0"].columns), "f32")]


def _reference(
    node: Node, ids: np.ndarray, shards: Sequence[np.ndarray], order: np.ndarray | None = None
) -> Sequence[np.ndarray]:
    kind = np.float64 if shards[0].dtype == np.float64 else np.float32
    table = shards[0] if len(shards) == 1 else np.concatenate(shards)
    return [table[ids.reshape(-1)].astype(kind)]


def shard_starts(shards: Sequence[Tensor]) -> list[int]:
    """First row of each shard."""
    return [sum(p.shape[0] for p in shards[:i]) for i in range(len(shards))]


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    ids, shards, launches = node.inputs["ids"], node.group("shards"), []
    for shard, start in zip(shards, shard_starts(shards), strict=True):
        constants = {
            "mode": "gather",
            "T": ids.size,
            "D": shard.columns,
            "first": start,
            "rows": shard.shape[0],
            "format": shard.dtype,
        }
        bindings = (reads("ids", ids), reads("table", shard), writes("out", node.output))
        launches.append(Launch("embedding", bindings, constants, grid_of(ids.size, caps)))
    return launches


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    ids, order, shards = node.inputs["ids"], node.inputs.get("order"), node.group("shards")
    grads: list[Tensor | None] = []
    for shard, start in zip(shards, shard_starts(shards), strict=True):
        if not context.wanted(shard):
            grads.append(None)
            continue
        if order is None:
            raise ValueError(f"{node.label()}: needs the order of the ids to differentiate the table")
        held = context.take(shard)
        total = record("embedding_grad", held=held, dy=upstream[0], ids=ids, order=order, first=start)[0]
        grads.append(in_place(total, held) if held.persistent or held.updates is not None else total)
    return {"shards": grads}


def _grad_reference(
    node: Node, held: np.ndarray, dy: np.ndarray, ids: np.ndarray, order: np.ndarray
) -> Sequence[np.ndarray]:
    rows = ids.reshape(-1).astype(np.int64)[order.reshape(-1)] - node.attrs["first"]
    inside = (rows >= 0) & (rows < len(held))
    total = held.copy()
    np.add.at(total, rows[inside], dy[order.reshape(-1)[inside]])
    return [total]


def _grad_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    held, dy, ids, order = node.inputs.values()
    copies = [] if placed.aliased(node.output, held) else [copy_launch(held, node.output, caps)]
    constants = {"mode": "scatter", "T": ids.size, "D": held.columns, "first": node.attrs["first"]}
    constants |= {"rows": held.shape[0], "format": "f32"}
    bindings = (reads("ids", ids), reads("order", order), reads("dy", dy), writes("out", node.output))
    return [*copies, Launch("embedding", bindings, constants, grid_of(ids.size, caps))]


register(Op("embedding", _infer, _reference, _launch, _gradient))
register(
    Op(
        "embedding_grad",
        same_as("held"),
        _grad_reference,
        _grad_launch,
        flops=lambda node: node.inputs["dy"].size,
        inplace=lambda node: [(0, "held")],
    )
)
