"""Products with an NF4 weight in low precision: f16, or int8 with a scale for every 64 values along the contraction.

The forward product contracts over in-features, along which NF4's own blocks lie: its codes become int8 by a table of
16 entries. The gradient of the input contracts over out-features: the weight is transposed and, for int8, quantised
anew along that axis. Activations and output gradients are converted on the way in. The low-precision copy of x is
workspace of the node; so is the weight's, unless one that stays on the device takes the weight's place among the node's
inputs (compiler/weight_copies.py). Adapters, biases and residuals stay f32. An adapter's product with x is made by the
launch that converts x, from the same rows: the node's second output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor
from entrenar_gpu.ops.gemm.launches import Block, Matmul, matmul_launches, whole
from entrenar_gpu.ops.gemm.low_precision import (
    dequantize_transposed,
    low_precision_arrays,
    low_precision_rows_launch,
    low_precision_specs,
    low_precision_weight_launch,
    quantize_rows,
)
from entrenar_gpu.ops.gemm.low_rank import RANKS
from entrenar_gpu.ops.gemm.matmul import Operands, check_added, matmul, operands, with_added
from entrenar_gpu.ops.gemm.tiles import Arithmetic, Choice, choose, slice_length
from entrenar_gpu.ops.quantize import Nf4Tensors
from entrenar_gpu.ops.reduce import sum_rows
from entrenar_gpu.ops.registry import Aliased, GradientContext, Op, Spec, record, register
from entrenar_gpu.quant import BLOCK

_MOST_BINDINGS = Caps().max_storage_buffers  # those of every device, so that all sum in one order


def linear(
    x: Tensor,
    weight: Nf4Tensors,
    pair: tuple[Tensor, Tensor, float] | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    precision: Arithmetic = "f32",
    adapter: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """x W^T + beta * p q^T + bias + residual, [..., N], for a frozen W [N, K] and `pair` = (p [T, R], q [N, R], beta).

    `adapter` = (A [R, K], B [N, R], scale) instead of a pair stands for (x A^T, B, scale). `precision` is the
    arithmetic of x W^T and, in the backward pass, of dy W. Weights that are no multiple of 64 both ways are multiplied
    in f32. "f16" needs a device with that feature.
    """
    whole_blocks = not (weight.shape[0] % BLOCK or weight.shape[1] % BLOCK)
    down = adapter is not None and whole_blocks and precision != "f32" and adapter[0].rows in RANKS
    if adapter is not None:
        a, b, scale = adapter
        pair = (a if down else matmul(x, a, transpose_b=True), b, scale)
    if not whole_blocks:
        return matmul(x, weight.dequantize(), transpose_b=True, pair=pair, bias=bias, residual=residual)
    if precision == "f32":
        return matmul(x, dequantize_transposed(weight), pair=pair, bias=bias, residual=residual, pair_transposed=True)
    return _record(x, weight, precision, False, pair, bias, residual, down)


def transposed(dy: Tensor, weight: Nf4Tensors, precision: Arithmetic) -> Tensor:
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
    down: bool = False,
) -> Tensor:
    extra = [*(pair[:2] if pair else ()), *([bias] if bias else ()), *([residual] if residual else ())]
    return record(
        "linear",
        x,
        *weight.parts,
        *extra,
        arithmetic=precision,
        shape=weight.shape,
        rounded=weight.rounded,
        head=1 + len(weight.parts),
        transposed=turn,
        copied=False,
        pair=pair is not None,
        beta=pair[2] if pair else 0.0,
        pair_transposed=True,
        down=down,
        bias=bias is not None,
        residual=residual is not None,
    )[0]


def weight_of(node: Node) -> tuple[Tensor, ...]:
    """The tensors that hold a node's weight: its NF4 parts or its low-precision copy."""
    return node.inputs[1 : node.attrs["head"]]


def reading(node: Node, copy: Sequence[Tensor]) -> Node:
    """A node that computes the same from a low-precision copy of the weight, and shares the outputs of this one."""
    inputs = (node.inputs[0], *copy, *node.inputs[node.attrs["head"] :])
    return replace(node, inputs=inputs, attrs={**node.attrs, "head": 1 + len(copy), "copied": True})


