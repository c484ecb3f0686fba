"""Operands of matmuls in int8 with one scale for each row of theirs, which matrix units can apply to whole sums.

A row whose largest value is an outlier leaves the others few codes. So every 64 values along the inner axis are first
multiplied by a Hadamard matrix, which spreads an outlier over all of them (arXiv 2404.00456); being orthogonal, on both
operands it leaves the product as it is. Not normalised, it makes values eight times as large, and scales an eighth.

Codes lie in the order in which a workgroup takes them: eight rows after each other, of these 64 values after each
other, and of these sixteen of the first row, sixteen of the second, and so on. Scales are [rows].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from entrenar_gpu.graph import Binding, Caps, Launch, Tensor, grid_of, literal, reads, split_offset, writes
from entrenar_gpu.integers import ceil_div, round_up
from entrenar_gpu.ops.gemm import low_rank
from entrenar_gpu.ops.gemm.launches import Block
from entrenar_gpu.ops.quantize import Nf4Tensors, codebook_text, dequantized, scale_bindings
from entrenar_gpu.ops.registry import Op, Spec, record, register
from entrenar_gpu.quant import BLOCK

OVER_127 = float(np.float32(1) / np.float32(127))  # from an absmax to its scale
STRIDES = (1, 2, 16, 32, 4, 8)  # in the order of lib/rotate.wgsl: sums in another order round otherwise
_THREADS, _EACH = 256, 16  # of a workgroup that makes rows, and the values that each takes of a row at once
LONGEST = 131072  # inner length whose int32 sums cannot overflow: 2^31 / 127^2


def rotated(values: np.ndarray) -> np.ndarray:
    """Rows [.., K] of f32 with every 64 values times a Hadamard matrix, as the shaders add them up."""
    blocks = values.reshape(-1, BLOCK)
    for stride in STRIDES:
        pairs = blocks.reshape(-1, BLOCK // (2 * stride), 2, stride)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        blocks = np.stack([first + second, first - second], axis=2).reshape(-1, BLOCK)
    return blocks.reshape(values.shape)


def quantize_rotated(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes [rows, K] and scales [rows] of float rows, as rotated_rows.wgsl makes them."""
    turned = rotated(values.astype(np.float32))
    absmax = np.abs(turned).max(axis=-1)
    return np.rint(turned * inverse(absmax)[:, None]).astype(np.int8), absmax * np.float32(OVER_127 / 8)


def inverse(absmax: np.ndarray) -> np.ndarray:
    """127 / absmax as lib/int8.wgsl makes it: a quotient of integers of 17 bits, the same on every device."""
    bits = absmax.view(np.uint32)
    exponent = (bits >> 23).astype(np.int32)
    quotient = (127 << 25) // (((bits & 0x7FFFFF) + 0x8000FF) >> 8).astype(np.int64)
    inside = (exponent >= 7) & (exponent < 244)
    return np.where(inside, np.ldexp(quotient.astype(np.float32), np.where(inside, 117 - exponent, 0)), np.float32(0))


