"""x W^T for a few rows x, from W as it is stored: NF4 codes and scales, or rows in f32, bf16 or half.

What a token costs is reading the weights once, so each is read where it lies and no copy is made. A row's sums have
one order, told by the sizes of W alone (`shaders/gemm/row_product.wgsl`): its result is the same, bit for bit, whatever
other rows are multiplied beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar_gpu.graph import Binding, Caps, Launch, Node, Tensor, literal, reads, split_offset, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.embedding import shard_starts
from entrenar_gpu.ops.quantize import Nf4Tensors, codebook_text, dequantized, scale_bindings
from entrenar_gpu.ops.registry import Op, Placement, Spec, record, register

THREADS = 128
MOST_ROWS = 8  # of x that share one reading of W
MOST_CHAINS, PARTS = 32, 8  # of the sum of a row of W: see the shader
SMALL = 2048  # rows of W that make too few workgroups to fill a GPU by twos


def row_product(
    x: Tensor,
    weight: Nf4Tensors | Sequence[Tensor],
    alpha: float = 1.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """alpha x W^T + bias + residual, f32 [T, N], of x f32 [T, K] and a frozen W [N, K].

    W is NF4, or shards of rows one after the other in f32, bf16 or half; bias f32 [N]; residual f32 [T, N].
    """
    if isinstance(weight, Nf4Tensors):
        attrs = {"shape": weight.shape, "rounded": weight.rounded}
        return record("row_product", x=x, nf4=[*weight.parts], bias=bias, residual=residual, alpha=alpha, **attrs)[0]
    return record("row_product", x=x, shards=list(weight), bias=bias, residual=residual, alpha=alpha)[0]


def _shape(node: Node) -> tuple[int, int]:
    """N, K of the weight."""
    shards = node.group("shards")
    return (sum(s.shape[0] for s in shards), shards[0].columns) if shards else node.attrs["shape"]


def _infer(node: Node) -> Sequence[Spec]:
    x, bias, residual, (n, k) = node.inputs["x"], node.inputs.get("bias"), node.inputs.get("residual"), _shape(node)
    if x.columns != k:
        raise ValueError(f"{node.label()}: inner lengths of {x!r} and weight {[n, k]} differ")
    if (bias is not None and bias.size != n) or (residual is not None and residual.size != x.rows * n):
        raise ValueError(f"{node.label()}: {bias!r} or {residual!r} does not fit [{x.rows}, {n}]")
    return [((*x.shape[:-1], n), "f32")]


def _reference(
    node: Node,
    x: np.ndarray,
    nf4: Sequence[np.ndarray] = (),
    shards: Sequence[np.ndarray] = (),
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> Sequence[np.ndarray]:
    weight = dequantized(node.attrs, nf4) if nf4 else shards[0] if len(shards) == 1 else np.concatenate(shards)
    out = x.dtype.type(node.attrs["alpha"]) * (x.reshape(-1, x.shape[-1]) @ weight.astype(x.dtype).T)
    for added in (bias, residual):
        if added is not None:
            out = out + added.reshape(-1, out.shape[1])
    return [out.reshape(node.output.shape)]


@dataclass(frozen=True)
class _Stored:
    """How a row of W lies: STEP values are read at once, WORDS words of them."""

    step: int
    words: int


def _stored(k: int, dtype: str) -> _Stored:
    """The widest reading, of at most 16 bytes, that whole rows are made of."""
    per_word = {"u8": 8, "f32": 1}.get(dtype, 2)  # u8: a byte of NF4 holds two codes
    widest = 2 if dtype == "u8" else 4
    words = next((w for w in (4, 2, 1) if w <= widest and k % (w * per_word) == 0), 0)
    return _Stored(words * per_word, words) if words else _Stored(1, 1)


def _blocking(t: int, n: int, k: int, stored: _Stored, caps: Caps) -> dict[str, int]:
    """The constants of a kernel. Of these STEP, CHAINS and PARTS decide how a row is summed, and follow from K.

    With few rows of x it is latency that counts: a lane for each chain, and several steps under way. With more it is
    reading x: few lanes, so that neighbours are at the same step of other rows of W and read the same.
    """
    steps = k // stored.step
    chains = min(1 << max(steps.bit_length() - 1, 0), PARTS if caps.software else MOST_CHAINS)
    parts = min(chains, PARTS)
    rows = min(1 << (t - 1).bit_length(), 4 if caps.software else MOST_ROWS)  # more take long to compile there
    sizes = {"T": t, "N": n, "K": k, "ROWS": rows, "CHAINS": chains, "PARTS": parts, "THREADS": THREADS}
    if rows > 2:
        columns = 2 if caps.software or t <= 2 * MOST_ROWS else 4
        return sizes | {"LANES": parts, "COLUMNS": columns, "AHEAD": 1 if caps.software else 2}
    each = ceil_div(steps, chains)
    ahead = 1 if caps.software else min(each, min((5, 6, 4), key=lambda u: (each % u, -u)))
    columns = 1 if n <= SMALL or caps.software else 2 if n <= 4 * SMALL else 4
    return sizes | {"LANES": chains, "COLUMNS": columns, "AHEAD": ahead}


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    n, parts = _shape(node)[0], node.group("nf4")
    if parts:
        constants = {"double": len(parts) == 4, "rounded": node.attrs["rounded"], "codebook": codebook_text()}
        return [_part_launch(node, caps, placed, (scale_bindings(parts), 0, n), "nf4", constants)]
    shards = node.group("shards")
    return [
        _part_launch(node, caps, placed, ([reads("weight", shard)], start, shard.shape[0]), shard.dtype, {})
        for shard, start in zip(shards, shard_starts(shards), strict=True)
    ]


def _part_launch(
    node: Node,
    caps: Caps,
    placed: Placement,
    part: tuple[list[Binding], int, int],
    kind: str,
    constants: Mapping[str, Any],
) -> Launch:
    """The product with some rows of W: what they are bound by, the first of them, and how many."""
    (first, *scales), start, rows = part
    x, bias, residual, (n, k) = node.inputs["x"], node.inputs.get("bias"), node.inputs.get("residual"), _shape(node)
    stored = _stored(k, first.tensor.dtype)
    blocking = _blocking(x.rows, rows, k, stored, caps)
    own = residual is not None and placed.aliased(node.output, residual)
    bindings = [reads("x", x, 4 if stored.step % 4 == 0 else 1), reads(first.name, first.tensor, stored.words), *scales]
    if bias is not None:
        bindings.append(reads("bias", bias))
    if residual is not None and not own:
        bindings.append(reads("residual", residual))
    offset, left = split_offset(start, node.output)
    bindings.append(writes("out", node.output, 1, offset))
    added = [f"bias[{start}u + n]"] if bias is not None else []
    if residual is not None:
        added.append(f"out[{left}u + at]" if own else f"residual[{start}u + at]")
    constants = {
        **blocking,
        "STEP": stored.step,
        "WORDS": stored.words,
        "kind": kind,
        "software": caps.software,
        "ALL": n,
        "START": left,
        "alpha": "" if node.attrs["alpha"] == 1.0 else literal(node.attrs["alpha"]),
        "added": added,
        **constants,
    }
    groups = ceil_div(rows, blocking["THREADS"] // blocking["LANES"] * blocking["COLUMNS"])
    folds = ceil_div(groups, caps.max_workgroups)
    grid = (ceil_div(groups, folds), folds, ceil_div(x.rows, blocking["ROWS"]))
    return Launch("row_product", tuple(bindings), constants, grid, trusted=True)


def _flops(node: Node) -> int:
    return 2 * node.inputs["x"].rows * math.prod(_shape(node))


register(
    Op(
        "row_product",
        _infer,
        _reference,
        _launch,
        flops=_flops,
        inplace=lambda node: [(0, "residual")] if "residual" in node.inputs else [],
    )
)
