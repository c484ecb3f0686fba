"""Cross-entropy fused with the output projection, so that the logits of a whole batch never exist.

Tokens are taken in chunks, the vocabulary in the pages the weight is kept in. Of a chunk all logits [C, V] exist at
once, as scratch that the next chunk reuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, grid_of, reads, split_offset, writes
from entrenar_gpu.ops.elementwise import copy_launch, literal, mul
from entrenar_gpu.ops.embedding import page_starts
from entrenar_gpu.ops.gemm import Block, Product, gemm, product_launch, sum_launch
from entrenar_gpu.ops.reduce import rows_launch
from entrenar_gpu.ops.registry import GradientContext, Op, Spec, in_place, record, register
from entrenar_gpu.tiles import Choice, choose, slice_length

Aliased = Callable[[Tensor, Tensor], bool]
IGNORE = -100  # targets that do not count, as in PyTorch
LOGITS_BYTES = 80 << 20  # scratch for the logits of a chunk: 128 tokens of a vocabulary of 152k


def cross_entropy(x: Tensor, targets: Tensor, pages: Sequence[Tensor], smoothing: float = 0.0) -> Tensor:
    """Sum over tokens of the cross-entropy of x W^T, shape [1].

    x [T, D]; W [V, D] as consecutive pages of rows, f32, bf16 or half; targets i32 [T], IGNORE where a token does not
    count. A token costs (1 - s) (lse - logit[target]) + s (lse - mean logit), s = `smoothing` (Szegedy et al.,
    arXiv 1512.00567, section 7). With a frozen W the forward pass leaves d(sum)/dx behind, unscaled, since the logits
    are at hand; with a trainable W the backward pass computes the logits again.
    """
    emit = x.requires_grad and not any(p.requires_grad for p in pages)
    return record("cross_entropy", x, targets, *pages, smoothing=smoothing, emit=emit)[0]


def _vocabulary(pages: Sequence[Tensor]) -> int:
    return sum(p.shape[0] for p in pages)


def _chunk(tokens: int, vocabulary: int, caps: Caps) -> int:
    """Tokens whose logits are computed at once."""
    fit = min(LOGITS_BYTES, caps.max_binding_bytes) // (4 * vocabulary)
    return min(tokens, max(fit // 64 * 64, min(fit, 64), 1))


def _infer(node: Node) -> Sequence[Spec]:
    x, targets, *pages = node.inputs
    if targets.size != x.rows or any(p.columns != x.columns for p in pages):
        raise ValueError(f"{node.label()}: {x!r}, {targets!r} and {pages!r} do not fit")
    return [((1,), "f32"), ((x.rows,), "f32"), *([(x.shape, "f32")] if node.attrs["emit"] else [])]


def _slopes(
    x: np.ndarray, targets: np.ndarray, table: np.ndarray, smoothing: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(loss by token, lse by token, d(sum of losses)/d(logits))."""
    logits = x.reshape(-1, x.shape[-1]) @ table.T
    targets = targets.reshape(-1)
    counted = targets != IGNORE
    peak = logits.max(axis=-1)
    e = np.exp(logits - peak[:, None])
    lse = peak + np.log(e.sum(axis=-1))
    place = np.where(counted, targets, 0)
    rows = np.arange(len(targets))
    s = x.dtype.type(smoothing)
    losses = (1 - s) * (lse - logits[rows, place]) + s * (lse - logits.mean(axis=-1))
    slopes = e / e.sum(axis=-1, keepdims=True) - s / table.shape[0]
    slopes[rows, place] -= 1 - s
    return np.where(counted, losses, 0).astype(x.dtype), lse, slopes * counted[:, None]