def product_sizes(node: Node) -> tuple[int, int, int, int]:
    """M, N, K of the product (the weight transposed if need be), and R of the pair."""
    x, (n, k) = node.inputs[0], node.attrs["shape"]
    n, k = (k, n) if node.attrs["transposed"] else (n, k)
    q = operands(node).q
    return x.rows, n, k, 0 if q is None else q.columns if node.attrs["pair_transposed"] else q.rows


def _infer(node: Node) -> Sequence[Spec]:
    x, o = node.inputs[0], operands(node)
    m, n, k, r = product_sizes(node)
    if x.columns != k:
        raise ValueError(f"{node.label()}: inner lengths of {x!r} and weight {list(node.attrs['shape'])} differ")
    q_shape = (n, r) if node.attrs["pair_transposed"] else (r, n)
    if o.p is not None and o.q is not None and (o.p.rows, o.q.shape) != (m, q_shape):
        raise ValueError(f"{node.label()}: pair {o.p!r}, {o.q!r} does not fit [{m}, {n}]")
    check_added(node, m, n)
    if o.down is None:
        return [((*x.shape[:-1], n), "f32")]
    if o.down.shape != ((r, k) if node.attrs["pair_transposed"] else (k, r)):
        raise ValueError(f"{node.label()}: {o.down!r} does not take {x!r} to rank {r}")
    return [((*x.shape[:-1], n), "f32"), ((m, r), "f32")]


def _reference(node: Node, x: np.ndarray, *rest: np.ndarray) -> Sequence[np.ndarray]:
    attrs, head = node.attrs, node.attrs["head"] - 1
    parts, added = rest[:head], rest[head:]
    rows = x.reshape(-1, x.shape[-1])
    low = parts if attrs["copied"] else low_precision_arrays(attrs, parts)
    if attrs["arithmetic"] == "f16":
        out = rows.astype(np.float16).astype(np.float32) @ low[0].astype(np.float32).T
    else:
        (a, a_scale), (b, b_scale) = quantize_rows(rows), (low[0].view(np.int8), low[1].T)
        blocks = (a.reshape(len(a), -1, BLOCK), b.reshape(len(b), -1, BLOCK))
        a_real, b_real = (c * s[..., None] for c, s in zip(blocks, (a_scale, b_scale), strict=True))
        out = a_real.reshape(a.shape) @ b_real.reshape(b.shape).T
    made = []
    if attrs["down"]:
        made = [rows @ (added[0].T if attrs["pair_transposed"] else added[0])]
        added = (made[0], *added[1:])
    return [with_added(attrs, out.astype(x.dtype), added).reshape(node.output.shape), *made]


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Sequence[Tensor | None]:
    """The input's gradient is the same op with the weight transposed; the quantisation counts as the identity."""
    dy, attrs, o = upstream[0], node.attrs, operands(node)
    if attrs["down"]:
        return _gradient_down(node, dy, context)
    grads: list[Tensor | None] = [None] * len(node.inputs)
    if context.wanted(node.inputs[0]):
        plain = {**attrs, "transposed": not attrs["transposed"], "pair": False, "bias": False, "residual": False}
        (grads[0],) = record("linear", dy, *weight_of(node), **plain)
    at = attrs["head"]
    if o.p is not None and o.q is not None:
        transposed, beta = attrs["pair_transposed"], attrs["beta"]
        if context.wanted(o.p):
            grads[at] = matmul(dy, o.q, transpose_b=not transposed, alpha=beta)
        if context.wanted(o.q):
            first, second = (dy, o.p) if transposed else (o.p, dy)
            grads[at + 1] = matmul(first, second, transpose_a=True, alpha=beta)
        at += 2
    return [*grads[:at], *_gradient_added(o, dy, context)]


def _gradient_added(o: Operands, dy: Tensor, context: GradientContext) -> list[Tensor | None]:
    """The gradients of bias and residual, where they are there."""
    grads: list[Tensor | None] = []
    if o.bias is not None:
        grads.append(sum_rows(dy) if context.wanted(o.bias) else None)
    if o.residual is not None:
        grads.append(dy)
    return grads


