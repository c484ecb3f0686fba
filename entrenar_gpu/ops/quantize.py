"""NF4 quantisation and dequantisation on the device, bit for bit what nf4.py does on the host.

A quantised weight is a few tensors: `codes` u8 [ceil(n/2)] and either `absmax` f32 [blocks], or, double-quantised,
`absmax_codes` u8 [blocks], `nested` f32 [ceil(blocks/256)] and `table` f32 [258]: the 256 values of an 8-bit code, the
offset, and a zero. Shaders XOR the zero into intermediate bits: a compiler cannot know it, so it cannot contract
a*b+c into a fused operation that would round once instead of twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar_gpu.graph import Binding, Caps, Graph, Launch, Node, Tensor, grid_of, literal, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.registry import Op, Placement, Spec, record, register
from entrenar_gpu.quant import BLOCK, SCALE_BLOCK, Nf4Weight, nf4

TABLE = nf4.SCALE_CODE.size + 2


@dataclass(frozen=True)
class Nf4Tensors:
    """The device tensors of one quantised weight of `shape` [N, K]."""

    shape: tuple[int, int]
    parts: tuple[Tensor, ...]
    rounded: str = "float32"

    @classmethod
    def declare(cls, graph: Graph, name: str, shape: tuple[int, int], double: bool, rounded: str) -> Nf4Tensors:
        """Frozen tensors `name.codes` and so on."""
        size = shape[0] * shape[1]
        blocks = ceil_div(size, BLOCK)
        sizes = [((size + 1) // 2, "u8"), (blocks, "f32")]
        if double:
            sizes[1:] = [(blocks, "u8"), (ceil_div(blocks, SCALE_BLOCK), "f32"), (TABLE, "f32")]
        names = nf4_part_names(name, double)
        parts = [graph.tensor(n, (count,), dtype, "weight") for n, (count, dtype) in zip(names, sizes, strict=True)]
        return cls(shape, tuple(parts), rounded)

    @property
    def double(self) -> bool:
        """Whether the scales of the blocks are quantised too."""
        return len(self.parts) > 2

    def dequantize(self) -> Tensor:
        """The weight in f32, [N, K]: scratch that the backward pass computes again."""
        return record("nf4_dequantize", weight=[*self.parts], shape=self.shape, rounded=self.rounded)[0]


def nf4_part_names(name: str, double: bool) -> list[str]:
    """The names of a quantised weight's tensors, in the order of `Nf4Tensors.parts`."""
    return [
        f"{name}.{part}" for part in (("codes", "absmax_codes", "nested", "table") if double else ("codes", "absmax"))
    ]


def host_parts(weight: Nf4Weight) -> list[np.ndarray]:
    """What the tensors of `Nf4Tensors.parts` hold for a weight quantised on the host or read from a file."""
    if weight.absmax is not None:
        return [weight.codes, weight.absmax]
    assert weight.absmax_codes is not None
    assert weight.nested_absmax is not None
    assert weight.nested_code is not None
    assert weight.offset is not None
    return [weight.codes, weight.absmax_codes, weight.nested_absmax, make_table(weight.nested_code, weight.offset)]


def make_table(code: np.ndarray, offset: float) -> np.ndarray:
    return np.concatenate([code, [offset, 0.0]]).astype(np.float32)


def dequantized(attrs: Mapping[str, Any], parts: Sequence[np.ndarray]) -> np.ndarray:
    """The f32 weight of a node with `shape` and `rounded` from the arrays of `Nf4Tensors.parts`."""
    shape, rounded = attrs["shape"], attrs["rounded"]
    codes, *scales = parts
    if len(scales) == 1:
        weight = Nf4Weight(shape, codes, scales[0], dtype=rounded)
    else:
        absmax_codes, nested, table = scales
        weight = Nf4Weight(shape, codes, None, absmax_codes, nested, table[:256], float(table[256]), rounded)
    return weight.dequantize()


def codebook_text() -> tuple[str, ...]:
    """The NF4 codebook as WGSL literals."""
    return tuple(literal(v) for v in nf4.CODEBOOK.tolist())