def _table(x: np.ndarray, pages: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([p.astype(x.dtype, copy=False) for p in pages])


def _reference(node: Node, x: np.ndarray, targets: np.ndarray, *pages: np.ndarray) -> Sequence[np.ndarray]:
    table = _table(x, pages)
    losses, lse, slopes = _slopes(x, targets, table, node.attrs["smoothing"])
    dx = [(slopes @ table).reshape(x.shape).astype(x.dtype)] if node.attrs["emit"] else []
    return [losses.sum(keepdims=True, dtype=x.dtype.type), lse.astype(x.dtype), *dx]


def _workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    x, _, *pages = node.inputs
    vocabulary = _vocabulary(pages)
    count = _chunk(x.rows, vocabulary, caps)
    partials = _dx_partials(pages, count, caps) if node.attrs["emit"] else []
    return [((count, vocabulary), "f32"), ((x.rows,), "f32"), *partials]


def _chunks(tokens: int, size: int) -> list[tuple[int, int]]:
    """(first token, count) of each chunk."""
    return [(start, min(size, tokens - start)) for start in range(0, tokens, size)]


def _logits_launches(
    x: Tensor, pages: Sequence[Tensor], logits: Tensor, at: int, count: int, caps: Caps
) -> list[Launch]:
    """logits[:count] = x[at : at + count] W^T, page by page."""
    depth, vocabulary = x.columns, logits.columns
    rows = Block(x, at * depth, depth)
    return [
        gemm(
            caps,
            (count, page.shape[0], depth),
            rows,
            Block(page, 0, depth),
            Block(logits, start, vocabulary),
            transpose_b=True,
        )
        for page, start in zip(pages, page_starts(pages), strict=True)
    ]


def _dx_choices(pages: Sequence[Tensor], count: int, caps: Caps) -> list[Choice]:
    """How slopes W is cut up, page by page: [count, D] alone fills no GPU, so the long sum over V is split.

    Each page gets its share of the slices that one product over the whole vocabulary would be split into.
    """
    vocabulary, depth = _vocabulary(pages), pages[0].columns
    whole = choose("f32", count, depth, vocabulary, "nn", caps)
    return [Choice(whole.tile, max(1, round(whole.slices * p.shape[0] / vocabulary))) for p in pages]


def _dx_slices(pages: Sequence[Tensor], choices: Sequence[Choice]) -> list[int]:
    return [-(-p.shape[0] // slice_length(p.shape[0], c)) for p, c in zip(pages, choices, strict=True)]


def _dx_partials(pages: Sequence[Tensor], count: int, caps: Caps) -> Sequence[Spec]:
    """Workspace for the partial sums of `_dx_launches`; none where every page is one slice."""
    slices = _dx_slices(pages, _dx_choices(pages, count, caps))
    return [((sum(slices), count, pages[0].columns), "f32")] if max(slices) > 1 else []


def _dx_launches(
    dx: Tensor, pages: Sequence[Tensor], logits: Tensor, partial: Tensor | None, at: int, count: int, caps: Caps
) -> list[Launch]:
    """dx[at : at + count] = slopes W, summed over the pages, and over slices of them in `partial`."""
    depth, vocabulary = dx.columns, logits.columns
    out = Block(dx, at * depth, depth)
    launches, first = [], 0
    choices = _dx_choices(pages, logits.shape[0], caps)
    slices = _dx_slices(pages, choices)
    for page, start, choice, sliced in zip(pages, page_starts(pages), choices, slices, strict=True):
        sizes = (count, depth, page.shape[0])
        slopes, weight = Block(logits, start, vocabulary), Block(page, 0, depth)
        if partial is None:
            launches.append(gemm(caps, sizes, slopes, weight, out, accumulate=start > 0))
            continue
        here = Block(partial, first * count * depth, depth)
        launches.append(product_launch(Product(sizes, slopes, weight, here), choice))
        first += sliced
    if partial is not None:
        whole = Product((count, depth, vocabulary), Block(logits, 0, vocabulary), Block(pages[0], 0, depth), out)
        launches.append(sum_launch(whole, partial, caps))
    return launches


def _row_constants(node: Node, vocabulary: int, at: int, count: int, mode: str) -> dict[str, Any]:
    s = node.attrs["smoothing"]
    return {
        "mode": mode,
        "C": count,
        "V": vocabulary,
        "first": at,
        "smoothed": s > 0,
        "keep": literal(1 - s),
        "smoothing": literal(s),
        "share": literal(s / vocabulary),
        "WIDTH": 256,
    }


def _launch(node: Node, caps: Caps, aliased: Aliased) -> Sequence[Launch]:
    x, targets, *pages = node.inputs
    loss, lse = node.outputs[:2]
    logits, losses, *partial = node.workspace
    launches = []
    for at, count in _chunks(x.rows, logits.shape[0]):
        launches += _logits_launches(x, pages, logits, at, count, caps)
        mode, use = ("loss and slopes", writes) if node.attrs["emit"] else ("loss", reads)
        offset, first = split_offset(at, losses)
        bindings = (
            reads("targets", targets, offset=offset),
            use("logits", logits),
            writes("losses", losses, offset=offset),
            writes("lse", lse, offset=offset),
        )
        constants = _row_constants(node, logits.columns, first, count, mode)
        launches.append(Launch("cross_entropy", bindings, constants, grid_of(count, caps)))
        if node.attrs["emit"]:
            launches += _dx_launches(node.outputs[2], pages, logits, next(iter(partial), None), at, count, caps)
    launches.append(rows_launch(losses, loss, 1, x.rows, caps))
    return launches


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Sequence[Tensor | None]:
    x, targets, *pages = node.inputs
    if node.attrs["emit"]:
        return [mul(node.outputs[2], upstream[0]), None, *[None] * len(pages)]
    if all(context.wanted(p) for p in pages):
        held = [context.take(p) for p in pages]
        attrs = {"smoothing": node.attrs["smoothing"], "pages": len(pages)}
        outs = record("cross_entropy_grad", x, targets, node.outputs[1], upstream[0], *pages, *held, **attrs)
        dx, *totals = outs
        kept = [
            in_place(t, h) if h.persistent or h.updates is not None else t for t, h in zip(totals, held, strict=True)
        ]
        return [dx, None, *kept]
    raise ValueError(f"{node.label()}: the pages of a vocabulary are trainable all together or not at all")


def _grad_reference(
    node: Node, x: np.ndarray, targets: np.ndarray, lse: np.ndarray, upstream: np.ndarray, *rest: np.ndarray
) -> Sequence[np.ndarray]:
    pages, held = rest[: node.attrs["pages"]], rest[node.attrs["pages"] :]
    table = _table(x, pages)
    _, _, slopes = _slopes(x, targets, table, node.attrs["smoothing"])
    slopes = slopes.astype(x.dtype) * upstream
    whole = slopes.T @ x.reshape(-1, x.shape[-1])
    edges = np.cumsum([len(p) for p in pages])[:-1]
    return [
        (slopes @ table).reshape(x.shape),
        *(h + part for h, part in zip(held, np.split(whole, edges), strict=True)),
    ]


def _grad_launch(node: Node, caps: Caps, aliased: Aliased) -> Sequence[Launch]:
    x, targets, lse, upstream, *rest = node.inputs
    pages, held = rest[: node.attrs["pages"]], rest[node.attrs["pages"] :]
    dx, *totals = node.outputs
    logits, *partial = node.workspace
    depth, vocabulary = x.columns, logits.columns
    launches = [copy_launch(h, t, caps) for h, t in zip(held, totals, strict=True) if not aliased(t, h)]
    for at, count in _chunks(x.rows, logits.shape[0]):
        launches += _logits_launches(x, pages, logits, at, count, caps)
        offset, first = split_offset(at, lse)
        bindings = (
            reads("targets", targets, offset=offset),
            reads("lse", lse, offset=offset),
            reads("upstream", upstream),
            writes("logits", logits),
        )
        constants = _row_constants(node, vocabulary, first, count, "slopes")
        launches.append(Launch("cross_entropy", bindings, constants, grid_of(count, caps)))
        launches += _dx_launches(dx, pages, logits, next(iter(partial), None), at, count, caps)
        for total, start in zip(totals, page_starts(pages), strict=True):
            block = Block(logits, start, vocabulary)
            sizes = (total.shape[0], depth, count)
            rows = Block(x, at * depth, depth)
            launches.append(gemm(caps, sizes, block, rows, Block(total, 0, depth), transpose_a=True, accumulate=True))
    return launches


def _flops(products: int) -> Callable[[Node], int]:
    def count(node: Node) -> int:
        x, pages = (
            node.inputs[0],
            node.inputs[2:] if node.op == "cross_entropy" else node.inputs[4:][: node.attrs["pages"]],
        )
        passes = products + (1 if node.attrs.get("emit") else 0)
        return 2 * passes * x.size * _vocabulary(pages)

    return count


def _grad_workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    x, pages = node.inputs[0], node.inputs[4:][: node.attrs["pages"]]
    vocabulary = _vocabulary(pages)
    count = _chunk(x.rows, vocabulary, caps)
    return [((count, vocabulary), "f32"), *_dx_partials(pages, count, caps)]


register(Op("cross_entropy", _infer, _reference, _launch, _gradient, workspace=_workspace, flops=_flops(1)))
register(
    Op(
        "cross_entropy_grad",
        lambda node: [
            (node.inputs[0].shape, "f32"),
            *((t.shape, "f32") for t in node.inputs[4 + node.attrs["pages"] :]),
        ],
        _grad_reference,
        _grad_launch,
        workspace=_grad_workspace,
        flops=_flops(3),
        inplace=lambda node: [(1 + i, 4 + node.attrs["pages"] + i) for i in range(node.attrs["pages"])],
    )
)


def project(x: Tensor, pages: Sequence[Tensor]) -> Tensor:
    """x W^T for a W [V, D] kept in pages of rows: logits [T, V], for the few tokens that are wanted whole."""
    return record("project", x, *pages)[0]


def _project_launch(node: Node, caps: Caps, aliased: Aliased) -> Sequence[Launch]:
    x, *pages = node.inputs
    return _logits_launches(x, pages, node.output, 0, x.rows, caps)


register(
    Op(
        "project",
        lambda node: [((node.inputs[0].rows, _vocabulary(node.inputs[1:])), "f32")],
        lambda node, x, *pages: [x.reshape(-1, x.shape[-1]) @ _table(x, pages).T],
        _project_launch,
        flops=lambda node: 2 * node.inputs[0].columns * node.output.size,
    )
)
