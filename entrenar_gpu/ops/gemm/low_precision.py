"""Operands of matmuls, made on the fly: rows of activations as f16 or int8, NF4 weights as either or, transposed, f32.

int8 has a scale for every 64 values along the matmul's inner axis, codes four to a u32, and scales [K / 64, rows]; or,
for matrix units, one for each row: rotated.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, grid_of, literal, reads, split_offset, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.gemm import low_rank
from entrenar_gpu.ops.gemm.launches import Block
from entrenar_gpu.ops.gemm.rotated import (
    OVER_127,
    inverse,
    panels_launch,
    rotated_arrays,
    rotated_rows_launch,
    rotated_specs,
    rotated_weight_launches,
    rotated_workspace,
)
from entrenar_gpu.ops.gemm.tiles import Arithmetic
from entrenar_gpu.ops.quantize import Nf4Tensors, codebook_text, dequantized, scale_bindings
from entrenar_gpu.ops.registry import Op, Placement, Spec, record, register
from entrenar_gpu.quant import BLOCK, nf4

# Codes of the NF4 codebook in int8.
INT8_CODES = np.rint(nf4.CODEBOOK * np.float32(127)).astype(np.int8)


def quantize_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes [rows, K] and scales [rows, K / 64] of float rows, as low_precision_rows.wgsl makes them."""
    blocks = values.astype(np.float32).reshape(values.shape[0], -1, BLOCK)
    absmax = np.abs(blocks).max(axis=-1)
    codes = np.rint(blocks * inverse(absmax)[..., None]).astype(np.int8)
    return codes.reshape(values.shape), absmax * np.float32(OVER_127)


