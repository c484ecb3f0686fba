"""Matrix products in every transposition, with an optional low-rank pair, bias and residual in the epilogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor
from entrenar_gpu.ops.gemm import low_rank
from entrenar_gpu.ops.gemm.launches import Block, Matmul, layout_of, matmul_launches, partial_shapes, whole
from entrenar_gpu.ops.gemm.tiles import Choice, choose
from entrenar_gpu.ops.reduce import sum_rows
from entrenar_gpu.ops.registry import Aliased, GradientContext, Op, Spec, record, register


def matmul(
    a: Tensor,
    b: Tensor,
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    pair: tuple[Tensor, Tensor, float] | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    pair_transposed: bool | None = None,
) -> Tensor:
    """alpha * op(a) op(b) + beta * op(p) op(q) + bias + residual, with `pair` = (p, q, beta).

    a is [..., M, K] with leading dimensions flattened into M (or [K, M] with `transpose_a`), b [K, N] (or [N, K]),
    in f32, bf16 or half; p has a's layout and q [R, N] (or [N, R] with `pair_transposed`, by default as b) with an
    inner length of their own; bias [N]; residual [M, N].
    """
    inputs = [a, b, *(pair[:2] if pair else ()), *([bias] if bias else ()), *([residual] if residual else ())]
    (out,) = record(
        "matmul",
        *inputs,
        transpose_a=transpose_a,
        transpose_b=transpose_b,
        alpha=alpha,
        beta=pair[2] if pair else 0.0,
        pair=pair is not None,
        pair_transposed=transpose_b if pair_transposed is None else pair_transposed,
        bias=bias is not None,
        residual=residual is not None,
    )
    return out


@dataclass(frozen=True)
class Operands:
    """The operands of a matmul or linear node by meaning; a linear's weight is its parts, of which b is the first.

    A linear that is given `down` makes p of it: its second output.
    """

    a: Tensor
    b: Tensor
    p: Tensor | None
    q: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    down: Tensor | None = None


def operands(node: Node) -> Operands:
    rest = iter(node.inputs[node.attrs.get("head", 2) :])
    p, q = (next(rest), next(rest)) if node.attrs["pair"] else (None, None)
    bias = next(rest) if node.attrs["bias"] else None
    residual = next(rest) if node.attrs["residual"] else None
    if node.attrs.get("down", False):
        made = node.outputs[1] if node.outputs else None  # there are none yet while their shapes are inferred
        return Operands(node.inputs[0], node.inputs[1], made, q, bias, residual, down=p)
    return Operands(node.inputs[0], node.inputs[1], p, q, bias, residual)


def _two_d(t: Tensor, transposed: bool) -> tuple[int, int]:
    """(outer, inner) lengths of an `a` operand: [outer.., inner], or [inner, outer] when transposed."""
    return (t.columns, t.rows) if transposed else (t.rows, t.columns)


def matmul_sizes(node: Node) -> tuple[int, int, int, int]:
    """M, N, K, R."""
    o, ta, tb = operands(node), node.attrs["transpose_a"], node.attrs["transpose_b"]
    m, k = _two_d(o.a, ta)
    n, k_b = _two_d(o.b, not tb)
    r = 0
    if o.p is not None and o.q is not None:
        (m_p, r), (n_q, r_q) = _two_d(o.p, ta), _two_d(o.q, not node.attrs["pair_transposed"])
        if (m_p, n_q, r_q) != (m, n, r):
            raise ValueError(f"{node.label()}: pair {o.p!r}, {o.q!r} does not fit {o.a!r}, {o.b!r}")
    if k != k_b:
        raise ValueError(f"{node.label()}: inner lengths of {o.a!r} and {o.b!r} differ")
    return m, n, k, r


def _infer(node: Node) -> Sequence[Spec]:
    m, n, _, _ = matmul_sizes(node)
    o = operands(node)
    leading = (m,) if node.attrs["transpose_a"] else o.a.shape[:-1]
    check_added(node, m, n)
    return [((*leading, n), "f32")]


def check_added(node: Node, m: int, n: int) -> None:
    """Raises ValueError where the bias or the residual of a product does not fit its output [m, n]."""
    o = operands(node)
    if o.bias is not None and o.bias.size != n:
        raise ValueError(f"{node.label()}: bias {o.bias!r} is not [{n}]")
    if o.residual is not None and o.residual.size != m * n:
        raise ValueError(f"{node.label()}: residual {o.residual!r} is not [{m}, {n}]")


def _reference(node: Node, a: np.ndarray, b: np.ndarray, *rest: np.ndarray) -> Sequence[np.ndarray]:
    attrs = node.attrs
    dtype: Any = np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32

    out = _product(a, b, attrs["transpose_a"], attrs["transpose_b"], dtype) * dtype(attrs["alpha"])
    return [with_added(attrs, out, rest).reshape(node.output.shape)]


def _product(x: np.ndarray, y: np.ndarray, transpose_x: bool, transpose_y: bool, dtype: Any) -> Any:
    x = x.reshape(-1, x.shape[-1]).astype(dtype, copy=False)
    y = y.reshape(-1, y.shape[-1]).astype(dtype, copy=False)
    return (x.T if transpose_x else x) @ (y.T if transpose_y else y)


def with_added(attrs: Mapping[str, Any], out: Any, added: Sequence[np.ndarray]) -> Any:
    """out [M, N] + beta op(p) op(q) + bias + residual: the reference of what rides along with a product."""
    left, dtype = list(added), out.dtype.type
    if attrs["pair"]:
        p, q = left.pop(0), left.pop(0)
        pair = _product(p, q, attrs.get("transpose_a", False), attrs["pair_transposed"], dtype)
        out += dtype(attrs["beta"]) * pair
    if attrs["bias"]:
        out += left.pop(0)
    if attrs["residual"]:
        out += left.pop(0).reshape(out.shape)
    return out


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Sequence[Tensor | None]:
    (dy,) = upstream
    attrs, o = node.attrs, operands(node)

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

    grads = for_product(o.a, o.b, attrs["alpha"], attrs["transpose_b"])
    if o.p is not None and o.q is not None:
        grads += for_product(o.p, o.q, attrs["beta"], attrs["pair_transposed"])
    if o.bias is not None:
        grads.append(sum_rows(dy) if context.wanted(o.bias) else None)
    if o.residual is not None:
        grads.append(dy)
    return grads


def _plain(b: Tensor) -> Tensor | None:
    """The transposed of b where b is an NF4 weight dequantised transposed: to dequantise it plain costs no more than to
    read it against its rows."""
    if b.node is None or b.node.op != "nf4_dequantize_transposed":
        return None
    return record("nf4_dequantize", *b.node.inputs, **b.node.attrs)[0]


def _choice(node: Node, caps: Caps) -> Choice:
    m, n, k, _ = matmul_sizes(node)
    return choose("f32", m, n, k, layout_of(node.attrs["transpose_a"], node.attrs["transpose_b"]), caps)


def is_low_rank(node: Node) -> bool:
    """Whether this is an adapter's product and nothing else, which has a kernel of its own (low_rank.py)."""
    o, attrs, out = operands(node), node.attrs, node.output
    added = attrs["pair"] or attrs["bias"]
    # A gradient that is added to where it lies; any other sum is the general product's.
    in_place = o.residual is not None and out.updates is not None and out.updates in (o.residual, o.residual.updates)
    if added or any(t.dtype != "f32" for t in (o.a, o.b)) or (attrs["residual"] and not in_place):
        return False
    plain = attrs["transpose_a"] or not attrs["residual"]
    return plain and low_rank.takes(matmul_sizes(node)[:3], attrs["transpose_a"], attrs["transpose_b"])


