"""Matmuls with an NF4 weight in low precision: f16, or int8 with a scale for every 64 values along the contraction or,
on matrix units, for each row of either operand.

The forward matmul contracts over in-features, along which NF4's own blocks lie: its codes become int8 by a table of
16 entries. The gradient of the input contracts over out-features: the weight is transposed and, for int8, quantised
anew along that axis. Activations and output gradients are converted on the way in. The low-precision copy of x is
workspace of the node, and shared with products of the same x beside it, which find it made. The weight's is workspace
too, unless one that stays on the device takes the weight's place among the node's inputs (compiler/weight_copies.py).
In int8 by rows the largest values of its rows may be there instead, "largest". Adapters, biases and residuals stay f32.
x A^T of an adapter is made by the launch that converts x, from the same rows: the node's second output, where "lora_a"
is among its inputs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, flat
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.gemm import low_rank
from entrenar_gpu.ops.gemm.launches import Block, Matmul, matmul_launches, whole
from entrenar_gpu.ops.gemm.low_precision import (
    dequantize_transposed,
    from_panels,
    low_precision_arrays,
    low_precision_rows_launch,
    low_precision_specs,
    low_precision_weight_launches,
    quantize_rows,
    weight_workspace,
)
from entrenar_gpu.ops.gemm.low_rank import RANKS
from entrenar_gpu.ops.gemm.matmul import (
    check_added,
    gradients_of_added,
    low_rank_inputs,
    low_rank_of,
    matmul,
    with_added,
)
from entrenar_gpu.ops.gemm.rotated import LONGEST, rotated_product
from entrenar_gpu.ops.gemm.tiles import Arithmetic, Choice, choose, matrix_tiles, slice_length
from entrenar_gpu.ops.quantize import Nf4Tensors
from entrenar_gpu.ops.registry import GradientContext, Gradients, Op, Placement, Spec, record, register
from entrenar_gpu.quant import BLOCK

_MOST_BINDINGS = Caps().max_storage_buffers  # those of every device, so that all sum in one order


def linear(
    x: Tensor,
    weight: Nf4Tensors,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    precision: Arithmetic = "f32",
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """x W^T + scale * p q^T + bias + residual, [..., N], for a frozen W [N, K] and (p [T, R], q [N, R], scale).

    `low_rank` is (p, q, scale); `lora` = (A [R, K], B [N, R], scale) stands for (x A^T, B, scale). `precision` is the
    arithmetic of x W^T and, in the backward pass, of dy W. Weights that are no multiple of 64 both ways are multiplied
    in f32. "f16" needs a device with that feature.
    """
    whole_blocks = not (weight.shape[0] % BLOCK or weight.shape[1] % BLOCK)
    if precision == "int8_rows" and max(weight.shape) > LONGEST:
        precision = "int8"
    if lora is not None and whole_blocks and precision != "f32" and lora[0].rows in RANKS:
        a, b, scale = lora
        adapter = {"lora_a": a, "lora_b": b, "lora_scale": scale, "low_rank_transposed": True}
        return _record(x, weight, precision, False, **adapter, bias=bias, residual=residual)
    if lora is not None:
        a, b, scale = lora
        low_rank = (matmul(x, a, transpose_b=True), b, scale)
    if not whole_blocks:
        return matmul(x, weight.dequantize(), False, True, low_rank=low_rank, bias=bias, residual=residual)
    if precision == "f32":
        w = dequantize_transposed(weight)
        return matmul(x, w, low_rank=low_rank, bias=bias, residual=residual, low_rank_transposed=True)
    return _record(x, weight, precision, False, **low_rank_inputs(low_rank, True), bias=bias, residual=residual)


def transposed(dy: Tensor, weight: Nf4Tensors, precision: Arithmetic) -> Tensor:
    """dy W, [..., K]: the gradient of `linear`'s input in f16 or int8."""
    return _record(dy, weight, precision, True)


