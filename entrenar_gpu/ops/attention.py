"""Causal grouped-query attention within the segments of packed rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, grid_of, reads, writes
from entrenar_gpu.ops.elementwise import literal
from entrenar_gpu.ops.registry import GradientContext, Op, Spec, record, register

Aliased = Callable[[Tensor, Tensor], bool]
BLOCK = 32  # tokens a tile, as in _attention.wgsl
BUSY_WORKGROUPS = 1024  # below this many a large GPU has idle multiprocessors


def attention(q: Tensor, k: Tensor, v: Tensor, segment_start: Tensor, rows: int, heads: int, kv_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, where a query sees the keys of its row from its segment's start up to itself.

    q [T, H*E], k and v [T, K*E] with T = rows * S; H a multiple of K: query head h reads key/value head h // (H/K)
    (Ainslie et al., arXiv 2305.13245). segment_start u32 [T], positions within the row. Returns [T, H*E].
    """
    return record("attention", q, k, v, segment_start, rows=rows, heads=heads, kv_heads=kv_heads)[0]


def _shape(node: Node) -> dict[str, int]:
    """The letters of model_config.py for this node."""
    q = node.inputs[0]
    heads, kv_heads, rows = node.attrs["heads"], node.attrs["kv_heads"], node.attrs["rows"]
    return {"B": rows, "S": q.rows // rows, "H": heads, "K": kv_heads, "E": q.columns // heads}


def _infer(node: Node) -> Sequence[Spec]:
    q, k, v, segment_start = node.inputs
    s = _shape(node)
    tokens = s["B"] * s["S"]
    if k.shape != v.shape or k.columns != s["K"] * s["E"] or segment_start.size != tokens or s["H"] % s["K"]:
        raise ValueError(f"{node.label()}: {q!r}, {k!r}, {v!r}, {segment_start!r} do not fit {s}")
    return [(q.shape, "f32"), ((tokens, s["H"]), "f32")]


def _split(s: dict[str, int], x: np.ndarray) -> np.ndarray:
    """[B*S, n*E] -> [B, H, S, E], key/value heads repeated for their group."""
    heads = x.reshape(s["B"], s["S"], -1, s["E"]).transpose(0, 2, 1, 3)
    return np.repeat(heads, s["H"] // heads.shape[1], axis=1)


def _join(x: np.ndarray, like: np.ndarray, group: int) -> np.ndarray:
    """Back from [B, H, S, E], summing what `_split` repeated."""
    b, h, s, e = x.shape
    return x.reshape(b, h // group, group, s, e).sum(axis=2).transpose(0, 2, 1, 3).reshape(like.shape)


def _weights(s: dict[str, int], q: np.ndarray, k: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(softmax weights [B, H, S, S], lse [B, H, S])."""
    scores = _split(s, q) @ _split(s, k).swapaxes(-1, -2) * q.dtype.type(1 / math.sqrt(s["E"]))
    place = np.arange(s["S"])
    seen = (place[None, :] <= place[:, None]) & (place >= segments.reshape(s["B"], s["S"], 1))
    scores = np.where(seen[:, None], scores, q.dtype.type(-np.inf))
    peak = scores.max(axis=-1, keepdims=True)
    e = np.exp(scores - peak)
    total = e.sum(axis=-1, keepdims=True)
    return e / total, (peak + np.log(total))[..., 0]


def _reference(node: Node, q: np.ndarray, k: np.ndarray, v: np.ndarray, seg: np.ndarray) -> Sequence[np.ndarray]:
    s = _shape(node)
    weights, lse = _weights(s, q, k, seg)
    out = _join(weights @ _split(s, v), q, 1)
    return [out, lse.transpose(0, 2, 1).reshape(-1, s["H"])]


def _constants(node: Node) -> dict[str, Any]:
    s = _shape(node)
    return {**s, "scale": literal(1 / math.sqrt(s["E"]))}


def _vector(node: Node) -> int:
    """Width in which head vectors are bound."""
    return 4 if _shape(node)["E"] % 4 == 0 else 1


def _launch(node: Node, caps: Caps, aliased: Aliased) -> Sequence[Launch]:
    s, width = _shape(node), _vector(node)
    bindings = [reads(n, t, width) for n, t in zip(("q", "k", "v"), node.inputs, strict=False)]
    bindings += [reads("segment_start", node.inputs[3])]
    bindings += [writes("out", node.outputs[0], width), writes("lse", node.outputs[1])]
    grid = (-(-s["S"] // BLOCK), s["H"], s["B"])
    return [Launch("attention", tuple(bindings), _constants(node), grid)]


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Sequence[Tensor | None]:
    q, k, v, segment_start = node.inputs
    out, lse = node.outputs
    (statistics,) = record("attention_statistics", out, upstream[0], lse)
    dq, dk, dv = record("attention_grad", q, k, v, upstream[0], statistics, segment_start, **node.attrs)
    return [dq, dk, dv, None]


def _statistics_reference(node: Node, out: np.ndarray, dout: np.ndarray, lse: np.ndarray) -> Sequence[np.ndarray]:
    tokens, heads = lse.shape
    return [np.stack([lse, (out * dout).reshape(tokens, heads, -1).sum(axis=-1)])]


def _statistics_launch(node: Node, caps: Caps, aliased: Aliased) -> Sequence[Launch]:
    out, dout, lse = node.inputs
    constants = {"ROWS": lse.size, "E": out.size // lse.size}
    bindings = (reads("out", out), reads("dout", dout), reads("lse", lse), writes("statistics", node.output))
    return [Launch("attention_statistics", bindings, constants, grid_of(-(-lse.size // 64), caps))]


def _grad_reference(
    node: Node,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    statistics: np.ndarray,
    segments: np.ndarray,
) -> Sequence[np.ndarray]:
    s = _shape(node)
    group = s["H"] // s["K"]
    weights, _ = _weights(s, q, k, segments)
    d_heads, delta = _split(s, dout), statistics[1].reshape(s["B"], s["S"], s["H"]).transpose(0, 2, 1)
    slopes = (
        weights * (d_heads @ _split(s, v).swapaxes(-1, -2) - delta[..., None]) * q.dtype.type(1 / math.sqrt(s["E"]))
    )
    return [
        _join(slopes @ _split(s, k), q, 1),
        _join(slopes.swapaxes(-1, -2) @ _split(s, q), k, group),
        _join(weights.swapaxes(-1, -2) @ d_heads, v, group),
    ]


def _splits_groups(node: Node, caps: Caps) -> bool:
    """Whether dk and dv are computed by query head and then summed: where key blocks alone would leave a GPU idle."""
    s = _shape(node)
    return s["H"] > s["K"] and s["B"] * s["K"] * -(-s["S"] // BLOCK) < BUSY_WORKGROUPS and not caps.software


def _grad_workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    return [(node.inputs[0].shape, "f32")] * 2 if _splits_groups(node, caps) else []


def _grad_launch(node: Node, caps: Caps, aliased: Aliased) -> Sequence[Launch]:
    s, width = _shape(node), _vector(node)
    inputs = [reads(n, t, width) for n, t in zip(("q", "k", "v", "dout"), node.inputs, strict=False)]
    inputs += [reads("statistics", node.inputs[4]), reads("segment_start", node.inputs[5])]
    dq, dk, dv = node.outputs
    blocks, group = -(-s["S"] // BLOCK), s["H"] // s["K"]
    query = Launch(
        "attention_grad",
        (*inputs, writes("dq", dq, width)),
        {**_constants(node), "mode": "query", "MEMBERS": group},
        (blocks, s["H"], s["B"]),
    )
    members, (to_k, to_v) = (1, node.workspace) if node.workspace else (group, (dk, dv))
    key = Launch(
        "attention_grad",
        (*inputs, writes("dk", to_k, width), writes("dv", to_v, width)),
        {**_constants(node), "mode": "key", "MEMBERS": members},
        (blocks, s["H"] // members, s["B"]),
    )
    if not node.workspace:
        return [query, key]
    bindings = (reads("partial_k", to_k), reads("partial_v", to_v), writes("dk", dk), writes("dv", dv))
    constants = {"SIZE": dk.size, "E": s["E"], "GROUP": group}
    return [query, key, Launch("attention_group_sum", bindings, constants, grid_of(-(-dk.size // 256), caps))]


def _flops(products: int) -> Callable[[Node], int]:
    """Causal: half of each of the S x S products."""

    def count(node: Node) -> int:
        s = _shape(node)
        return products * s["B"] * s["H"] * s["S"] * s["S"] * s["E"]

    return count


register(Op("attention", _infer, _reference, _launch, _gradient, flops=_flops(2)))
register(
    Op(
        "attention_statistics",
        lambda node: [((2, *node.inputs[2].shape), "f32")],
        _statistics_reference,
        _statistics_launch,
        flops=lambda node: 2 * node.inputs[0].size,
    )
)
register(
    Op(
        "attention_grad",
        lambda node: [(t.shape, "f32") for t in node.inputs[:3]],
        _grad_reference,
        _grad_launch,
        workspace=_grad_workspace,
        flops=_flops(7),
    )
)