def _workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    if is_low_rank(node):
        return ()
    return partial_shapes(matmul_sizes(node)[:3], _choice(node, caps))


def _launch(node: Node, caps: Caps, aliased: Aliased) -> Sequence[Launch]:
    m, n, k, r = matmul_sizes(node)
    o, attrs = operands(node), node.attrs
    if is_low_rank(node):
        transposes = attrs["transpose_a"], attrs["transpose_b"]
        return [low_rank.launch(o.a, o.b, node.output, *transposes, attrs["alpha"], attrs["residual"], caps)]
    launched = Matmul(
        (m, n, k),
        whole(o.a),
        whole(o.b),
        Block(node.output, 0, n),
        attrs["transpose_a"],
        attrs["transpose_b"],
        attrs["alpha"],
        (whole(o.p), whole(o.q), attrs["beta"], r) if o.p is not None and o.q is not None else None,
        attrs["pair_transposed"],
        o.bias,
        o.residual,
        accumulate=o.residual is not None and aliased(node.output, o.residual),
    )
    return matmul_launches(launched, _choice(node, caps), next(iter(node.workspace), None), caps)


def _inplace(node: Node) -> Sequence[tuple[int, int]]:
    return [(0, len(node.inputs) - 1)] if node.attrs["residual"] else []


def _flops(node: Node) -> int:
    m, n, k, r = matmul_sizes(node)
    return 2 * m * n * (k + r)


register(Op("matmul", _infer, _reference, _launch, _gradient, workspace=_workspace, flops=_flops, inplace=_inplace))
