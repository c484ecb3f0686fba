"""Matrix products in every transposition, with an optional low-rank pair, bias and residual in the epilogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor
from entrenar_gpu.ops.gemm import Block, Product, layout_of, partial_shapes, product_launches, whole
from entrenar_gpu.ops.registry import GradientContext, Op, Spec, place, record, register
from entrenar_gpu.tiles import Choice, choose

LONGEST_PAIR = 256  # inner length up to which a product may ride along in another


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
    """The inputs of a matmul or linear node by meaning; a linear's weight is its parts, of which b is the first."""

    a: Tensor
    b: Tensor
    p: Tensor | None
    q: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


def operands(node: Node) -> Operands:
    rest = iter(node.inputs[node.attrs.get("head", 2) :])
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
        product = t.node is not None and t.node.op in ("matmul", "linear") and not t.persistent
        return product and t.updates is None and free(t)

    if plain(old) and plain(new) and old.node is not None and new.node is not None:
        pair = _as_pair(new.node, old.node)
        if pair is not None:
            new.graph.nodes.remove(new.node)
            return _rebuilt(old.node, pair=new.node.inputs, attrs=pair)
    for product, addend in ((new, old), (old, new)):
        if plain(product) and product.node is not None and not product.node.attrs["residual"]:
            return _rebuilt(product.node, residual=addend)
    return None


def _as_pair(skinny: Node, main: Node) -> dict[str, Any] | None:
    """The attributes that make the product `skinny` the low-rank pair of `main`; None where it cannot be."""
    s, m = skinny.attrs, main.attrs
    if skinny.op != "matmul" or s["pair"] or s["bias"] or s["residual"] or m["pair"]:
        return None
    if _sizes(skinny)[2] > LONGEST_PAIR or any(t.dtype != "f32" for t in skinny.inputs):
        return None
    if main.op == "linear":
        return None if s["transpose_a"] else {"beta": s["alpha"], "pair_transposed": s["transpose_b"]}
    same = (s["transpose_a"], s["transpose_b"]) == (m["transpose_a"], m["transpose_b"])
    return {"beta": s["alpha"]} if same else None


def _rebuilt(
    node: Node,
    pair: Sequence[Tensor] | None = None,
    residual: Tensor | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Tensor:
    """The product recorded anew, with a pair or a residual it did not have."""
    node.output.graph.nodes.remove(node)
    o = operands(node)
    p, q = pair if pair is not None else (o.p, o.q)
    residual = o.residual if residual is None else residual
    changed = {**node.attrs, **(attrs or {}), "pair": p is not None, "residual": residual is not None}
    head = node.inputs[: node.attrs.get("head", 2)]
    inputs = (*head, *(t for t in (p, q, o.bias, residual) if t is not None))
    return place(Node(node.op, inputs, changed, scope=node.scope, layer=node.layer, phase=node.phase))[0]


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
        (whole(o.p), whole(o.q), attrs["beta"], r) if o.p is not None and o.q is not None else None,
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
