"""Products with an NF4 weight in low precision: f16, or int8 with a scale for every 64 values along the contraction.

The forward product contracts over in-features, along which NF4's own blocks lie: its codes turn into int8 by a table of
16 entries. The gradient of the input contracts over out-features: the weight is turned and, for int8, quantised anew
along that axis. Activations and output gradients are narrowed on the way in. All narrow copies are workspace of one
node; adapters, biases and residuals stay f32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from entrenar_gpu import nf4
from entrenar_gpu.graph import Caps, Launch, Node, Tensor, grid_of, reads, writes
from entrenar_gpu.nf4 import BLOCK
from entrenar_gpu.ops.elementwise import literal
from entrenar_gpu.ops.gemm import Block, Product, epilogue, product_launch, sum_launch, whole
from entrenar_gpu.ops.matmul import matmul, operands
from entrenar_gpu.ops.quantize import Nf4Tensors, codebook_text, dequantized, scale_bindings
from entrenar_gpu.ops.reduce import sum_rows
from entrenar_gpu.ops.registry import GradientContext, Op, Spec, record, register
from entrenar_gpu.tiles import Arithmetic, Choice, choose, slice_length

# Codes of the NF4 codebook in int8, and the factor from a block's absmax to its scale.
INT8_CODES = np.rint(nf4.CODEBOOK * np.float32(127)).astype(np.int8)
OVER_127 = float(np.float32(1) / np.float32(127))
COOPERATIVE_TILE = 64  # outputs of a workgroup each way
_MOST_BINDINGS = 8  # storage buffers that every WebGPU device offers a shader


def linear(
    x: Tensor,
    weight: Nf4Tensors,
    pair: tuple[Tensor, Tensor, float] | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    precision: Arithmetic = "f32",
) -> Tensor:
    """x W^T + beta * p q^T + bias + residual, [..., N], for a frozen W [N, K] and `pair` = (p [T, R], q [N, R], beta).

    `precision` is the arithmetic of x W^T and, in the backward pass, of dy W. Weights that are no multiple of 64 both
    ways are multiplied in f32. "f16" needs a device with that feature.
    """
    if precision == "f32" or weight.shape[0] % BLOCK or weight.shape[1] % BLOCK:
        return matmul(x, weight.dequantize(), transpose_b=True, pair=pair, bias=bias, residual=residual)
    return _record(x, weight, precision, False, pair, bias, residual)


def turned(dy: Tensor, weight: Nf4Tensors, precision: Arithmetic) -> Tensor:
    """dy W, [..., K]: the gradient of `linear`'s input in f16 or int8."""
    return _record(dy, weight, precision, True)


