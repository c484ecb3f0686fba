"""Matmuls in every transposition, with an optional low-rank one, bias and residual in the epilogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor
from entrenar_gpu.ops.gemm import low_rank
from entrenar_gpu.ops.gemm.launches import Block, Matmul, layout_of, matmul_launches, partial_shapes, sum_launch, whole
from entrenar_gpu.ops.gemm.tiles import Choice, choose
from entrenar_gpu.ops.reduce import sum_rows
from entrenar_gpu.ops.registry import GradientContext, Gradients, Op, Placement, Spec, record, register


def matmul(
    a: Tensor,
    b: Tensor,
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    low_rank: tuple[Tensor, Tensor, float] | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    low_rank_transposed: bool | None = None,
) -> Tensor:
    """alpha * op(a) op(b) + lora_scale * op(p) op(q) + bias + residual, with `low_rank` = (p, q, lora_scale).

    a is [..., M, K] with leading dimensions flattened into M (or [K, M] with `transpose_a`), b [K, N] (or [N, K]),
    in f32, bf16 or half; p has a's layout and q [R, N] (or [N, R] with `low_rank_transposed`, by default as b) with an
    inner length of their own; bias [N]; residual [M, N].
    """
    attrs: dict[str, Any] = {"transpose_a": transpose_a, "transpose_b": transpose_b, "alpha": alpha}
    turned = transpose_b if low_rank_transposed is None else low_rank_transposed
    added = low_rank_inputs(low_rank, turned)
    return record("matmul", a=a, b=b, **added, bias=bias, residual=residual, **attrs)[0]


def low_rank_inputs(low_rank: tuple[Tensor, Tensor, float] | None, transposed: bool) -> dict[str, Any]:
    """What `record` is told of (p, q, lora_scale): the group and its attributes, or nothing."""
    if low_rank is None:
        return {}
    p, q, scale = low_rank
    return {"low_rank": [p, q], "lora_scale": scale, "low_rank_transposed": transposed}


def low_rank_of(node: Node) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(p, q) of a matmul or linear node. A linear that is given `lora_a` makes p of it: its second output."""
    if "lora_a" in node.inputs:
        return node.outputs[1], node.inputs["lora_b"]
    return (node.inputs["low_rank.0"], node.inputs["low_rank.1"]) if "low_rank.0" in node.inputs else (None, None)


def _two_d(t: Tensor, transposed: bool) -> tuple[int, int]:
    """(outer, inner) lengths of an `a` operand: [outer.., inner], or [inner, outer] when transposed."""
    return (t.columns, t.rows) if transposed else (t.rows, t.columns)


def matmul_sizes(node: Node) -> tuple[int, int, int, int]:
    """M, N, K, R."""
    a, b, ta, tb = node.inputs["a"], node.inputs["b"], node.attrs["transpose_a"], node.attrs["transpose_b"]
    m, k = _two_d(a, ta)
    n, k_b = _two_d(b, not tb)
    p, q = low_rank_of(node)
    r = 0
    if p is not None and q is not None:
        (m_p, r), (n_q, r_q) = _two_d(p, ta), _two_d(q, not node.attrs["low_rank_transposed"])
        if (m_p, n_q, r_q) != (m, n, r):
            raise ValueError(f"{node.label()}: low-rank {p!r}, {q!r} does not fit {a!r}, {b!r}")
    if k != k_b:
        raise ValueError(f"{node.label()}: inner lengths of {a!r} and {b!r} differ")
    return m, n, k, r


def _infer(node: Node) -> Sequence[Spec]:
    m, n, _, _ = matmul_sizes(node)
    leading = (m,) if node.attrs["transpose_a"] else node.inputs["a"].shape[:-1]
    check_added(node, m, n)
    return [((*leading, n), "f32")]


def check_added(node: Node, m: int, n: int) -> None:
    """Raises ValueError where the bias or the residual of a matmul does not fit its output [m, n]."""
    bias, residual = node.inputs.get("bias"), node.inputs.get("residual")
    if bias is not None and bias.size != n:
        raise ValueError(f"{node.label()}: bias {bias!r} is not [{n}]")
    if residual is not None and residual.size != m * n:
        raise ValueError(f"{node.label()}: residual {residual!r} is not [{m}, {n}]")


def _reference(node: Node, a: np.ndarray, b: np.ndarray, **added: Any) -> Sequence[np.ndarray]:
    attrs = node.attrs
    dtype: Any = np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32

    out = _product(a, b, attrs["transpose_a"], attrs["transpose_b"], dtype) * dtype(attrs["alpha"])
    return [with_added(attrs, out, **added).reshape(node.output.shape)]


def _product(x: np.ndarray, y: np.ndarray, transpose_x: bool, transpose_y: bool, dtype: Any) -> Any:
    x = x.reshape(-1, x.shape[-1]).astype(dtype, copy=False)
    y = y.reshape(-1, y.shape[-1]).astype(dtype, copy=False)
    return (x.T if transpose_x else x) @ (y.T if transpose_y else y)


