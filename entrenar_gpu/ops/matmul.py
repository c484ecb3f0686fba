"""Matrix products in every transposition, with an optional low-rank pair, bias and residual in the epilogue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor
from entrenar_gpu.ops.gemm import Block, Product, layout_of, partial_shapes, product_launches, whole
from entrenar_gpu.ops.registry import GradientContext, Op, Spec, place, record, register
from entrenar_gpu.tiles import Choice, choose


def matmul(
    a: Tensor,
    b: Tensor,
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    pair: tuple[Tensor, Tensor, float] | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """alpha * op(a) op(b) + beta * op(p) op(q) + bias + residual, with `pair` = (p, q, beta).

    a is [..., M, K] with leading dimensions flattened into M (or [K, M] with `transpose_a`), b [K, N] (or [N, K]),
    in f32, bf16 or half; p and q have the same layouts with an inner length of their own; bias [N]; residual [M, N].
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
        bias=bias is not None,
        residual=residual is not None,
    )
    return out


@dataclass(frozen=True)
class Operands:
    """The inputs of a matmul node by meaning."""

    a: Tensor
    b: Tensor
    p: Tensor | None
    q: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


def operands(node: Node) -> Operands:
    rest = iter(node.inputs[2:])
    p, q = (next(rest), next(rest)) if node.attrs["pair"] else (None, None)
    bias = next(rest) if node.attrs["bias"] else None
    residual = next(rest) if node.attrs["residual"] else None
    return Operands(node.inputs[0], node.inputs[1], p, q, bias, residual)


def _two_d(t: Tensor, transposed: bool) -> tuple[int, int]:
    """(outer, inner) lengths of an `a` operand: [outer.., inner], or [inner, outer] when transposed."""
    return (t.columns, t.rows) if transposed else (t.rows, t.columns)


def _sizes(node: Node) -> tuple[int, int, int, int]:
    """M, N, K, R."""
    o, ta, tb = operands(node), node.attrs["transpose_a"], node.attrs["transpose_b"]
    m, k = _two_d(o.a, ta)
    n, k_b = _two_d(o.b, not tb)
    r = 0
    if o.p is not None and o.q is not None:
        (m_p, r), (n_q, r_q) = _two_d(o.p, ta), _two_d(o.q, not tb)
        if (m_p, n_q, r_q) != (m, n, r):
            raise ValueError(f"{node.label()}: pair {o.p!r}, {o.q!r} does not fit {o.a!r}, {o.b!r}")
    if k != k_b:
        raise ValueError(f"{node.label()}: inner lengths of {o.a!r} and {o.b!r} differ")
    return m, n, k, r


def _infer(node: Node) -> Sequence[Spec]:
    m, n, _, _ = _sizes(node)
    o = operands(node)
    leading = (m,) if node.attrs["transpose_a"] else o.a.shape[:-1]
    if o.residual is not None and o.residual.size != m * n:
        raise ValueError(f"{node.label()}: residual {o.residual!r} is not [{m}, {n}]")
    if o.bias is not None and o.bias.size != n:
        raise ValueError(f"{node.label()}: bias {o.bias!r} is not [{n}]")
    return [((*leading, n), "f32")]


def _reference(node: Node, a: np.ndarray, b: np.ndarray, *rest: np.ndarray) -> Sequence[np.ndarray]:
    attrs = node.attrs
    dtype: Any = np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32

    def product(x: np.ndarray, y: np.ndarray) -> Any:
        x = x.reshape(-1, x.shape[-1]).astype(dtype, copy=False)
        y = y.reshape(-1, y.shape[-1]).astype(dtype, copy=False)
        return (x.T if attrs["transpose_a"] else x) @ (y.T if attrs["transpose_b"] else y)

    left = list(rest)
    out = product(a, b) * dtype(attrs["alpha"])
    if attrs["pair"]:
        out += dtype(attrs["beta"]) * product(left.pop(0), left.pop(0))
    if attrs["bias"]:
        out += left.pop(0)
    if attrs["residual"]:
        out += left.pop(0).reshape(out.shape)
    return [out.reshape(node.output.shape)]


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Sequence[Tensor | None]:
    (dy,) = upstream
    attrs, o = node.attrs, operands(node)

    def for_product(a: Tensor, b: Tensor, alpha: float) -> list[Tensor | None]:
        ta, tb = attrs["transpose_a"], attrs["transpose_b"]
        da = db = None
        if context.wanted(a):
            da = matmul(b, dy, tb, True, alpha) if ta else matmul(dy, b, False, not tb, alpha)
        if context.wanted(b):
            db = matmul(dy, a, True, ta, alpha) if tb else matmul(a, dy, not ta, False, alpha)
        return [da, db]

    grads = for_product(o.a, o.b, attrs["alpha"])
    if o.p is not None and o.q is not None:
        grads += for_product(o.p, o.q, attrs["beta"])
    if o.bias is not None:
        from entrenar_gpu.ops.reduce import sum_rows

        grads.append(sum_rows(dy) if context.wanted(o.bias) else None)
    if o.residual is not None:
        grads.append(dy)
    return grads