def scale_bindings(parts: Sequence[Tensor]) -> list[Binding]:
    """Codes and scales as lib/nf4.wgsl names them."""
    names = ["codes", "absmax"] if len(parts) == 2 else ["codes", "absmax_codes", "nested", "table"]
    return [reads(n, t) for n, t in zip(names, parts, strict=True)]


def _dequantize_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    parts = node.group("weight")
    size = node.output.size
    vector = size % 8 == 0
    constants = {
        "size": size,
        "double": len(parts) == 4,
        "rounded": node.attrs["rounded"],
        "codebook": codebook_text(),
        "vector": vector,
    }
    out = writes("out", node.output, 4 if vector else 1)
    return [Launch("nf4_dequantize", (*scale_bindings(parts), out), constants, grid_of(ceil_div(size, 8 * 256), caps))]


register(
    Op(
        "nf4_dequantize",
        lambda node: [(node.attrs["shape"], "f32")],
        lambda node, weight: [dequantized(node.attrs, weight)],
        _dequantize_launch,
        transient=True,
    )
)


def nf4_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes u8 [ceil(n/2)], absmax f32 [blocks]) of a weight in f32, bf16 or half."""
    codes, absmax = record("nf4_quantize", weight=weight)
    return codes, absmax


def nf4_quantize_scales(absmax: Tensor, code: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(absmax_codes u8 [blocks], nested f32, table f32 [258]) of block scales.

    code f32 [256] and steps u8 [65536] hold nf4.SCALE_CODE and nf4.SCALE_STEPS.
    """
    a, b, c = record("nf4_quantize_scales", absmax=absmax, code=code, steps=steps)
    return a, b, c


def _quantize_infer(node: Node) -> Sequence[Spec]:
    n = node.inputs["weight"].size
    return [(((n + 1) // 2,), "u8"), ((ceil_div(n, BLOCK),), "f32")]


def _quantize_reference(node: Node, weight: np.ndarray) -> Sequence[np.ndarray]:
    return list(nf4.quantize(weight))


def _quantize_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    weight = node.inputs["weight"]
    codes, absmax = node.outputs
    constants = {
        "size": weight.size,
        "format": weight.dtype,
        "midpoints": ", ".join(literal(v) for v in nf4.MIDPOINTS.tolist()),
    }
    bindings = (reads("weight", weight), writes("codes", codes), writes("absmax", absmax))
    return [Launch("nf4_quantize", bindings, constants, grid_of(absmax.size, caps))]


register(Op("nf4_quantize", _quantize_infer, _quantize_reference, _quantize_launch))


def _scales_infer(node: Node) -> Sequence[Spec]:
    blocks = node.inputs["absmax"].size
    return [((blocks,), "u8"), ((ceil_div(blocks, SCALE_BLOCK),), "f32"), ((TABLE,), "f32")]


def _scales_reference(node: Node, absmax: np.ndarray, code: np.ndarray, steps: np.ndarray) -> Sequence[np.ndarray]:
    codes, nested, offset = nf4.quantize_scales(absmax)
    return [codes, nested, make_table(code, float(offset))]


def _scales_workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    return [((1,), "f32")]


def _scales_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    absmax, code, steps = node.inputs.values()
    codes, nested, table = node.outputs
    (mean,) = placed.workspace
    average = {"blocks": absmax.size, "zero": int(np.flatnonzero(nf4.SCALE_CODE == 0)[0])}
    bindings = (
        reads("absmax", absmax),
        reads("mean", mean),
        reads("steps", steps),
        writes("codes", codes),
        writes("nested", nested),
    )
    quantize = Launch("nf4_quantize_scales", bindings, {"blocks": absmax.size}, grid_of(nested.size, caps))
    fill_bindings = (reads("code", code), reads("mean", mean), writes("out0", table))
    value = "select(select(0.0, mean[0], i == 256u), code[min(i, 255u)], i < 256u)"
    fill = {"size": TABLE, "loads": [], "stores": [("out0", value)], "functions": ""}
    return [
        Launch("nf4_mean", (reads("absmax", absmax), reads("code", code), writes("mean", mean)), average, (1, 1, 1)),
        quantize,
        Launch("elementwise", fill_bindings, fill, grid_of(2, caps)),
    ]


register(Op("nf4_quantize_scales", _scales_infer, _scales_reference, _scales_launch, workspace=_scales_workspace))
