"""Activations kept as binary16: half the bytes of what waits for the backward pass.

Packed with WGSL's pack2x16float, which needs no f16 feature. Each row is scaled by a power of two of its own, so that
its largest element lies in [2^14, 2^15): no finite value overflows (binary16 ends at 65,504), elements down to 2^-28
of the largest keep 11 bits, and smaller ones lose bits one by one. The planner inserts both ops (recompute.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, grid_of, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.registry import Op, Placement, Spec, record, register

TOP = 14  # exponent that a row's largest element is brought to


def to_half(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., N] f32, N even, as binary16 codes [.., N] and one power of two a row, [rows]: x = codes * scale."""
    codes, scales = record("to_half", x=x)
    return codes, scales


def from_half(codes: Tensor, scales: Tensor) -> Tensor:
    """What `to_half` was given, to 11 bits."""
    return record("from_half", codes=codes, scales=scales)[0]


def halvable(tensor: Tensor) -> bool:
    """Whether `to_half` takes a tensor: f32 rows of whole pairs."""
    return tensor.dtype == "f32" and len(tensor.shape) > 1 and tensor.columns % 2 == 0


def half_specs(tensor: Tensor) -> tuple[Spec, Spec]:
    """Codes with the tensor's shape, and one f32 scale a row."""
    return (tensor.shape, "half"), ((tensor.rows,), "f32")


def half_bytes(tensor: Tensor) -> int:
    """What a tensor takes once it is halved, scales included."""
    return 2 * tensor.size + 4 * tensor.rows


def _to_half_reference(node: Node, x: np.ndarray) -> Sequence[np.ndarray]:
    rows = x.reshape(-1, x.shape[-1])
    largest = np.abs(rows).max(axis=-1)
    exponents = np.where(largest > 0, np.frexp(largest)[1] - 1, -126)  # the largest is in [2^e, 2^(e+1))
    # Scale and reciprocal as the shader can write them: exponents of normal f32.
    scales = np.ldexp(x.dtype.type(1), np.clip(exponents - TOP, -126, 126))
    return [(rows / scales[:, None]).astype(np.float16).reshape(x.shape), scales]


def _from_half_reference(node: Node, codes: np.ndarray, scales: np.ndarray) -> Sequence[np.ndarray]:
    rows = codes.reshape(-1, codes.shape[-1]).astype(scales.dtype)
    return [(rows * scales[:, None]).reshape(codes.shape)]


def _width(rows: Tensor) -> int:
    """Elements an invocation takes at a time: two words' worth where rows are made of them."""
    return 4 if rows.columns % 4 == 0 else 2


def _to_half_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    x, (codes, scales) = node.inputs["x"], node.outputs
    width = _width(x)
    constants = {"mode": "to", "ROWS": x.rows, "N": x.columns // width, "width": width, "top": TOP}
    bindings = (reads("x", x, width), writes("codes", codes, width // 2), writes("scales", scales))
    return [Launch("half", bindings, constants, grid_of(x.rows, caps))]


def _from_half_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    codes, scales, y = node.inputs["codes"], node.inputs["scales"], node.output
    width = _width(codes)
    constants = {"mode": "from", "SIZE": y.size // width, "N": y.columns // width, "width": width}
    bindings = (reads("codes", codes, width // 2), reads("scales", scales), writes("y", y, width))
    return [Launch("half", bindings, constants, grid_of(ceil_div(y.size, width * 256), caps))]


register(Op("to_half", lambda node: half_specs(node.inputs["x"]), _to_half_reference, _to_half_launch))
register(Op("from_half", lambda node: [(node.inputs["codes"].shape, "f32")], _from_half_reference, _from_half_launch))