def quantize_weight(attrs: Mapping[str, Any], parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes and scales of an NF4 weight [N, K] with `shape`, `rounded` and `transposed` in `attrs`.

    As the matmul reads it: [N, K] by NF4's own blocks and, transposed, [K, N] quantised again.
    """
    if attrs["transposed"]:
        return quantize_rows(dequantized(attrs, parts).T)
    n, k = attrs["shape"]
    codes = INT8_CODES[nf4.unpack(parts[0], n * k)].reshape(n, k)
    plain = {**attrs, "rounded": "float32"}
    ones = np.full_like(parts[0], 0xFF)  # code 15 is 1.0, so this dequantises to the scales
    scales = dequantized(plain, [ones, *parts[1:]]).reshape(n, -1, BLOCK)[..., 0]
    return codes, scales * np.float32(OVER_127)


def low_precision_specs(arithmetic: Arithmetic, rows: int, k: int, panels: bool = False) -> list[Spec]:
    """What holds [rows, K] as a matmul's operand: f16, also in panels, or int8 codes and their scales."""
    if panels:
        return [((ceil_div(rows, 8), k // 32, 4, 8, 8), "f16")]
    if arithmetic == "f16":
        return [((rows, k), "f16")]
    if arithmetic == "int8_rows":
        return rotated_specs(rows, k)
    return [((rows, k // 4), "u32"), ((k // BLOCK, rows), "f32")]


def in_panels(values: np.ndarray) -> np.ndarray:
    """[rows, K] as matrix units are fed: panels of 8 rows and 32 columns, eight columns of every row side by side.

    A subgroup reads a panel, 512 bytes, from end to end, and puts it into workgroup memory without bank conflicts.
    """
    rows, k = values.shape
    return np.ascontiguousarray(values.reshape(rows // 8, 8, k // 32, 4, 8).transpose(0, 2, 3, 1, 4))


def from_panels(panels: np.ndarray) -> np.ndarray:
    """`in_panels` undone."""
    rows, k = 8 * panels.shape[0], 32 * panels.shape[1]
    return panels.transpose(0, 3, 1, 2, 4).reshape(rows, k)


def low_precision_arrays(attrs: Mapping[str, Any], parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """An NF4 weight as `low_precision_specs` holds it; `attrs` are those of a `linear` node."""
    if attrs["arithmetic"] == "f16":
        weight = dequantized(attrs, parts)
        rounded = np.ascontiguousarray(weight.T if attrs["transposed"] else weight, np.float16)
        return [in_panels(rounded) if attrs.get("panels") else rounded]
    if attrs["arithmetic"] == "int8_rows":
        return rotated_arrays(attrs, parts)
    codes, scales = quantize_weight(attrs, parts)
    return [np.ascontiguousarray(codes).view(np.uint32), np.ascontiguousarray(scales.T)]


def low_precision_rows_launch(
    source: Block,
    rows: int,
    k: int,
    out: Tensor,
    scales: Tensor | None,
    caps: Caps,
    down: tuple[Tensor, Tensor, bool] | None = None,
) -> Launch:
    """The first `rows` of out [.., K] = those of source f32, end to end, K a multiple of 64; int8 with scales.

    `down` = (b, c, whether b is transposed) makes c [rows, R] = source op(b) too, R one of low_rank.RANKS.
    """
    if scales is not None and len(scales.shape) == 1:
        return rotated_rows_launch(source, rows, k, out, scales, caps, down)
    offset, _ = split_offset(source.base, source.tensor)
    bindings = [reads("x", source.tensor, 4, offset), writes("out", out, 4)]
    if scales is not None:
        bindings.append(writes("scales", scales))
    arithmetic, each = ("f16", 4) if scales is None else ("int8", 16)  # values that an invocation takes
    constants: dict[str, Any] = {"M": rows, "K": k, "arithmetic": arithmetic, "over_127": literal(OVER_127)}
    constants["PANELS"] = len(out.shape) == 5
    workgroups = ceil_div((out.size if constants["PANELS"] else rows * k), 256 * each)
    return low_rank.beside("low_precision_rows", bindings, constants, workgroups, rows, down, caps)


def weight_workspace(attrs: Mapping[str, Any], kept: bool = False) -> list[Spec]:
    """Scratch that making the copy of an NF4 weight needs; `attrs` are those of a `linear` node. `kept`: the largest
    values of its rows are known."""
    return rotated_workspace(attrs, kept) if attrs["arithmetic"] == "int8_rows" else []


def low_precision_weight_launches(
    attrs: Mapping[str, Any],
    parts: Sequence[Tensor],
    out: Tensor,
    scales: Tensor | None,
    workspace: Sequence[Tensor],
    caps: Caps,
    largest: Tensor | None = None,
) -> list[Launch]:
    """The copy of an NF4 weight that a `linear` node with these `attrs` multiplies, by way of `weight_workspace`.

    In int8 by rows `largest`, where it is kept, are the largest values of the copy's rows.
    """
    if attrs["arithmetic"] == "int8_rows":
        assert scales is not None
        return rotated_weight_launches(attrs, parts, out, scales, workspace, caps, largest)
    return [low_precision_weight_launch(attrs, parts, out, scales, caps)]


def low_precision_weight_launch(
    attrs: Mapping[str, Any], parts: Sequence[Tensor], out: Tensor, scales: Tensor | None, caps: Caps
) -> Launch:
    """out [N, K] or, transposed, [K, N] = an NF4 weight with `shape`, `rounded`, `transposed` in `attrs`.

    int8 with scales, else f16 or, transposed only, f32, as out is.
    """
    (n, k), transposed = attrs["shape"], attrs["transposed"]
    if len(out.shape) == 5:
        return panels_launch("halves", attrs, parts, [writes("out", out, 4)], caps)
    codes, *scale_parts = scale_bindings(parts)
    bindings = [replace(codes, vector=4 if transposed else 2), *scale_parts, writes("out", out, 4)]
    if scales is not None:
        bindings.append(writes("scales", scales))
    arithmetic, each = (out.dtype, 4) if scales is None else ("int8", 16)  # codes that an invocation takes
    constants = {
        "N": n,
        "K": k,
        "arithmetic": arithmetic,
        "double": len(parts) == 4,
        "rounded": attrs["rounded"],
        "codebook": codebook_text(),
        "bytes": tuple(code & 0xFF for code in INT8_CODES.tolist()),
        "over_127": literal(OVER_127),
    }
    grid = (k // BLOCK, n // BLOCK, 1) if transposed else grid_of(ceil_div(n * k, 256 * each), caps)
    return Launch(
        "nf4_low_precision_transposed" if transposed else "nf4_low_precision", tuple(bindings), constants, grid
    )


def low_precision_weight(
    weight: Nf4Tensors, arithmetic: Arithmetic, transposed: bool, panels: bool = False
) -> tuple[Tensor, ...]:
    """The copy of an NF4 weight [N, K] that a matmul reads, in f16 or int8, as [N, K] or, transposed, [K, N]."""
    attrs = {"shape": weight.shape, "rounded": weight.rounded, "arithmetic": arithmetic, "transposed": transposed}
    attrs["panels"] = panels
    return record("low_precision_weight", weight=[*weight.parts], **attrs)


def _low_precision_weight_infer(node: Node) -> Sequence[Spec]:
    n, k = node.attrs["shape"][::-1] if node.attrs["transposed"] else node.attrs["shape"]
    return low_precision_specs(node.attrs["arithmetic"], n, k, node.attrs["panels"])


def _low_precision_weight_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    codes, scales = node.outputs if len(node.outputs) == 2 else (node.output, None)
    return low_precision_weight_launches(node.attrs, node.group("weight"), codes, scales, placed.workspace, caps)


register(
    Op(
        "low_precision_weight",
        _low_precision_weight_infer,
        lambda node, weight: low_precision_arrays(node.attrs, weight),
        _low_precision_weight_launch,
        workspace=lambda node, caps: weight_workspace(node.attrs),
    )
)


def dequantize_transposed(weight: Nf4Tensors) -> Tensor:
    """The weight in f32 as [K, N], both multiples of 64: scratch, and as a matmul x W^T reads it fastest."""
    return record("nf4_dequantize_transposed", weight=[*weight.parts], shape=weight.shape, rounded=weight.rounded)[0]


register(
    Op(
        "nf4_dequantize_transposed",
        lambda node: [(node.attrs["shape"][::-1], "f32")],
        lambda node, weight: [np.ascontiguousarray(dequantized(node.attrs, weight).T)],
        lambda node, caps, placed: [
            low_precision_weight_launch(
                {**node.attrs, "transposed": True}, node.group("weight"), node.output, None, caps
            )
        ],
        transient=True,
    )
)
