"""Causal grouped-query attention within the segments of packed rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar_gpu.graph import Binding, Caps, Launch, MatrixConfig, Node, Tensor, literal, reads, writes
from entrenar_gpu.integers import ceil_div, round_up
from entrenar_gpu.ops.attention_matrix import constants_of, forward_blocking, matrices_for
from entrenar_gpu.ops.gemm.launches import whole
from entrenar_gpu.ops.gemm.low_precision import low_precision_rows_launch
from entrenar_gpu.ops.gemm.tiles import Arithmetic
from entrenar_gpu.ops.registry import GradientContext, Gradients, Op, Placement, Spec, record, register


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_start: Tensor,
    rows: int,
    heads: int,
    kv_heads: int,
    precision: Arithmetic = "f32",
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v, where a query sees the keys of its row from its segment's start up to itself.

    q [T, H*E], k and v [T, K*E] with T = rows * S; H a multiple of K: query head h reads key/value head h // (H/K)
    (Ainslie et al., arXiv 2305.13245). segment_start u32 [T], positions within the row and in order. Returns [T, H*E].

    `scale` is 1 / sqrt(E) unless given. Of a `window` a query sees the last keys alone, itself included (Beltagy et
    al., arXiv 2004.05150). `softcap` c bends scores s to c tanh(s / c) (Bello et al., arXiv 1611.09940).

    With "f16" and "int8", on a device that has f16, the products of both passes take f16 operands and sum 32 of them in
    f16, then in f32 (docs/attention.md gives the error).
    """
    return record(
        "attention",
        q=q,
        k=k,
        v=v,
        segment_start=segment_start,
        rows=rows,
        heads=heads,
        kv_heads=kv_heads,
        low_precision=precision != "f32",
        scale=scale,
        window=window,
        softcap=softcap,
    )[0]