def rotated_specs(rows: int, k: int) -> list[Spec]:
    """Codes, of whole eights of rows, and scales of [rows, K]."""
    return [((round_up(rows, 8), k // 4), "u32"), ((rows,), "f32")]


def laid_out(codes: np.ndarray) -> np.ndarray:
    """Codes int8 [rows, K] as they lie, u32."""
    rows, k = codes.shape
    whole = np.zeros((round_up(rows, 8), k), np.int8)
    whole[:rows] = codes
    return whole.reshape(-1, 8, k // BLOCK, 4, 16).transpose(0, 2, 3, 1, 4).copy().view(np.uint32).reshape(-1, k // 4)


def by_rows(held: np.ndarray) -> np.ndarray:
    """The codes int8 [rows, K] that lie so, whole eights of rows."""
    k = 4 * held.shape[1]
    return held.view(np.int8).reshape(-1, k // BLOCK, 4, 8, 16).transpose(0, 3, 1, 2, 4).reshape(-1, k)


def rotated_workspace(attrs: Mapping[str, Any], kept: bool) -> list[Spec]:
    """What making a weight's copy needs besides: nothing where the largest value of each row is kept."""
    return [] if kept else [_maxima_spec(attrs), ((_turned(attrs)[0],), "f32")]


def _turned(attrs: Mapping[str, Any]) -> tuple[int, int]:
    """Rows of a weight's copy and their length."""
    n, k = attrs["shape"]
    return (k, n) if attrs["transposed"] else (n, k)


def _maxima_spec(attrs: Mapping[str, Any]) -> Spec:
    """The largest of each 64 values of a copy's rows."""
    rows, length = _turned(attrs)
    return (length // BLOCK, rows), "f32"


def rotated_arrays(attrs: Mapping[str, Any], parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """An NF4 weight as `rotated_specs` holds it."""
    codes, scales = quantize_rotated(_rows(attrs, parts))
    return [laid_out(codes), scales]


def _rows(attrs: Mapping[str, Any], parts: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of a weight's copy before they are rotated."""
    weight = dequantized(attrs, parts)
    return np.ascontiguousarray(weight.T) if attrs["transposed"] else weight


def rotated_product(x: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Rows x times the transposed of a weight that `rotated_arrays` made."""
    left, by_row = quantize_rotated(x)
    sums = left.astype(np.float64) @ by_rows(codes).astype(np.float64).T
    return sums.astype(np.float32) * (by_row[:, None] * scales)


def rotated_rows_launch(
    source: Block,
    rows: int,
    k: int,
    out: Tensor,
    scales: Tensor,
    caps: Caps,
    down: tuple[Tensor, Tensor, bool] | None = None,
) -> Launch:
    """The first `rows` of out and scales = those of source f32, end to end, K a multiple of 64.

    `down` = (b, c, whether b is transposed) makes c [rows, R] = source op(b) too, R one of low_rank.RANKS.
    """
    offset, _ = split_offset(source.base, source.tensor)
    bindings = [reads("x", source.tensor, 4, offset), writes("out", out, 4), writes("scales", scales)]
    constants = _row_constants(rows, k)
    return low_rank.beside("rotated_rows", bindings, constants, ceil_div(rows, constants["ROWS"]), rows, down, caps)


def _row_constants(rows: int, k: int) -> dict[str, Any]:
    """How rows are shared out: one or several to a workgroup, in as many chunks as leave least of it idle."""
    least = ceil_div(k, _THREADS * _EACH)
    chunks = max(range(least, least + 3), key=lambda c: _THREADS // _share(k, c) / c)
    share = _share(k, chunks)
    sizes = {"M": rows, "K": k, "CHUNKS": chunks, "SHARE": share, "ROWS": _THREADS // share}
    return {**sizes, "scaled": literal(OVER_127 / 8)}


def _share(k: int, chunks: int) -> int:
    """Invocations that share a row in so many chunks: whole quads, which share a block."""
    return round_up(ceil_div(k, chunks * _EACH), 4)


def rotated_weight_launches(
    attrs: Mapping[str, Any],
    parts: Sequence[Tensor],
    out: Tensor,
    scales: Tensor,
    workspace: Sequence[Tensor],
    caps: Caps,
    largest: Tensor | None = None,
) -> list[Launch]:
    """out and scales = an NF4 weight [N, K] or, transposed, [K, N], by `largest` of its rows or `rotated_workspace`."""
    launches = []
    if largest is None:
        maxima, largest = workspace
        launches = _largest_launches(attrs, parts, maxima, largest, caps)
    made = reads("largest", largest), writes("out", out, 4), writes("scales", scales)
    return [*launches, panels_launch("codes", attrs, parts, made, caps)]


def _largest_launches(
    attrs: Mapping[str, Any], parts: Sequence[Tensor], maxima: Tensor, largest: Tensor, caps: Caps
) -> list[Launch]:
    rows, length = _turned(attrs)
    reduced = reads("maxima", maxima), writes("largest", largest)
    return [
        panels_launch("maxima", attrs, parts, (writes("maxima", maxima),), caps),
        Launch(
            "nf4_panels",
            reduced,
            {"stage": "largest", "ROWS": rows, "LENGTH": length, "transposed": attrs["transposed"]},
            (rows // BLOCK, 1, 1),
        ),
    ]


def panels_launch(
    stage: str, attrs: Mapping[str, Any], parts: Sequence[Tensor], made: Sequence[Binding], caps: Caps
) -> Launch:
    """A pass over all of an NF4 weight: to the largest of each 64 values of its copy's rows in int8, "maxima", these
    rows' "codes", or its rows in f16, "halves"."""
    (n, k), (rows, length), (codes, *scale_parts) = attrs["shape"], _turned(attrs), scale_bindings(parts)
    constants = {
        "stage": stage,
        "transposed": attrs["transposed"],
        "N": n,
        "K": k,
        "ROWS": rows,
        "LENGTH": length,
        "scaled": literal(OVER_127 / 8),
        "double": len(parts) == 4,
        "rounded": attrs["rounded"],
        "codebook": codebook_text(),
    }
    grid = (k // BLOCK, n // BLOCK, 1) if attrs["transposed"] else grid_of(ceil_div(n * k // BLOCK, 128), caps)
    return Launch("nf4_panels", (replace(codes, vector=4), *scale_parts, *made), constants, grid)


def rotated_largest(weight: Nf4Tensors, transposed: bool) -> Tensor:
    """The largest value of each row of an NF4 weight's copy after the rotation: all that its scales hang on."""
    attrs = {"shape": weight.shape, "rounded": weight.rounded, "transposed": transposed}
    return record("rotated_largest", weight=[*weight.parts], **attrs)[0]


register(
    Op(
        "rotated_largest",
        lambda node: [((_turned(node.attrs)[0],), "f32")],
        lambda node, weight: [np.abs(rotated(_rows(node.attrs, weight))).max(axis=-1)],
        lambda node, caps, placed: _largest_launches(
            node.attrs, node.group("weight"), placed.workspace[0], node.output, caps
        ),
        workspace=lambda node, caps: [_maxima_spec(node.attrs)],
    )
)