def _record(
    x: Tensor,
    weight: Nf4Tensors,
    precision: Arithmetic,
    turn: bool,
    pair: tuple[Tensor, Tensor, float] | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    extra = [*(pair[:2] if pair else ()), *([bias] if bias else ()), *([residual] if residual else ())]
    (out,) = record(
        "linear",
        x,
        *weight.parts,
        *extra,
        arithmetic=precision,
        shape=weight.shape,
        rounded=weight.rounded,
        head=1 + len(weight.parts),
        turned=turn,
        pair=pair is not None,
        beta=pair[2] if pair else 0.0,
        pair_transposed=True,
        bias=bias is not None,
        residual=residual is not None,
    )
    return out


def _parts(node: Node) -> tuple[Tensor, ...]:
    return node.inputs[1 : node.attrs["head"]]


def product_sizes(node: Node) -> tuple[int, int, int, int]:
    """M, N, K of the product (the weight turned if need be), and R of the pair."""
    x, (n, k) = node.inputs[0], node.attrs["shape"]
    n, k = (k, n) if node.attrs["turned"] else (n, k)
    p = operands(node).p
    return x.rows, n, k, p.columns if p is not None else 0


def _infer(node: Node) -> Sequence[Spec]:
    x, o = node.inputs[0], operands(node)
    m, n, k, r = product_sizes(node)
    if x.columns != k:
        raise ValueError(f"{node.label()}: inner lengths of {x!r} and weight {list(node.attrs['shape'])} differ")
    q_shape = (n, r) if node.attrs["pair_transposed"] else (r, n)
    if o.p is not None and o.q is not None and (o.p.rows, o.q.shape) != (m, q_shape):
        raise ValueError(f"{node.label()}: pair {o.p!r}, {o.q!r} does not fit [{m}, {n}]")
    if o.bias is not None and o.bias.size != n:
        raise ValueError(f"{node.label()}: bias {o.bias!r} is not [{n}]")
    if o.residual is not None and o.residual.size != m * n:
        raise ValueError(f"{node.label()}: residual {o.residual!r} is not [{m}, {n}]")
    return [((*x.shape[:-1], n), "f32")]


def quantize_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes [rows, K] and scales [rows, K / 64] of float rows, as narrow_rows.wgsl makes them."""
    blocks = values.astype(np.float32).reshape(values.shape[0], -1, BLOCK)
    absmax = np.abs(blocks).max(axis=-1)
    inverse = np.divide(np.float32(127), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    codes = np.rint(blocks * inverse[..., None]).astype(np.int8)
    return codes.reshape(values.shape), absmax * np.float32(OVER_127)


def _weight_int8(node: Node, parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, K] and scales [N, K / 64] of the product's weight."""
    if node.attrs["turned"]:
        return quantize_rows(dequantized(node.attrs, *parts).T)
    n, k = node.attrs["shape"]
    codes = INT8_CODES[nf4.unpack(parts[0], n * k)].reshape(n, k)
    plain = {**node.attrs, "rounded": "float32"}
    ones = np.full_like(parts[0], 0xFF)  # code 15 is 1.0, so this dequantises to the scales
    scales = dequantized(plain, ones, *parts[1:]).reshape(n, -1, BLOCK)[..., 0]
    return codes, scales * np.float32(OVER_127)


def _reference(node: Node, x: np.ndarray, *rest: np.ndarray) -> Sequence[np.ndarray]:
    attrs, head = node.attrs, node.attrs["head"] - 1
    parts, left = rest[:head], list(rest[head:])
    rows = x.reshape(-1, x.shape[-1])
    if attrs["arithmetic"] == "f16":
        weight = dequantized(attrs, *parts)
        weight = weight.T if attrs["turned"] else weight
        out = rows.astype(np.float16).astype(np.float32) @ weight.astype(np.float16).astype(np.float32).T
    else:
        (a, a_scale), (b, b_scale) = quantize_rows(rows), _weight_int8(node, parts)
        blocks = (a.reshape(len(a), -1, BLOCK), b.reshape(len(b), -1, BLOCK))
        a_real, b_real = (c * s[..., None] for c, s in zip(blocks, (a_scale, b_scale), strict=True))
        out = a_real.reshape(a.shape) @ b_real.reshape(b.shape).T
    out = out.astype(x.dtype)
    if attrs["pair"]:
        p, q = left.pop(0), left.pop(0)
        out += x.dtype.type(attrs["beta"]) * (p.reshape(-1, p.shape[-1]) @ (q.T if attrs["pair_transposed"] else q))
    if attrs["bias"]:
        out += left.pop(0)
    if attrs["residual"]:
        out += left.pop(0).reshape(out.shape)
    return [out.reshape(node.output.shape)]


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Sequence[Tensor | None]:
    """The input's gradient is the same op with the weight turned; the quantisation counts as the identity."""
    (dy,) = upstream
    attrs, o = node.attrs, operands(node)
    grads: list[Tensor | None] = [None] * len(node.inputs)
    if context.wanted(node.inputs[0]):
        plain = {**attrs, "turned": not attrs["turned"], "pair": False, "bias": False, "residual": False}
        (grads[0],) = record("linear", dy, *_parts(node), **plain)
    at = attrs["head"]
    if o.p is not None and o.q is not None:
        transposed, beta = attrs["pair_transposed"], attrs["beta"]
        if context.wanted(o.p):
            grads[at] = matmul(dy, o.q, transpose_b=not transposed, alpha=beta)
        if context.wanted(o.q):
            first, second = (dy, o.p) if transposed else (o.p, dy)
            grads[at + 1] = matmul(first, second, transpose_a=True, alpha=beta)
        at += 2
    if o.bias is not None:
        grads[at] = sum_rows(dy) if context.wanted(o.bias) else None
        at += 1
    if o.residual is not None:
        grads[at] = dy
    return grads


def _choice(node: Node, caps: Caps) -> Choice:
    m, n, k, _ = product_sizes(node)
    return choose(node.attrs["arithmetic"], m, n, k, "nt", caps)


def _cooperative(node: Node, caps: Caps) -> bool:
    """Whether the device's matrix units take this product: whole tiles only."""
    m, n, _, _ = product_sizes(node)
    fits = m % COOPERATIVE_TILE == 0 and n % COOPERATIVE_TILE == 0
    return node.attrs["arithmetic"] == "f16" and caps.cooperative_matrix > 0 and fits


def _slices(node: Node, caps: Caps) -> int:
    """Slices of K that are summed apart; 0 where the product writes its output itself."""
    if _cooperative(node, caps):
        return 1 if node.attrs["bias"] or node.attrs["residual"] else 0
    k = product_sizes(node)[2]
    slices = -(-k // slice_length(k, _choice(node, caps)))
    bindings = len(_operand_names(node)) + sum(node.attrs[name] for name in ("bias", "residual")) + 1
    return slices if slices > 1 or bindings > _MOST_BINDINGS else 0


def _operand_names(node: Node) -> list[str]:
    scales = ["a_scale", "b_scale"] if node.attrs["arithmetic"] == "int8" else []
    return ["a", "b", *scales, *(["p", "q"] if node.attrs["pair"] else [])]


def _workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    """Narrow copies of x and of the weight (int8 with scales), then the partial sums, if any."""
    m, n, k, _ = product_sizes(node)
    if node.attrs["arithmetic"] == "f16":
        specs: list[Spec] = [((m, k), "f16"), ((n, k), "f16")]
    else:
        specs = [((m, k // 4), "u32"), ((n, k // 4), "u32"), ((k // BLOCK, m), "f32"), ((k // BLOCK, n), "f32")]
    slices = _slices(node, caps)
    return [*specs, ((slices, m, n), "f32")] if slices else specs


def _launch(node: Node, caps: Caps, aliased: Callable[[Tensor, Tensor], bool]) -> Sequence[Launch]:
    m, n, k, _ = product_sizes(node)
    o, slices = operands(node), _slices(node, caps)
    partial = node.workspace[-1] if slices else None
    product = Product(
        (m, n, k),
        whole(node.workspace[0]),
        whole(node.workspace[1]),
        Block(node.output, 0, n),
        bias=o.bias,
        residual=o.residual,
        accumulate=o.residual is not None and aliased(node.output, o.residual),
    )
    cooperative = _cooperative(node, caps)
    multiply = _multiply_cooperative if cooperative else _multiply
    launches = [_narrow_x(node, caps), _narrow_weight(node, caps), multiply(node, product, partial, caps)]
    if partial is not None:
        launches.append(sum_launch(product, partial, caps))
    if cooperative and o.p is not None and o.q is not None:
        launches.append(_add_pair(node, o.p, o.q, caps))
    return launches


def _scales(node: Node) -> tuple[Tensor, Tensor] | None:
    return (node.workspace[2], node.workspace[3]) if node.attrs["arithmetic"] == "int8" else None


def _narrow_x(node: Node, caps: Caps) -> Launch:
    m, _, k, _ = product_sizes(node)
    f16, scales = node.attrs["arithmetic"] == "f16", _scales(node)
    bindings = [reads("x", node.inputs[0], 4), writes("out", node.workspace[0], 4 if f16 else 1)]
    if scales is not None:
        bindings.append(writes("scales", scales[0]))
    constants = {"M": m, "K": k, "arithmetic": node.attrs["arithmetic"], "over_127": literal(OVER_127)}
    return Launch("narrow_rows", tuple(bindings), constants, grid_of(-(-m * k // 1024), caps), trusted=True)


def _narrow_weight(node: Node, caps: Caps) -> Launch:
    n, k = node.attrs["shape"]
    f16, scales, turned = node.attrs["arithmetic"] == "f16", _scales(node), node.attrs["turned"]
    bindings = [*scale_bindings(_parts(node)), writes("out", node.workspace[1], 4 if f16 else 1)]
    if scales is not None:
        bindings.append(writes("scales", scales[1]))
    constants = {
        "N": n,
        "K": k,
        "arithmetic": node.attrs["arithmetic"],
        "double": len(_parts(node)) == 4,
        "rounded": node.attrs["rounded"],
        "codebook": codebook_text(),
        "bytes": ", ".join(f"{code & 0xFF}u" for code in INT8_CODES.tolist()),
        "over_127": literal(OVER_127),
    }
    grid = (k // 32, n // BLOCK, 1) if turned else grid_of(-(-n * k // 2048), caps)
    return Launch("nf4_narrow_transposed" if turned else "nf4_narrow", tuple(bindings), constants, grid)


def _multiply(node: Node, product: Product, partial: Tensor | None, caps: Caps) -> Launch:
    m, n, k, r = product_sizes(node)
    o, attrs, tile = operands(node), node.attrs, _choice(node, caps).tile
    width = 4 if attrs["arithmetic"] == "f16" else 1
    bindings = [reads("a", node.workspace[0], 4), reads("b", node.workspace[1], 4)]
    scales = _scales(node)
    if scales is not None:
        bindings += [reads("a_scale", scales[0]), reads("b_scale", scales[1])]
    q_strides = (r, 1) if attrs["pair_transposed"] else (1, n)
    constants = {**asdict(tile), "M": m, "N": n, "K": k, "R": r, "beta": attrs["beta"]}
    constants.update(q_n=q_strides[0], q_r=q_strides[1], slices=1, slice=k, bias=False, residual="")
    if o.p is not None and o.q is not None:
        bindings += [reads("p", o.p), reads("q", o.q)]
    if partial is not None:
        constants.update(slices=partial.shape[0], slice=slice_length(k, _choice(node, caps)))
    else:
        extra, added = epilogue(product, width)
        bindings += extra
        constants.update(added)
    bindings.append(writes("c", node.output if partial is None else partial, width))
    grid = (-(-m // tile.BM), n // tile.BN, constants["slices"])
    return Launch(f"matmul_{attrs['arithmetic']}", tuple(bindings), constants, grid, trusted=True)


def _multiply_cooperative(node: Node, product: Product, partial: Tensor | None, caps: Caps) -> Launch:
    m, n, k, _ = product_sizes(node)
    tile = COOPERATIVE_TILE
    constants = {"N": n, "K": k, "BM": tile, "BN": tile, "EDGE": caps.cooperative_matrix}
    out = writes("c", node.output if partial is None else partial)
    bindings = (reads("a", node.workspace[0]), reads("b", node.workspace[1]), out)
    grid = (m // tile, n // tile, 1)
    return Launch("matmul_cooperative", bindings, constants, grid, trusted=True, enables=("wgpu_cooperative_matrix",))


def _add_pair(node: Node, p: Tensor, q: Tensor, caps: Caps) -> Launch:
    """C += beta * p op(q), behind a product that cannot take it along."""
    m, n, _, r = product_sizes(node)
    transposed, out = node.attrs["pair_transposed"], Block(node.output, 0, n)
    beta = node.attrs["beta"]
    product = Product((m, n, r), whole(p), whole(q), out, False, transposed, beta, accumulate=True)
    return product_launch(product, choose("f32", m, n, r, product.layout, caps, split=False))


def _inplace(node: Node) -> Sequence[tuple[int, int]]:
    return [(0, len(node.inputs) - 1)] if node.attrs["residual"] else []


def _flops(node: Node) -> int:
    m, n, k, r = product_sizes(node)
    return 2 * m * n * (k + r)


register(Op("linear", _infer, _reference, _launch, _gradient, workspace=_workspace, flops=_flops, inplace=_inplace))