def _record(x: Tensor, weight: Nf4Tensors, precision: Arithmetic, turn: bool, **added: Any) -> Tensor:
    attrs = {"arithmetic": precision, "shape": weight.shape, "rounded": weight.rounded, "transposed": turn}
    return record("linear", x=x, weight=[*weight.parts], **added, **attrs)[0]


def weight_of(node: Node) -> tuple[Tensor, ...]:
    """The tensors that hold a node's weight: its NF4 parts, "weight", or its low-precision copy, "copy"."""
    return node.group("weight") or node.group("copy")


def reading(node: Node, copy: Sequence[Tensor]) -> Node:
    """A node that computes the same from a low-precision copy of the weight, and shares the outputs of this one."""
    others = {name: t for name, t in node.inputs.items() if not name.startswith("weight.")}
    return replace(node, inputs={"x": others.pop("x"), **flat({"copy": copy}), **others})


def knowing(node: Node, largest: Tensor) -> Node:
    """A node that computes the same, given the largest values of the rows of its weight's copy in int8 by rows."""
    return replace(node, inputs={**node.inputs, "largest": largest})


def product_sizes(node: Node) -> tuple[int, int, int, int]:
    """M, N, K of the matmul (the weight transposed if need be), and R of what is of low rank."""
    x, (n, k) = node.inputs["x"], node.attrs["shape"]
    n, k = (k, n) if node.attrs["transposed"] else (n, k)
    q = node.inputs.get("lora_b", node.inputs.get("low_rank.1"))
    return x.rows, n, k, 0 if q is None else q.columns if node.attrs["low_rank_transposed"] else q.rows


def _infer(node: Node) -> Sequence[Spec]:
    x, inputs, attrs = node.inputs["x"], node.inputs, node.attrs
    m, n, k, r = product_sizes(node)
    if x.columns != k:
        raise ValueError(f"{node.label()}: inner lengths of {x!r} and weight {list(attrs['shape'])} differ")
    check_added(node, m, n)
    out = ((*x.shape[:-1], n), "f32")
    if not r:
        return [out]
    first = inputs.get("lora_a", inputs.get("low_rank.0"))
    second = inputs.get("lora_b", inputs.get("low_rank.1"))
    assert first is not None
    assert second is not None
    if second.shape != ((n, r) if attrs["low_rank_transposed"] else (r, n)):
        raise ValueError(f"{node.label()}: {second!r} does not take rank {r} to [{m}, {n}]")
    if "lora_a" not in inputs:
        if first.rows != m:
            raise ValueError(f"{node.label()}: low-rank {first!r} does not fit [{m}, {n}]")
        return [out]
    if first.shape != ((r, k) if attrs["low_rank_transposed"] else (k, r)):
        raise ValueError(f"{node.label()}: {first!r} does not take {x!r} to rank {r}")
    return [((*x.shape[:-1], n), "f32"), ((m, r), "f32")]


