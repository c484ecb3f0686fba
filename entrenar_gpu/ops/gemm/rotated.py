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

from entrenar_gpu.graph import Caps, Launch, Tensor, grid_of, literal, reads, split_offset, writes
from entrenar_gpu.integers import ceil_div, round_up
from entrenar_gpu.ops.gemm import low_rank
from entrenar_gpu.ops.gemm.launches import Block
from entrenar_gpu.ops.quantize import codebook_text, dequantized, scale_bindings
from entrenar_gpu.ops.registry import Spec
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


def rotated_workspace(attrs: Mapping[str, Any]) -> list[Spec]:
    """What making a weight's copy needs besides: the largest of each 64 values of its columns, where it is turned."""
    n, k = attrs["shape"]
    return [((n // BLOCK, k), "f32")] if attrs["transposed"] else []


def rotated_arrays(attrs: Mapping[str, Any], parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """An NF4 weight as `rotated_specs` holds it."""
    weight = dequantized(attrs, parts)
    codes, scales = quantize_rotated(np.ascontiguousarray(weight.T) if attrs["transposed"] else weight)
    return [laid_out(codes), scales]


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
    constants = {**_row_constants(rows, k), "source": "f32"}
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
) -> list[Launch]:
    """out and scales = an NF4 weight [N, K] or, transposed, [K, N], by way of `rotated_workspace`."""
    (n, k), (codes, *scale_parts) = attrs["shape"], scale_bindings(parts)
    constants: dict[str, Any] = {"double": len(parts) == 4, "rounded": attrs["rounded"], "codebook": codebook_text()}
    if not attrs["transposed"]:
        constants |= {**_row_constants(n, k), "source": "nf4", "GROUPS": 0}
        bindings = (codes, *scale_parts, writes("out", out, 4), writes("scales", scales))
        return [Launch("rotated_rows", bindings, constants, grid_of(ceil_div(n, constants["ROWS"]), caps))]
    (maxima,), read = workspace, (replace(codes, vector=4), *scale_parts)
    constants |= {"N": n, "K": k, "scaled": literal(OVER_127 / 8)}
    blocks = (k // BLOCK, n // BLOCK, 1)

    def launch(stage: str, grid: tuple[int, int, int], *bindings: Any) -> Launch:
        return Launch("nf4_rotated_columns", tuple(bindings), {**constants, "stage": stage}, grid)

    return [
        launch("maxima", blocks, *read, writes("maxima", maxima)),
        launch("scales", (k // BLOCK, 1, 1), writes("maxima", maxima), writes("scales", scales)),
        launch("codes", blocks, *read, reads("maxima", maxima), writes("out", out, 4)),
    ]
