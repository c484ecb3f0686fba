"""Queries and keys normalised and rotated, and keys and values put into a cache, in one launch.

What `norm_rope` (or `rope`) of queries and of keys and `cache_write` do one after the other: a decoder's pass over a
token costs its launches. `compiler/fuse_rows.py` puts it in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, grid_of, literal, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.norm import offset_literal
from entrenar_gpu.ops.registry import OPS, Op, Placement, Spec, register

THREADS = 64  # of a head


def cache_heads_node(q: Node, k: Node, write: Node) -> Node | None:
    """The node that does what these three do; None where they are not two rotations of whole heads and their write."""
    plain = q.op in ("norm_rope", "rope") and k.op == q.op and write.op == "cache_write" and q.attrs == k.attrs
    if not plain or any(q.attrs.get(name) for name in ("inverse", "interleaved", "head_dim")):
        return None
    shared = [q.inputs["table"], q.inputs["positions"], k.output]
    if shared != [k.inputs["table"], k.inputs["positions"], write.inputs["k"]]:
        return None
    if q.inputs["positions"] is not write.inputs["positions"]:
        return None
    inputs = {"q": q.inputs["x"], "k": k.inputs["x"], "table": q.inputs["table"]}
    inputs |= {name: write.inputs[name] for name in ("v", "keys", "values", "slots", "positions")}
    if q.op == "norm_rope":
        inputs |= {"q_weight": q.inputs["weight"], "k_weight": k.inputs["weight"]}
    attrs = {name: q.attrs[name] for name in ("eps", "offset") if name in q.attrs}
    return Node("cache_heads", inputs, attrs, (q.output, *write.outputs), write.scope, write.layer, write.phase)


def _infer(node: Node) -> Sequence[Spec]:
    q, keys, values = (node.inputs[name] for name in ("q", "keys", "values"))
    return [(q.shape, "f32"), (keys.shape, keys.dtype), (values.shape, values.dtype)]


def _reference(
    node: Node,
    q: np.ndarray,
    k: np.ndarray,
    table: np.ndarray,
    positions: np.ndarray,
    q_weight: np.ndarray | None = None,
    k_weight: np.ndarray | None = None,
    **cache: np.ndarray,
) -> Sequence[np.ndarray]:
    rotated = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        if weight is not None:
            x = OPS["rms_norm"].reference(node, x, weight)[0]
        rotated.append(OPS["rope"].reference(Node("rope", {}, {"inverse": False}), x, table, positions)[0])
    return [rotated[0], *OPS["cache_write"].reference(node, k=rotated[1], positions=positions, **cache)]


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    q, k, table, keys = (node.inputs[name] for name in ("q", "k", "table", "keys"))
    own, e, normed = placed.aliased(node.output, q), table.columns, "q_weight" in node.inputs
    if not all(
        placed.aliased(out, node.inputs[n]) for out, n in zip(node.outputs[1:], ("keys", "values"), strict=True)
    ):
        raise ValueError(f"{node.label()}: caches are written where they lie")
    constants: dict[str, Any] = {
        "T": q.rows,
        "H": q.columns // e,
        "K": k.columns // e,
        "E": e,
        "SLOTS": keys.shape[0],
        "CONTEXT": keys.shape[1],
        "POSITIONS": table.rows,
        "element": keys.dtype,
        "source": "out" if own else "q",
        "normed": normed,
        "eps": literal(node.attrs["eps"]) if normed else "",
        "offset": offset_literal(node),
        "EACH": ceil_div(e // 2, THREADS),
        "WIDTH": THREADS,
    }
    names = ["k", "v", "table", "positions", "slots", *(("q_weight", "k_weight") if normed else ())]
    bindings = [*([] if own else [reads("q", q)]), *(reads(name, node.inputs[name]) for name in names)]
    made = zip(("out", "keys", "values"), node.outputs, strict=True)
    bindings += [writes(name, output) for name, output in made]
    groups = q.rows * (constants["H"] + 2 * constants["K"])
    return [Launch("cache_heads", tuple(bindings), constants, grid_of(groups, caps), trusted=True)]


register(
    Op(
        "cache_heads",
        _infer,
        _reference,
        _launch,
        flops=lambda node: 8 * node.output.size,
        inplace=lambda node: [(0, "q"), (1, "keys"), (2, "values")],
    )
)