def _reference(
    node: Node,
    x: np.ndarray,
    weight: Sequence[np.ndarray] = (),
    copy: Sequence[np.ndarray] = (),
    largest: np.ndarray | None = None,
    lora_a: np.ndarray | None = None,
    lora_b: np.ndarray | None = None,
    **added: Any,
) -> Sequence[np.ndarray]:
    attrs = node.attrs
    rows = x.reshape(-1, x.shape[-1])
    low = copy or low_precision_arrays(attrs, weight)
    if attrs["arithmetic"] == "f16":
        plain = from_panels(low[0]) if low[0].ndim > 2 else low[0]
        out = rows.astype(np.float16).astype(np.float32) @ plain.astype(np.float32).T
    elif attrs["arithmetic"] == "int8_rows":
        out = rotated_product(rows, low[0], low[1])
    else:
        (a, a_scale), (b, b_scale) = quantize_rows(rows), (low[0].view(np.int8), low[1].T)
        blocks = (a.reshape(len(a), -1, BLOCK), b.reshape(len(b), -1, BLOCK))
        a_real, b_real = (c * s[..., None] for c, s in zip(blocks, (a_scale, b_scale), strict=True))
        out = a_real.reshape(a.shape) @ b_real.reshape(b.shape).T
    made = []
    if lora_a is not None:
        made = [rows @ (lora_a.T if attrs["low_rank_transposed"] else lora_a)]
        added["low_rank"] = [made[0], lora_b]
    return [with_added(attrs, out.astype(x.dtype), **added).reshape(node.output.shape), *made]


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    """The input's gradient is the same op with the weight transposed; the quantisation counts as the identity."""
    dy, attrs, (p, q) = upstream[0], node.attrs, low_rank_of(node)
    if "lora_a" in node.inputs:
        return _gradient_lora(node, dy, context)
    dx = dp = dq = None
    if context.wanted(node.inputs["x"]):
        dx = record("linear", **_transposed(node, dy))[0]
    if p is not None and q is not None:
        turned, scale = attrs["low_rank_transposed"], attrs["lora_scale"]
        if context.wanted(p):
            dp = matmul(dy, q, transpose_b=not turned, alpha=scale)
        if context.wanted(q):
            first, second = (dy, p) if turned else (p, dy)
            dq = matmul(first, second, transpose_a=True, alpha=scale)
    low_rank = [] if p is None else [dp, dq]
    return {"x": dx, "low_rank": low_rank, **gradients_of_added(node, dy, context)}


def _transposed(node: Node, dy: Tensor) -> dict[str, Any]:
    """What `record` is told of dy W, nothing added, for a node that multiplies by W^T, or the other way round."""
    weight = {name: t for name, t in node.inputs.items() if name.startswith(("weight.", "copy."))}
    attrs = {name: node.attrs[name] for name in ("arithmetic", "shape", "rounded")}
    return {"x": dy, **weight, **attrs, "transposed": not node.attrs["transposed"]}


def _gradient_lora(node: Node, dy: Tensor, context: GradientContext) -> Gradients:
    """Of x W^T + s (x A^T) B^T: the input's is dy W + s (dy B) A, the same op with W transposed and B in A's place."""
    scale, (p, b) = node.attrs["lora_scale"], low_rank_of(node)
    if node.attrs["transposed"]:
        raise ValueError(f"{node.label()}: a gradient, and not differentiable again")
    x, a = node.inputs["x"], node.inputs["lora_a"]
    assert p is not None
    assert b is not None
    dx = da = db = None
    if context.wanted(x):
        plain = _transposed(node, dy)
        dx, du = record("linear", **plain, lora_a=b, lora_b=a, lora_scale=scale, low_rank_transposed=False)
    else:
        du = matmul(dy, b)
    if context.wanted(a):
        da = matmul(du, x, transpose_a=True, alpha=scale)
    if context.wanted(b):
        db = matmul(dy, p, transpose_a=True, alpha=scale)
    return {"x": dx, "lora_a": da, "lora_b": db, **gradients_of_added(node, dy, context)}


def _choice(node: Node, caps: Caps) -> Choice:
    m, n, k, _ = product_sizes(node)
    return choose(node.attrs["arithmetic"], m, n, k, "nt", caps)


def _slices(node: Node, caps: Caps) -> int:
    """Slices of K that are summed apart; 0 where the matmul writes its output itself."""
    k = product_sizes(node)[2]
    slices = ceil_div(k, slice_length(k, _choice(node, caps)))
    operands = 2 + (2 if _has_scales(node) else 0) + (2 if product_sizes(node)[3] else 0)
    return slices if slices > 1 or operands + _added(node) + 1 > _MOST_BINDINGS else 0


def _added(node: Node) -> int:
    """How many of bias and residual are there."""
    return ("bias" in node.inputs) + ("residual" in node.inputs)


def has_panels(node: Node, caps: Caps) -> bool:
    """Whether its operands lie in panels, as matrix units are fed in f16."""
    return node.attrs["arithmetic"] == "f16" and any(tile.BYTES == 2 for tile in matrix_tiles("f16", caps))


def _has_scales(node: Node) -> bool:
    return node.attrs["arithmetic"] in ("int8", "int8_rows")


