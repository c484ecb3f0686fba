"""The gradient of attention: blocks of softmax weights and dscores once, then three products of them.

Recomputing P and dS costs two products, and dq, dk and dv need the same ones. So, for a part of the problem at a time,
they go to scratch, and each of the three gradients is a plain product of those blocks with dout, q or k.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar_gpu.graph import Binding, Caps, Launch, Node, Tensor, grid_of, literal, reads, split_offset, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.attention import (
    flops,
    half_operands,
    half_specs,
    head_constants,
    join,
    low_precision,
    matrices_of_head,
    padded,
    scale_of,
    scores_of,
    shape_of,
    softmax_weights,
    split,
    vector_of,
)
from entrenar_gpu.ops.attention_matrix import BLOCK, blocks_owned, dscores_blocking, products_blocking, split_of
from entrenar_gpu.ops.registry import Op, Placement, Spec, register, same_as

OPERANDS = ("q", "k", "v", "dout")  # of products
Operands = Mapping[str, Tensor]
SCRATCH_BYTES = 144 << 20  # for P and dS of a part: enough for a device's workgroups (docs/attention.md)


def _statistics_infer(node: Node) -> Sequence[Spec]:
    tokens, heads = node.inputs["lse"].shape
    rows = node.attrs["rows"]
    return [((2, rows, heads, tokens // rows), "f32")]


def _statistics_reference(node: Node, out: np.ndarray, dout: np.ndarray, lse: np.ndarray) -> Sequence[np.ndarray]:
    tokens, heads = lse.shape
    both = np.stack([lse, (out * dout).reshape(tokens, heads, -1).sum(axis=-1)])
    return [both.reshape(2, node.attrs["rows"], -1, heads).swapaxes(2, 3)]


def _statistics_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    out, dout, lse = node.inputs.values()
    _, rows, heads, length = node.output.shape
    e = out.size // lse.size
    width = 4 if e % 4 == 0 else 1
    constants = {"B": rows, "S": length, "H": heads, "E": e, "WIDTH": width}
    bindings = [reads("out", out, width), reads("dout", dout, width), reads("lse", lse)]
    bindings.append(writes("statistics", node.output))
    return [
        Launch("attention_statistics", tuple(bindings), constants, grid_of(ceil_div(lse.size, 8), caps), trusted=True)
    ]


def _reference(
    node: Node,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    segment_start: np.ndarray,
    dout: np.ndarray,
    statistics: np.ndarray,
) -> Sequence[np.ndarray]:
    s = shape_of(node)
    group = s["H"] // s["K"]
    scores = scores_of(node, q, k)
    weights, _ = softmax_weights(node, scores, segment_start)
    d_heads = split(s, dout)
    dscores = weights * (d_heads @ split(s, v).swapaxes(-1, -2) - statistics[1][..., None])
    if "softcap" in node.attrs:
        dscores *= 1 - (scores / q.dtype.type(node.attrs["softcap"])) ** 2
    dscores *= q.dtype.type(scale_of(node))
    return [
        join(dscores @ split(s, k), q, 1),
        join(dscores.swapaxes(-1, -2) @ split(s, q), k, group),
        join(weights.swapaxes(-1, -2) @ d_heads, v, group),
    ]


@dataclass(frozen=True)
class Part:
    """Rows, key/value heads and query blocks whose P and dS share the scratch."""

    rows: range
    kv_heads: range
    blocks: range

    def pairs(self) -> int:
        """Blocks of P of a head: each query block with the key blocks up to itself."""
        return sum(i + 1 for i in self.blocks)


def _parts(node: Node, caps: Caps) -> Iterator[Part]:
    """Whole rows if they fit, else some heads of a row, else some queries of a head."""
    s = shape_of(node)
    blocks, group = ceil_div(s["S"], BLOCK), s["H"] // s["K"]
    block_bytes = 2 * BLOCK * BLOCK * (2 if low_precision(node, caps) else 4)
    room = min(SCRATCH_BYTES, caps.max_binding_bytes) // (block_bytes * group)  # blocks of a key/value head
    heads = room // (blocks * (blocks + 1) // 2)
    if heads >= s["K"]:
        for rows in _cut(s["B"], heads // s["K"]):
            yield Part(rows, range(s["K"]), range(blocks))
        return
    for row in range(s["B"]):
        for kv_heads in _cut(s["K"], max(heads, 1)):
            for some in [range(blocks)] if heads else _rows_of_blocks(blocks, room):
                yield Part(range(row, row + 1), kv_heads, some)


def _cut(count: int, most: int) -> list[range]:
    """`count` in pieces as equal as can be of at most `most`."""
    step = ceil_div(count, ceil_div(count, most))
    return [range(first, min(first + step, count)) for first in range(0, count, step)]


def _rows_of_blocks(blocks: int, room: int) -> Iterator[range]:
    """Query blocks such that a piece has at most `room` pairs of blocks, or is a single one."""
    first, used = 0, 0
    for i in range(blocks):
        if i > first and used + i + 1 > room:
            yield range(first, i)
            first, used = i, 0
        used += i + 1
    yield range(first, blocks)


def _workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    """Operands in f16 for matrix units, P and dS of a part and, where heads share keys, its dk and dv by query head."""
    s, parts = shape_of(node), list(_parts(node, caps))
    group = s["H"] // s["K"]
    blocks = max(len(p.rows) * len(p.kv_heads) * group * p.pairs() for p in parts)
    specs = half_specs(node, OPERANDS, caps)
    specs.append(((blocks, 2, BLOCK, BLOCK), "f16" if low_precision(node, caps) else "f32"))
    if group > 1:
        tokens = max(len(p.rows) * len(p.kv_heads) for p in parts) * s["S"]
        specs += [((tokens, group * s["E"]), "f32")] * 2
    return specs


class _Bindings:
    """Bindings of a part's launches: each tensor from the part's beginning on."""

    def __init__(self, node: Node, part: Part, operands: Operands) -> None:
        self._s, self._part, self._width, self._operands = shape_of(node), part, vector_of(node), operands
        self._group = self._s["H"] // self._s["K"]
        self.bases: dict[str, str] = {}

    def __call__(self, name: str, tensor: Tensor, start: int, width: int = 1, write: bool = False) -> Binding:
        offset, rest = split_offset(start, tensor)
        self.bases[name] = f"{rest}u + " if rest else ""
        return Binding(name, tensor, write, width, offset, words=tensor.dtype == "f16")

    def by_query_head(self, name: str, tensor: Tensor, write: bool = False) -> Binding:
        """A tensor [B, S, H, E]."""
        s, part = self._s, self._part
        start = (part.rows.start * s["S"] * s["H"] + part.kv_heads.start * self._group) * s["E"]
        return self(name, tensor, start, self._vector(tensor), write)

    def by_kv_head(self, name: str, tensor: Tensor, write: bool = False) -> Binding:
        """A tensor [B, S, K, E]."""
        s, part = self._s, self._part
        start = (part.rows.start * s["S"] * s["K"] + part.kv_heads.start) * s["E"]
        return self(name, tensor, start, self._vector(tensor), write)

    def _vector(self, tensor: Tensor) -> int:
        """Of what is in f16, words of eight."""
        return 4 if tensor.dtype == "f16" else self._width

    def whole(self, name: str, tensor: Tensor) -> Binding:
        """Scratch of the part, written as vectors of a head."""
        return self(name, tensor, 0, self._width, True)

    def statistics(self, tensor: Tensor) -> Binding:
        """Statistics [2, B, H, S]."""
        s, part = self._s, self._part
        return self("statistics", tensor, (part.rows.start * s["H"] + part.kv_heads.start * self._group) * s["S"])

    def values(self) -> Binding:
        """v, which only the first half reads."""
        return self.by_kv_head("v", self._operands["v"])

    def inputs(self, node: Node) -> list[Binding]:
        """What both halves read."""
        q, k, dout = (self._operands[name] for name in ("q", "k", "dout"))
        vectors = [self.by_query_head("q", q), self.by_kv_head("k", k), self.by_query_head("dout", dout)]
        segment_start = node.inputs["segment_start"]
        return [*vectors, self("segment_start", segment_start, self._part.rows.start * self._s["S"])]


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    blocks = ceil_div(shape_of(node)["S"], BLOCK)
    operands, launches = half_operands(node, OPERANDS, placed.workspace, caps)
    scratch = placed.workspace[len(launches) :]
    for part in _parts(node, caps):
        launches += [half(node, caps, part, operands, scratch) for half in (_dscores, _products)]
        if len(scratch) > 1 and part.blocks.stop == blocks:
            launches.append(_group_sum(node, caps, part, operands, scratch))
    return launches


def _constants(node: Node, caps: Caps, part: Part) -> dict[str, Any]:
    """What both halves are specialised with."""
    s = shape_of(node)
    heads = len(part.kv_heads) * s["H"] // s["K"]
    sizes = {"HEADS": heads, "PAIRS": part.pairs(), "FIRST": part.blocks.start, "END": part.blocks.stop}
    return {**head_constants(node, caps), **sizes, "WHOLE": s["S"] % BLOCK == 0}


def _dscores(node: Node, caps: Caps, part: Part, operands: Operands, workspace: Sequence[Tensor]) -> Launch:
    bind, constants, blocks = _Bindings(node, part, operands), _constants(node, caps, part), part.blocks
    bindings = [*bind.inputs(node), bind.values()]
    bindings.append(bind.statistics(node.inputs["statistics"]))
    constants |= {"log2e": literal(math.log2(math.e)), "BASES": bind.bases}
    heads = len(part.rows) * constants["HEADS"]
    if (config := matrices_of_head(node, caps)) is not None:
        bindings.append(Binding("dscores", workspace[0], write=True, vector=4, words=True))
        split = split_of(heads * len(blocks), blocks.stop, caps)
        constants |= {**dscores_blocking(constants["E"], config, caps), "SPLIT": split}
        grid = (heads, split, len(blocks))
        return Launch("attention_dscores_matrix", tuple(bindings), constants, grid, trusted=True)
    bindings.append(writes("dscores", workspace[0], 4))
    constants |= {"TX": 16, "TY": 8, "THREADS": 128, "CE": 32}
    grid = (blocks.start + blocks.stop + 1, ceil_div(len(blocks), 2), heads)
    return Launch("attention_dscores", tuple(bindings), constants, grid, trusted=True)


def _products(node: Node, caps: Caps, part: Part, operands: Operands, workspace: Sequence[Tensor]) -> Launch:
    bind, constants = _Bindings(node, part, operands), _constants(node, caps, part)
    dscores, *partial = workspace
    config = matrices_of_head(node, caps)
    bindings = [*bind.inputs(node), Binding("dscores", dscores, vector=4, words=config is not None)]
    bindings.append(bind.by_query_head("dq", node.outputs[0], write=True))
    if partial:
        bindings += [bind.whole(n, t) for n, t in zip(("dk", "dv"), partial, strict=True)]
    else:
        bindings += [bind.by_kv_head(n, t, write=True) for n, t in zip(("dk", "dv"), node.outputs[1:], strict=True)]
    heads = constants["HEADS"]
    constants |= {"OUT_HEADS": heads if partial else constants["K"], "scale": literal(scale_of(node))}
    constants["BASES"] = bind.bases
    grid = (len(part.rows) * heads, 3, part.blocks.stop)
    if config is not None:
        owned = blocks_owned(constants["E"], config, caps)
        constants |= products_blocking(constants["E"], config, caps, owned)
        grid = (*grid[:2], ceil_div(part.blocks.stop, owned))
        return Launch("attention_grad_matrix", tuple(bindings), constants, grid, trusted=True)
    lanes = padded(constants["E"]) // 8
    constants |= {"TX": lanes, "TY": 8, "THREADS": 8 * lanes, "CK": _steps(constants["E"], constants["f16"])}
    return Launch("attention_grad", tuple(bindings), constants, grid, trusted=True)


def _steps(e: int, f16: bool) -> int:
    """Steps of a product that are staged at a time: within what every device has, and few enough to leave memory to
    the cache."""
    most, itemsize = (32, 2) if f16 else (16, 4)
    return next(c for c in (most, most // 2) if c * (BLOCK + padded(e)) * itemsize <= Caps().max_workgroup_bytes)


def _group_sum(node: Node, caps: Caps, part: Part, operands: Operands, workspace: Sequence[Tensor]) -> Launch:
    s, heads, bind = shape_of(node), len(part.kv_heads), _Bindings(node, part, operands)
    partial = zip(("partial_k", "partial_v"), workspace[1:], strict=True)
    start = (part.rows.start * s["S"] * s["K"] + part.kv_heads.start) * s["E"]
    results = zip(("dk", "dv"), node.outputs[1:], strict=True)
    bindings = [reads(n, t) for n, t in partial] + [bind(n, t, start, write=True) for n, t in results]
    size = len(part.rows) * s["S"] * heads * s["E"]
    constants: dict[str, Any] = {"SIZE": size, "E": s["E"], "GROUP": s["H"] // s["K"], "HEADS": heads, "K": s["K"]}
    constants["BASES"] = bind.bases
    return Launch("attention_group_sum", tuple(bindings), constants, grid_of(ceil_div(size, 256), caps), trusted=True)


register(
    Op(
        "attention_statistics",
        _statistics_infer,
        _statistics_reference,
        _statistics_launch,
        flops=lambda node: 2 * node.inputs["out"].size,
    )
)
register(
    Op(
        "attention_grad",
        same_as("q", "k", "v"),
        _reference,
        _launch,
        workspace=_workspace,
        flops=flops(5),
    )
)
