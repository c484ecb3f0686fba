"""Cross-entropy fused with the output projection, so that the logits of a whole batch never exist.

Tokens are taken in chunks, the vocabulary in the shards the weight is kept in. Of a chunk all logits [C, V] exist at
once, as scratch that the next chunk reuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from entrenar_gpu.dtypes import ELEMENT_BYTES
from entrenar_gpu.graph import Binding, Caps, Launch, Node, Tensor, grid_of, literal, reads, split_offset, writes
from entrenar_gpu.ops.elementwise import copy_launch, mul
from entrenar_gpu.ops.embedding import shard_starts
from entrenar_gpu.ops.gemm.launches import Block, Matmul, single_launch
from entrenar_gpu.ops.gemm.tiles import Arithmetic, matrices_of
from entrenar_gpu.ops.gemm.vocabulary import (
    DSCORE_SCALE,
    arithmetic_of,
    back_launches,
    back_workspace,
    logits_launches,
    vocabulary_of,
)
from entrenar_gpu.ops.reduce import rows_launch
from entrenar_gpu.ops.registry import GradientContext, Gradients, Op, Placement, Spec, in_place, record, register

IGNORE = -100  # the label of a position without loss, as PyTorch's cross-entropy and transformers have it
LOGITS_BYTES = 80 << 20  # scratch for the logits of a chunk: of a vocabulary of 152k 128 tokens, or 256 in f16
MATRIX_CHUNKS = 2  # times as many on matrix units, which fewer tokens do not keep busy


def cross_entropy(
    x: Tensor,
    targets: Tensor,
    shards: Sequence[Tensor],
    smoothing: float = 0.0,
    precision: Arithmetic = "f32",
    softcap: float | None = None,
    weights: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Sum over tokens of the cross-entropy of x W^T, shape [1]; with `softcap` c, of c tanh(x W^T / c).

    x [T, D]; W [V, D] as consecutive shards of rows, f32, bf16 or half; targets i32 [T], IGNORE where a token does not
    count. A token costs (1 - s) (lse - logit[target]) + s (lse - mean logit), s = `smoothing` (Szegedy et al.,
    arXiv 1512.00567, section 7), times its weight where there are `weights` f32 [T]. Where x requires a gradient and W
    is frozen, the forward pass leaves d(sum)/dx behind, unscaled, since the logits are at hand; with a trainable W the
    backward pass computes the logits again.

    `low_rank` = (p [T, R], q [V, R]) adds p q^T to x W^T, in f32, where W is frozen; d(sum)/dp and d(sum)/dq are left
    behind likewise.

    With `precision` other than "f32", matmuls with a frozen W are made in f16 with f32 sums, and logits are kept in
    f16, where W comes in multiples of 64 both ways. Not in int8: the loss hangs on single logits.
    """
    trains = any(p.role == "param" or p.requires_grad for p in shards)  # evaluated with the arithmetic it trains in
    arithmetic = "f32" if trains or low_rank is not None else arithmetic_of(precision, shards)
    p, q = low_rank or (None, None)
    emit = any(t is not None and t.requires_grad for t in (x, p, q)) and not trains
    if low_rank is not None and trains:
        raise ValueError("what is of low rank is added to a frozen vocabulary")
    attrs = {"smoothing": smoothing, "emit": emit, "arithmetic": arithmetic, "softcap": softcap}
    tensors = {"x": x, "targets": targets, "weights": weights, "p": p, "q": q, "shards": list(shards)}
    return record("cross_entropy", **tensors, **attrs)[0]