def _gradient_down(node: Node, dy: Tensor, context: GradientContext) -> Sequence[Tensor | None]:
    """Of x W^T + beta (x A^T) B^T: the input's is dy W + beta (dy B) A, the same op with W transposed and B for A."""
    attrs, o = node.attrs, operands(node)
    if attrs["transposed"]:
        raise ValueError(f"{node.label()}: a gradient, and not differentiable again")
    x, a, b, p = node.inputs[0], o.down, o.q, o.p
    assert a is not None
    assert b is not None
    assert p is not None
    dx = None
    if context.wanted(x):
        changed = {
            **attrs,
            "transposed": not attrs["transposed"],
            "pair_transposed": False,
            "bias": False,
            "residual": False,
        }
        dx, du = record("linear", dy, *weight_of(node), b, a, **changed)
    else:
        du = matmul(dy, b)
    da = matmul(du, x, transpose_a=True, alpha=attrs["beta"]) if context.wanted(a) else None
    db = matmul(dy, p, transpose_a=True, alpha=attrs["beta"]) if context.wanted(b) else None
    nothing: list[Tensor | None] = [None] * len(weight_of(node))
    return [dx, *nothing, da, db, *_gradient_added(o, dy, context)]


def _choice(node: Node, caps: Caps) -> Choice:
    m, n, k, _ = product_sizes(node)
    return choose(node.attrs["arithmetic"], m, n, k, "nt", caps)


def _slices(node: Node, caps: Caps) -> int:
    """Slices of K that are summed apart; 0 where the product writes its output itself."""
    k = product_sizes(node)[2]
    slices = -(-k // slice_length(k, _choice(node, caps)))
    bindings = len(_operand_names(node)) + sum(node.attrs[name] for name in ("bias", "residual")) + 1
    return slices if slices > 1 or bindings > _MOST_BINDINGS else 0


def _operand_names(node: Node) -> list[str]:
    scales = ["a_scale", "b_scale"] if node.attrs["arithmetic"] == "int8" else []
    return ["a", "b", *scales, *(["p", "q"] if node.attrs["pair"] else [])]


def _workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    """Narrow copies of x and of the weight, unless it is there already, then the partial sums, if any."""
    m, n, k, _ = product_sizes(node)
    arithmetic, slices = node.attrs["arithmetic"], _slices(node, caps)
    specs = low_precision_specs(arithmetic, m, k)
    specs += [] if node.attrs["copied"] else low_precision_specs(arithmetic, n, k)
    return [*specs, ((slices, m, n), "f32")] if slices else specs


def low_precision_operands(node: Node) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """What the product multiplies, x and the weight: each its low-precision copy and, in int8, its scales."""
    has_scales = node.attrs["arithmetic"] == "int8"

    def held(by: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        return by[0], by[1] if has_scales else None

    weight = weight_of(node) if node.attrs["copied"] else node.workspace[2 if has_scales else 1 :]
    return held(node.workspace), held(weight)


def _launch(node: Node, caps: Caps, aliased: Aliased) -> Sequence[Launch]:
    m, n, k, r = product_sizes(node)
    o, slices = operands(node), _slices(node, caps)
    partial = node.workspace[-1] if slices else None
    (low_x, x_scales), (low_w, w_scales) = low_precision_operands(node)
    multiplied = Matmul(
        (m, n, k),
        whole(low_x),
        whole(low_w),
        Block(node.output, 0, n),
        transpose_b=True,
        low_rank=(whole(o.p), whole(o.q), node.attrs["beta"], r) if o.p is not None and o.q is not None else None,
        low_rank_transposed=node.attrs["pair_transposed"],
        bias=o.bias,
        residual=o.residual,
        accumulate=o.residual is not None and aliased(node.output, o.residual),
        scales=(x_scales, w_scales) if x_scales is not None and w_scales is not None else None,
    )
    down = (o.down, o.p, node.attrs["pair_transposed"]) if o.down is not None and o.p is not None else None
    launches = [low_precision_rows_launch(whole(node.inputs[0]), m, k, low_x, x_scales, caps, down)]
    if not node.attrs["copied"]:
        launches.append(low_precision_weight_launch(node.attrs, weight_of(node), low_w, w_scales, caps))
    return [*launches, *matmul_launches(multiplied, _choice(node, caps), partial, caps)]


def _inplace(node: Node) -> Sequence[tuple[int, int]]:
    return [(0, len(node.inputs) - 1)] if node.attrs["residual"] else []


def _flops(node: Node) -> int:
    m, n, k, r = product_sizes(node)
    return 2 * m * (n * (k + r) + (k * r if node.attrs["down"] else 0))


register(Op("linear", _infer, _reference, _launch, _gradient, workspace=_workspace, flops=_flops, inplace=_inplace))