def _workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    """Low-precision copies of x and of the weight, unless it is there already, what making that takes, and the partial
    sums, if any."""
    m, n, k, _ = product_sizes(node)
    arithmetic, slices = node.attrs["arithmetic"], _slices(node, caps)
    panels = has_panels(node, caps)
    specs = low_precision_specs(arithmetic, m, k, panels)
    if not node.group("copy"):
        kept = "largest" in node.inputs
        specs += [*low_precision_specs(arithmetic, n, k, panels), *weight_workspace(node.attrs, kept)]
    return [*specs, ((slices, m, n), "f32")] if slices else specs


def _shared(node: Node, caps: Caps) -> dict[int, Hashable]:
    """The copy of x, and its scales, are those of every product of the same x: of queries, keys and values, say."""
    x, arithmetic = node.inputs["x"], node.attrs["arithmetic"]
    r = product_sizes(node)[3] if "lora_a" in node.inputs else 0
    if r and not low_rank.takes((x.rows, r, x.columns), False, node.attrs["low_rank_transposed"]):
        return {}
    return {index: (x.id, arithmetic, index) for index in range(2 if _has_scales(node) else 1)}


def low_precision_operands(
    node: Node, workspace: Sequence[Tensor]
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """What the matmul multiplies, x and the weight: each its low-precision copy and, in int8, its scales."""
    has_scales = _has_scales(node)

    def held(by: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        return by[0], by[1] if has_scales else None

    return held(workspace), held(node.group("copy") or workspace[2 if has_scales else 1 :])


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    m, n, k, r = product_sizes(node)
    (p, q), residual, slices = low_rank_of(node), node.inputs.get("residual"), _slices(node, caps)
    partial = placed.workspace[-1] if slices else None
    (low_x, x_scales), (low_w, w_scales) = low_precision_operands(node, placed.workspace)
    panels = has_panels(node, caps)
    multiplied = Matmul(
        (m, n, k),
        Block(low_x, 0, k) if panels else whole(low_x),
        Block(low_w, 0, k) if panels else whole(low_w),
        Block(node.output, 0, n),
        transpose_b=True,
        low_rank=(whole(p), whole(q), node.attrs["lora_scale"], r) if p is not None and q is not None else None,
        low_rank_transposed=node.attrs.get("low_rank_transposed", False),
        bias=node.inputs.get("bias"),
        residual=residual,
        accumulate=residual is not None and placed.aliased(node.output, residual),
        scales=(x_scales, w_scales) if x_scales is not None and w_scales is not None else None,
    )
    lora_a = node.inputs.get("lora_a")
    down = (lora_a, p, node.attrs["low_rank_transposed"]) if lora_a is not None and p is not None else None
    x = node.inputs["x"]
    launches = []
    if 0 not in placed.filled:
        launches = [low_precision_rows_launch(whole(x), m, k, low_x, x_scales, caps, down)]
    elif down is not None:
        a, made, turned = down
        launches = [low_rank.launch(x, a, made, turned, 1.0, caps)]
    if not node.group("copy"):
        scratch = [t for t in placed.workspace[2 * (1 + _has_scales(node)) :] if t is not partial]
        largest = node.inputs.get("largest")
        launches += low_precision_weight_launches(node.attrs, weight_of(node), low_w, w_scales, scratch, caps, largest)
    return [*launches, *matmul_launches(multiplied, _choice(node, caps), partial, caps)]


def _inplace(node: Node) -> Sequence[tuple[int, str]]:
    return [(0, "residual")] if "residual" in node.inputs else []


def _flops(node: Node) -> int:
    m, n, k, r = product_sizes(node)
    return 2 * m * (n * (k + r) + (k * r if "lora_a" in node.inputs else 0))


register(
    Op(
        "linear",
        _infer,
        _reference,
        _launch,
        _gradient,
        workspace=_workspace,
        shared=_shared,
        flops=_flops,
        inplace=_inplace,
    )
)