def _logits(tokens: int, shards: Sequence[Tensor], dtype: str, caps: Caps) -> Spec:
    """Scratch for the logits of as many tokens as are taken at once."""
    vocabulary = vocabulary_of(shards)
    wanted = LOGITS_BYTES * (MATRIX_CHUNKS if dtype == "f16" and matrices_of(caps) is not None else 1)
    fit = min(wanted, caps.max_binding_bytes) // (ELEMENT_BYTES[dtype] * vocabulary)
    return (min(tokens, max(fit // 64 * 64, min(fit, 64), 1)), vocabulary), dtype


def _infer(node: Node) -> Sequence[Spec]:
    x, targets, shards = node.inputs["x"], node.inputs["targets"], node.group("shards")
    weights = node.inputs.get("weights", targets)
    if {targets.size, weights.size} != {x.rows} or any(p.columns != x.columns for p in shards):
        raise ValueError(f"{node.label()}: {x!r}, {targets!r}, {weights!r} and {shards!r} do not fit")
    low_rank = _low_rank(node)
    if low_rank and (low_rank[0].rows, low_rank[1].rows, low_rank[0].columns) != (
        x.rows,
        vocabulary_of(shards),
        low_rank[1].columns,
    ):
        raise ValueError(f"{node.label()}: {low_rank!r} do not fit")
    emitted = [(t.shape, "f32") for t in (x, *low_rank)] if node.attrs["emit"] else []
    return [((1,), "f32"), ((x.rows,), "f32"), *emitted]


def _low_rank(node: Node) -> tuple[Tensor, ...]:
    """p and q, where there are any."""
    return tuple(node.inputs[name] for name in ("p", "q") if name in node.inputs)


def _dscores(
    node: Node, logits: np.ndarray, targets: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(loss by token, lse by token, d(sum of losses)/d(logits)), for logits before their soft cap."""
    softcap, slope = node.attrs.get("softcap"), None
    if softcap is not None:
        bent = np.tanh(logits / logits.dtype.type(softcap))
        logits, slope = logits.dtype.type(softcap) * bent, 1 - bent * bent
    targets = targets.reshape(-1)
    counted = targets != IGNORE
    peak = logits.max(axis=-1)
    e = np.exp(logits - peak[:, None])
    lse = peak + np.log(e.sum(axis=-1))
    place = np.where(counted, targets, 0)
    rows = np.arange(len(targets))
    s = logits.dtype.type(node.attrs["smoothing"])
    losses = (1 - s) * (lse - logits[rows, place]) + s * (lse - logits.mean(axis=-1))
    dscores = e / e.sum(axis=-1, keepdims=True) - s / logits.shape[1]
    dscores[rows, place] -= 1 - s
    if slope is not None:
        dscores *= slope
    factor = counted.astype(logits.dtype)
    if weights is not None:
        factor *= weights.reshape(-1)
    return (np.where(counted, losses, 0) * factor).astype(logits.dtype), lse, dscores * factor[:, None]


def _low_precision_reference(
    node: Node, x: np.ndarray, targets: np.ndarray, table: np.ndarray, weights: np.ndarray | None
) -> Sequence[np.ndarray]:
    """loss by token, lse by token and dx where operands, logits and dscores are rounded to f16."""

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float16).astype(np.float32)

    table, rows = rounded(table), rounded(x.reshape(-1, x.shape[-1]))
    losses, lse, dscores = _dscores(node, rounded(rows @ table.T), targets, weights)
    dx = rounded(dscores * np.float32(DSCORE_SCALE)) @ table / np.float32(DSCORE_SCALE)
    return [losses, lse, dx.reshape(x.shape)]


def _table(x: np.ndarray, shards: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([p.astype(x.dtype, copy=False) for p in shards])


def _reference(
    node: Node,
    x: np.ndarray,
    targets: np.ndarray,
    shards: Sequence[np.ndarray],
    weights: np.ndarray | None = None,
    p: np.ndarray | None = None,
    q: np.ndarray | None = None,
) -> Sequence[np.ndarray]:
    table, gradients = _table(x, shards), []
    if node.attrs["arithmetic"] == "f16":
        losses, lse, dx = _low_precision_reference(node, x, targets, table, weights)
    else:
        logits = x.reshape(-1, x.shape[-1]) @ table.T
        if p is not None and q is not None:
            logits += p @ q.T
        losses, lse, dscores = _dscores(node, logits, targets, weights)
        dx = (dscores @ table).reshape(x.shape)
        if p is not None and q is not None:
            gradients = [dscores @ q, dscores.T @ p]
    emitted = [each.astype(x.dtype) for each in (dx, *gradients)] if node.attrs["emit"] else []
    return [losses.sum(keepdims=True, dtype=x.dtype.type), lse.astype(x.dtype), *emitted]


def _workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    """Logits, the losses of tokens, in f16 the low-precision tokens of a chunk, and partial sums of dx, if any."""
    x, shards = node.inputs["x"], node.group("shards")
    low_precision = node.attrs["arithmetic"] == "f16"
    logits = _logits(x.rows, shards, "f16" if low_precision else "f32", caps)
    tokens = [((logits[0][0], x.columns), "f16")] if low_precision else []
    if not node.attrs["emit"]:
        return [logits, ((x.rows,), "f32"), *tokens]
    partials = [back_workspace(some, logits, caps) for some in (shards, *([q] for q in _low_rank(node)[1:]))]
    return [logits, ((x.rows,), "f32"), *tokens, *(spec for specs in partials for spec in specs)]


def _chunks(tokens: int, size: int) -> list[tuple[int, int]]:
    """(first token, count) of each chunk."""
    return [(start, min(size, tokens - start)) for start in range(0, tokens, size)]


def _row_constants(node: Node, logits: Tensor, at: int, count: int, mode: str) -> dict[str, Any]:
    s, vocabulary = node.attrs["smoothing"], logits.columns
    return {
        "VECTOR": _vector(logits),
        "format": logits.dtype,
        "scale": literal(DSCORE_SCALE if logits.dtype == "f16" else 1.0),
        "mode": mode,
        "C": count,
        "V": vocabulary,
        "first": at,
        "weighted": "weights" in node.inputs,
        "smoothed": s > 0,
        "keep": literal(1 - s),
        "smoothing": literal(s),
        "share": literal(s / vocabulary),
        "cap": literal(node.attrs["softcap"]) if "softcap" in node.attrs else "",
        "inverse_cap": literal(1 / node.attrs["softcap"]) if "softcap" in node.attrs else "",
        "WIDTH": 256,
    }


def _weights(node: Node, offset: int) -> list[Binding]:
    """The weights from `offset` on, in bytes, where there are any."""
    weights = node.inputs.get("weights")
    return [] if weights is None else [reads("weights", weights, offset=offset)]


def _vector(logits: Tensor) -> int:
    """Logits that an invocation takes at a time."""
    return 4 if logits.columns % 4 == 0 else 1


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    x, targets, shards = node.inputs["x"], node.inputs["targets"], node.group("shards")
    loss, lse = node.outputs[:2]
    logits, losses, *scratch = placed.workspace
    low_precision = scratch.pop(0) if node.attrs["arithmetic"] == "f16" else None
    back = []  # (gradient, what dscores are multiplied by, partial sums), of tokens
    low_rank = _low_rank(node)
    if node.attrs["emit"]:
        for dx, tables in zip(node.outputs[2:], (shards, [*low_rank[1:]]), strict=False):
            slices = back_workspace(tables, (logits.shape, logits.dtype), caps)
            back.append((dx, tables, scratch.pop(0) if slices else None))
    launches = []
    for at, count in _chunks(x.rows, logits.shape[0]):
        launches += logits_launches(x, low_precision, shards, logits, at, count, caps)
        if low_rank:
            launches.append(single_launch(_added(low_rank[0], low_rank[1], logits, at, count), caps))
        mode, use = ("loss and dscores", writes) if node.attrs["emit"] else ("loss", reads)
        offset, first = split_offset(at, losses)
        bindings = (
            reads("targets", targets, offset=offset),
            *_weights(node, offset),
            use("logits", logits, _vector(logits)),
            writes("losses", losses, offset=offset),
            writes("lse", lse, offset=offset),
        )
        constants = _row_constants(node, logits, first, count, mode)
        launches.append(Launch("cross_entropy", bindings, constants, grid_of(count, caps)))
        for dx, tables, partial in back:
            launches += back_launches(dx, tables, logits, partial, at, count, caps)
        if back and low_rank:
            sizes, rank = (logits.columns, low_rank[0].columns, count), low_rank[0].columns
            dq, p = Block(node.outputs[4], 0, rank), Block(low_rank[0], at * rank, rank)
            product = Matmul(sizes, Block(logits, 0, logits.columns), p, dq, transpose_a=True, accumulate=at > 0)
            launches.append(single_launch(product, caps))
    launches.append(rows_launch(losses, loss, 1, x.rows, caps))
    return launches


def _added(p: Tensor, q: Tensor, logits: Tensor, at: int, count: int) -> Matmul:
    """logits[:count] += p[at : at + count] q^T."""
    rank, vocabulary = p.columns, logits.columns
    operands = Block(p, at * rank, rank), Block(q, 0, rank), Block(logits, 0, vocabulary)
    return Matmul((count, vocabulary, rank), *operands, transpose_b=True, accumulate=True)


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    x, targets, shards = node.inputs["x"], node.inputs["targets"], node.group("shards")
    if node.attrs["emit"]:
        names = [name for name in ("x", "p", "q") if name in node.inputs]
        pairs = zip(names, node.outputs[2:], strict=True)
        return {name: mul(left, upstream[0]) for name, left in pairs if context.wanted(node.inputs[name])}
    if all(context.wanted(p) for p in shards):
        held = [context.take(p) for p in shards]
        dx, *totals = record(
            "cross_entropy_grad",
            x=x,
            targets=targets,
            weights=node.inputs.get("weights"),
            lse=node.outputs[1],
            upstream=upstream[0],
            shards=[*shards],
            held=held,
            smoothing=node.attrs["smoothing"],
            softcap=node.attrs.get("softcap"),
        )
        kept = [
            in_place(t, h) if h.persistent or h.updates is not None else t for t, h in zip(totals, held, strict=True)
        ]
        return {"x": dx, "shards": kept}
    raise ValueError(f"{node.label()}: the shards of a vocabulary are trainable all together or not at all")


def _grad_reference(
    node: Node,
    x: np.ndarray,
    targets: np.ndarray,
    lse: np.ndarray,
    upstream: np.ndarray,
    shards: Sequence[np.ndarray],
    held: Sequence[np.ndarray],
    weights: np.ndarray | None = None,
) -> Sequence[np.ndarray]:
    table = _table(x, shards)
    _, _, dscores = _dscores(node, x.reshape(-1, x.shape[-1]) @ table.T, targets, weights)
    dscores = dscores.astype(x.dtype) * upstream
    whole = dscores.T @ x.reshape(-1, x.shape[-1])
    edges = np.cumsum([len(p) for p in shards])[:-1]
    return [
        (dscores @ table).reshape(x.shape),
        *(h + part for h, part in zip(held, np.split(whole, edges), strict=True)),
    ]


def _grad_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    x, targets, lse, upstream = (node.inputs[name] for name in ("x", "targets", "lse", "upstream"))
    shards, held = node.group("shards"), node.group("held")
    dx, *totals = node.outputs
    logits, *partial = placed.workspace
    depth, vocabulary = x.columns, logits.columns
    launches = [copy_launch(h, t, caps) for h, t in zip(held, totals, strict=True) if not placed.aliased(t, h)]
    for at, count in _chunks(x.rows, logits.shape[0]):
        launches += logits_launches(x, None, shards, logits, at, count, caps)
        offset, first = split_offset(at, lse)
        bindings = (
            reads("targets", targets, offset=offset),
            *_weights(node, offset),
            reads("lse", lse, offset=offset),
            reads("upstream", upstream),
            writes("logits", logits, _vector(logits)),
        )
        constants = _row_constants(node, logits, first, count, "dscores")
        launches.append(Launch("cross_entropy", bindings, constants, grid_of(count, caps)))
        launches += back_launches(dx, shards, logits, next(iter(partial), None), at, count, caps)
        for total, start in zip(totals, shard_starts(shards), strict=True):
            block = Block(logits, start, vocabulary)
            sizes = (total.shape[0], depth, count)
            rows = Block(x, at * depth, depth)
            added = Matmul(sizes, block, rows, Block(total, 0, depth), transpose_a=True, accumulate=True)
            launches.append(single_launch(added, caps))
    return launches


def _flops(products: int) -> Callable[[Node], int]:
    def count(node: Node) -> int:
        emit, p = bool(node.attrs.get("emit")), node.inputs.get("p")
        size = (products + emit) * node.inputs["x"].size + (0 if p is None else (1 + 2 * emit) * p.size)
        return 2 * size * vocabulary_of(node.group("shards"))

    return count


def _grad_workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    x, shards = node.inputs["x"], node.group("shards")
    logits = _logits(x.rows, shards, "f32", caps)
    return [logits, *back_workspace(shards, logits, caps)]


register(Op("cross_entropy", _infer, _reference, _launch, _gradient, workspace=_workspace, flops=_flops(1)))
register(
    Op(
        "cross_entropy_grad",
        lambda node: [
            (node.inputs["x"].shape, "f32"),
            *((t.shape, "f32") for t in node.group("held")),
        ],
        _grad_reference,
        _grad_launch,
        workspace=_grad_workspace,
        flops=_flops(3),
        inplace=lambda node: [(1 + i, f"held.{i}") for i in range(len(node.group("held")))],
    )
)


def project(x: Tensor, shards: Sequence[Tensor]) -> Tensor:
    """x W^T for a W [V, D] kept in shards of rows: logits [T, V], for the few tokens that are wanted whole."""
    return record("project", x=x, shards=list(shards))[0]


def _project_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    x, shards = node.inputs["x"], node.group("shards")
    return logits_launches(x, None, shards, node.output, 0, x.rows, caps)


register(
    Op(
        "project",
        lambda node: [((node.inputs["x"].rows, vocabulary_of(node.group("shards"))), "f32")],
        lambda node, x, shards: [x.reshape(-1, x.shape[-1]) @ _table(x, shards).T],
        _project_launch,
        flops=lambda node: 2 * node.inputs["x"].columns * node.output.size,
    )
)