def shape_of(node: Node) -> dict[str, int]:
    """The letters of model/config.py for this node."""
    q = node.inputs["q"]
    heads, kv_heads, rows = node.attrs["heads"], node.attrs["kv_heads"], node.attrs["rows"]
    return {"B": rows, "S": q.rows // rows, "H": heads, "K": kv_heads, "E": q.columns // heads}


def _infer(node: Node) -> Sequence[Spec]:
    q, k, v, segment_start = node.inputs.values()
    s = shape_of(node)
    tokens = s["B"] * s["S"]
    if k.shape != v.shape or k.columns != s["K"] * s["E"] or segment_start.size != tokens or s["H"] % s["K"]:
        raise ValueError(f"{node.label()}: {q!r}, {k!r}, {v!r}, {segment_start!r} do not fit {s}")
    if s["E"] > LONGEST_HEAD:
        raise ValueError(f"{node.label()}: heads of {s['E']} columns, above {LONGEST_HEAD}")
    return [(q.shape, "f32"), ((tokens, s["H"]), "f32")]


def scale_of(node: Node) -> float:
    """What q k^T is multiplied by."""
    return 1 / _divisor(node)


def _divisor(node: Node) -> float:
    return 1 / float(node.attrs["scale"]) if "scale" in node.attrs else math.sqrt(shape_of(node)["E"])


def split(s: Mapping[str, int], x: np.ndarray) -> np.ndarray:
    """[B*S, n*E] -> [B, H, S, E], key/value heads repeated for their group."""
    heads = x.reshape(s["B"], s["S"], -1, s["E"]).transpose(0, 2, 1, 3)
    return np.repeat(heads, s["H"] // heads.shape[1], axis=1)


def join(x: np.ndarray, like: np.ndarray, group: int) -> np.ndarray:
    """Back from [B, H, S, E], summing what `split` repeated."""
    b, h, s, e = x.shape
    return x.reshape(b, h // group, group, s, e).sum(axis=2).transpose(0, 2, 1, 3).reshape(like.shape)


def scores_of(node: Node, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Scores [B, H, S, S], bent where they are capped."""
    s, softcap = shape_of(node), node.attrs.get("softcap")
    scores = split(s, q) @ split(s, k).swapaxes(-1, -2) * q.dtype.type(scale_of(node))
    return scores if softcap is None else q.dtype.type(softcap) * np.tanh(scores / q.dtype.type(softcap))


def softmax_weights(node: Node, scores: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(softmax weights [B, H, S, S], lse [B, H, S])."""
    s = shape_of(node)
    place = np.arange(s["S"])
    seen = (place[None, :] <= place[:, None]) & (place >= segments.reshape(s["B"], s["S"], 1))
    seen &= place[None, :] + node.attrs.get("window", s["S"]) > place[:, None]
    scores = np.where(seen[:, None], scores, scores.dtype.type(-np.inf))
    peak = scores.max(axis=-1, keepdims=True)
    e = np.exp(scores - peak)
    total = e.sum(axis=-1, keepdims=True)
    return e / total, (peak + np.log(total))[..., 0]


def _reference(
    node: Node, q: np.ndarray, k: np.ndarray, v: np.ndarray, segment_start: np.ndarray
) -> Sequence[np.ndarray]:
    s = shape_of(node)
    weights, lse = softmax_weights(node, scores_of(node, q, k), segment_start)
    out = join(weights @ split(s, v), q, 1)
    return [out, lse.transpose(0, 2, 1).reshape(-1, s["H"])]


@dataclass(frozen=True)
class Blocking:
    """How the forward pass is cut up: BQ queries meet up to 64 keys, staged at most `staged` elements at a time."""

    BQ: int
    staged: int


# Best first; the last fits WebGPU's default limits with the longest heads in f32.
BLOCKINGS = (Blocking(64, 4096), Blocking(64, 2048), Blocking(32, 1024))
LONGEST_HEAD = 256  # columns; more would take more than 256 invocations


def padded(e: int) -> int:
    """Columns of a head as kernels compute them."""
    return round_up(e, 32)


def low_precision(node: Node, caps: Caps) -> bool:
    """Whether products are of f16 operands."""
    return bool(node.attrs["low_precision"]) and caps.f16


def matrices_of_head(node: Node, caps: Caps) -> MatrixConfig | None:
    """The matrices that this node's heads are multiplied by; None where the kernels are those in plain WGSL, which
    alone know soft caps."""
    if "softcap" in node.attrs or not low_precision(node, caps):
        return None
    return matrices_for(shape_of(node)["E"], caps)


def head_constants(node: Node, caps: Caps) -> dict[str, Any]:
    """What every kernel of attention is specialised with."""
    s = shape_of(node)
    scale = math.log2(math.e) / _divisor(node)
    constants = {**s, "WINDOW": node.attrs.get("window", 0), "scale": literal(scale)}
    if (config := matrices_of_head(node, caps)) is not None:
        return {**constants, **constants_of(config)}
    f16 = low_precision(node, caps)
    return {**constants, "EP": padded(s["E"]), "f16": f16, "UNROLL": _unroll(f16, caps), **_cap(node)}


def _cap(node: Node) -> dict[str, str]:
    """The soft cap of scores to the base 2, and its inverse; empty where there is none."""
    cap = node.attrs.get("softcap", 0.0) * math.log2(math.e)
    return {"cap": literal(cap) if cap else "", "inverse_cap": literal(1 / cap) if cap else ""}


def _unroll(f16: bool, caps: Caps) -> int:
    """Steps of a product that are written out. lavapipe takes seconds to compile many."""
    return 1 if caps.software else 32 if f16 else 8


def _blocked(e: int, blocking: Blocking) -> dict[str, int]:
    """The constants of a blocking: TX x TY invocations of 8 x 4 scores and 8 x 4 COLUMNS outputs each.

    CE columns of keys and queries, then CV rows of values, are staged at a time.
    """
    ep = padded(e)
    tx = 16 if ep % 64 == 0 else 8  # a power of two, for the swizzle of the keys' tile
    room = blocking.staged * tx // 16
    cv = max(c for c in (2, 4, 8, 16, 32) if c * ep <= room)
    ce = max(c for c in (16, 32, 64) if ep % c == 0 and c * 4 * tx <= max(cv * ep, 64 * tx))
    sizes = {"BQ": blocking.BQ, "BK": 4 * tx, "CE": ce, "CV": cv, "TX": tx, "TY": blocking.BQ // 8}
    return {**sizes, "COLUMNS": ep // (4 * tx), "THREADS": tx * blocking.BQ // 8}


def _elements(e: int, x: Mapping[str, int]) -> int:
    """Elements that a workgroup of these constants keeps: of q, of k or v, and the weights."""
    return x["CE"] * x["BQ"] + max(x["CE"] * x["BK"], x["CV"] * padded(e)) + x["BK"] * x["BQ"]


def _blocking(node: Node, caps: Caps) -> Mapping[str, int]:
    """The constants of the best blocking that fits the device."""
    e, itemsize = shape_of(node)["E"], 2 if low_precision(node, caps) else 4
    every = [_blocked(e, blocking) for blocking in BLOCKINGS]
    return next(x for x in every if _elements(e, x) * itemsize <= caps.max_workgroup_bytes)


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    s, width, config = shape_of(node), vector_of(node), matrices_of_head(node, caps)
    blocking = _blocking(node, caps) if config is None else forward_blocking(s["E"], config, caps)
    halves, converts = half_operands(node, ("q", "k", "v"), placed.workspace, caps)
    bindings = [bind_operand(name, halves[name], width) for name in ("q", "k", "v")]
    bindings += [reads("segment_start", node.inputs["segment_start"])]
    bindings += [writes("out", node.outputs[0], width), writes("lse", node.outputs[1])]
    whole = s["S"] % blocking["BQ"] == 0 and s["S"] % blocking["BK"] == 0
    bases = dict.fromkeys(("q", "k", "v", "out"), "")
    constants = {**head_constants(node, caps), **blocking}
    constants |= {"WHOLE": whole, "BASES": bases, "ln2": literal(math.log(2))}
    grid = (s["H"], s["B"], ceil_div(s["S"], blocking["BQ"]))
    shader = "attention" if config is None else "attention_matrix"
    return [*converts, Launch(shader, tuple(bindings), constants, grid, trusted=True)]


def half_specs(node: Node, names: Sequence[str], caps: Caps) -> list[Spec]:
    """Workspace for the copies in f16 that matrix units multiply; none for the other kernels."""
    return [(node.inputs[name].shape, "f16") for name in names] if matrices_of_head(node, caps) is not None else []


def half_operands(
    node: Node, names: Sequence[str], workspace: Sequence[Tensor], caps: Caps
) -> tuple[dict[str, Tensor], list[Launch]]:
    """What kernels read as these inputs, by name, and the launches that make it: the first of the workspace, in f16."""
    if matrices_of_head(node, caps) is None:
        return {name: node.inputs[name] for name in names}, []
    copies = dict(zip(names, workspace, strict=False))
    sources = [(whole(node.inputs[name]), copy) for name, copy in copies.items()]
    return copies, [low_precision_rows_launch(s, c.rows, c.columns, c, None, caps) for s, c in sources]


def bind_operand(name: str, tensor: Tensor, width: int, offset: int = 0) -> Binding:
    """An operand in vectors of `width`; of f16, in words of eight."""
    half = tensor.dtype == "f16"
    return Binding(name, tensor, vector=4 if half else width, offset=offset, words=half)


def vector_of(node: Node) -> int:
    """Width in which head vectors are bound."""
    return 4 if shape_of(node)["E"] % 4 == 0 else 1


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    (out, lse), dout = node.outputs, upstream[0]
    (statistics,) = record("attention_statistics", out=out, dout=dout, lse=lse, rows=node.attrs["rows"])
    dq, dk, dv = record("attention_grad", **node.inputs, dout=dout, statistics=statistics, **node.attrs)
    return {"q": dq, "k": dk, "v": dv}


def flops(products: int) -> Callable[[Node], int]:
    """Causal: half of each of the S x S products, less what lies outside of a window."""

    def count(node: Node) -> int:
        s = shape_of(node)
        window = min(node.attrs.get("window", s["S"]), s["S"])
        return products * s["B"] * s["H"] * (2 * s["S"] - window) * window * s["E"]

    return count


register(
    Op(
        "attention",
        _infer,
        _reference,
        _launch,
        _gradient,
        workspace=lambda node, caps: half_specs(node, ("q", "k", "v"), caps),
        flops=flops(2),
    )
)