def fold_sum(old: Tensor, new: Tensor, free: Callable[[Tensor], bool]) -> Tensor | None:
    """old + new as an epilogue, where either is a matmul that may be recorded anew; None where that cannot be done.

    A skinny product joins the other as its low-rank pair; otherwise one becomes the residual of the other.
    `free(t)` tells that nobody else reads or holds t.
    """
    if old is new:
        return None

    def plain(t: Tensor) -> bool:
        matmul_output = t.node is not None and t.node.op == "matmul" and not t.persistent
        return matmul_output and t.updates is None and free(t)

    def rebuilt(t: Tensor, **changes: Any) -> Tensor:
        assert t.node is not None
        t.graph.nodes.remove(t.node)
        o = operands(t.node)
        attrs = {**t.node.attrs, **{k: v for k, v in changes.items() if k in ("pair", "residual", "beta")}}
        pair = changes.get("operands", (o.p, o.q))
        residual = changes.get("residual_tensor", o.residual)
        attrs.update(pair=pair[0] is not None, residual=residual is not None)
        inputs = [x for x in (o.a, o.b, *pair, o.bias, residual) if x is not None]
        node = Node("matmul", tuple(inputs), attrs, scope=t.node.scope, layer=t.node.layer, phase=t.node.phase)
        return place(node)[0]

    skinny = 256
    if plain(old) and plain(new) and old.node is not None and new.node is not None:
        o, n = old.node.attrs, new.node.attrs
        same = (o["transpose_a"], o["transpose_b"]) == (n["transpose_a"], n["transpose_b"])
        bare = not (n["pair"] or n["bias"] or n["residual"])
        short = _sizes(new.node)[2] <= skinny and new.node.inputs[1].dtype == "f32"
        if same and bare and short and not o["pair"]:
            a, b = new.node.inputs
            new.graph.nodes.remove(new.node)
            return rebuilt(old, operands=(a, b), beta=n["alpha"])
    for product, addend in ((new, old), (old, new)):
        if plain(product) and product.node is not None and not product.node.attrs["residual"]:
            return rebuilt(product, residual_tensor=addend)
    return None


def _choice(node: Node, caps: Caps) -> Choice:
    m, n, k, _ = _sizes(node)
    return choose("f32", m, n, k, layout_of(node.attrs["transpose_a"], node.attrs["transpose_b"]), caps)


def _workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    return partial_shapes(_sizes(node)[:3], _choice(node, caps))


def _launch(node: Node, caps: Caps, aliased: Callable[[Tensor, Tensor], bool]) -> Sequence[Launch]:
    m, n, k, r = _sizes(node)
    o, attrs = operands(node), node.attrs
    product = Product(
        (m, n, k),
        whole(o.a),
        whole(o.b),
        Block(node.output, 0, n),
        attrs["transpose_a"],
        attrs["transpose_b"],
        attrs["alpha"],
        (o.p, o.q, attrs["beta"], r) if o.p is not None and o.q is not None else None,
        o.bias,
        o.residual,
        accumulate=o.residual is not None and aliased(node.output, o.residual),
    )
    return product_launches(product, _choice(node, caps), next(iter(node.workspace), None), caps)


def _inplace(node: Node) -> Sequence[tuple[int, int]]:
    return [(0, len(node.inputs) - 1)] if node.attrs["residual"] else []


def _flops(node: Node) -> int:
    m, n, k, r = _sizes(node)
    return 2 * m * n * (k + r)


register(Op("matmul", _infer, _reference, _launch, _gradient, workspace=_workspace, flops=_flops, inplace=_inplace))