def with_added(
    attrs: Mapping[str, Any],
    out: Any,
    low_rank: Sequence[np.ndarray] = (),
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> Any:
    """out [M, N] + lora_scale op(p) op(q) + bias + residual: the reference of what rides along with a matmul."""
    dtype = out.dtype.type
    if low_rank:
        p, q = low_rank
        product = _product(p, q, attrs.get("transpose_a", False), attrs["low_rank_transposed"], dtype)
        out += dtype(attrs["lora_scale"]) * product
    if bias is not None:
        out += bias
    if residual is not None:
        out += residual.reshape(out.shape)
    return out


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    (dy,) = upstream
    attrs, (p, q) = node.attrs, low_rank_of(node)

    def for_product(a: Tensor, b: Tensor, alpha: float, tb: bool) -> list[Tensor | None]:
        ta = attrs["transpose_a"]
        da = db = None
        if context.wanted(a):
            if ta:
                da = matmul(b, dy, tb, True, alpha)
            elif (plain := _plain(b)) is not None:
                da = matmul(dy, plain, False, tb, alpha)
            else:
                da = matmul(dy, b, False, not tb, alpha)
        if context.wanted(b):
            db = matmul(dy, a, True, ta, alpha) if tb else matmul(a, dy, not ta, False, alpha)
        return [da, db]

    da, db = for_product(node.inputs["a"], node.inputs["b"], attrs["alpha"], attrs["transpose_b"])
    low_rank: list[Tensor | None] = []
    if p is not None and q is not None:
        low_rank = for_product(p, q, attrs["lora_scale"], attrs["low_rank_transposed"])
    return {"a": da, "b": db, "low_rank": low_rank, **gradients_of_added(node, dy, context)}


def gradients_of_added(node: Node, dy: Tensor, context: GradientContext) -> dict[str, Tensor | None]:
    """The gradients of a matmul's bias and residual, where they are there."""
    found: dict[str, Tensor | None] = {}
    if (bias := node.inputs.get("bias")) is not None:
        found["bias"] = sum_rows(dy) if context.wanted(bias) else None
    if "residual" in node.inputs:
        found["residual"] = dy
    return found


def _plain(b: Tensor) -> Tensor | None:
    """The transposed of b where b is an NF4 weight dequantised transposed: to dequantise it plain costs no more than to
    read it against its rows."""
    if b.node is None or b.node.op != "nf4_dequantize_transposed":
        return None
    return record("nf4_dequantize", **b.node.inputs, **b.node.attrs)[0]


def _choice(node: Node, caps: Caps) -> Choice:
    m, n, k, _ = matmul_sizes(node)
    return choose("f32", m, n, k, layout_of(node.attrs["transpose_a"], node.attrs["transpose_b"]), caps)


def is_low_rank(node: Node) -> bool:
    """Whether this is an adapter's matmul and nothing else, which has a kernel of its own (low_rank.py)."""
    attrs, out, residual = node.attrs, node.output, node.inputs.get("residual")
    # A gradient that is added to where it lies; any other sum is the general matmul's.
    in_place = residual is not None and out.updates is not None and out.updates in (residual, residual.updates)
    if "low_rank.0" in node.inputs or "bias" in node.inputs or (residual is not None and not in_place):
        return False
    if any(node.inputs[name].dtype != "f32" for name in "ab") or (residual is not None and not attrs["transpose_a"]):
        return False
    return low_rank.takes(matmul_sizes(node)[:3], attrs["transpose_a"], attrs["transpose_b"])


def _workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    if is_low_rank(node):
        return low_rank.partial_specs(matmul_sizes(node)[:3]) if node.attrs["transpose_a"] else ()
    return partial_shapes(matmul_sizes(node)[:3], _choice(node, caps))


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    m, n, k, r = matmul_sizes(node)
    a, b, residual = node.inputs["a"], node.inputs["b"], node.inputs.get("residual")
    (p, q), attrs = low_rank_of(node), node.attrs
    if is_low_rank(node) and not attrs["transpose_a"]:
        return [low_rank.launch(a, b, node.output, attrs["transpose_b"], attrs["alpha"], caps)]
    if is_low_rank(node):
        return _over_rows(node, caps, placed.workspace)
    launched = Matmul(
        (m, n, k),
        whole(a),
        whole(b),
        Block(node.output, 0, n),
        attrs["transpose_a"],
        attrs["transpose_b"],
        attrs["alpha"],
        (whole(p), whole(q), attrs["lora_scale"], r) if p is not None and q is not None else None,
        attrs.get("low_rank_transposed", False),
        node.inputs.get("bias"),
        residual,
        accumulate=residual is not None and placed.aliased(node.output, residual),
    )
    return matmul_launches(launched, _choice(node, caps), next(iter(placed.workspace), None), caps)


def _over_rows(node: Node, caps: Caps, workspace: Sequence[Tensor]) -> Sequence[Launch]:
    """An adapter's gradient, a sum over all tokens: of many, a partial sum a slice of them, and their sum."""
    (a, b), alpha, added = (node.inputs[name] for name in "ab"), node.attrs["alpha"], "residual" in node.inputs
    if not workspace:
        return [low_rank.over_rows(a, b, node.output, alpha, added, caps)]
    (partial,), sizes = workspace, matmul_sizes(node)[:3]
    summed = Matmul(sizes, whole(a), whole(b), Block(node.output, 0, sizes[1]), accumulate=added)
    return [low_rank.over_rows(a, b, partial, alpha, False, caps), sum_launch(summed, partial, caps)]


def _inplace(node: Node) -> Sequence[tuple[int, str]]:
    return [(0, "residual")] if "residual" in node.inputs else []


def _flops(node: Node) -> int:
    m, n, k, r = matmul_sizes(node)
    return 2 * m * n * (k + r)


register(Op("matmul", _infer, _reference, _launch, _gradient, workspace=_workspace, flops=_flops, inplace=_inplace))
