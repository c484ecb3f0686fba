"""Cross-entropy fused with the output projection, so that the logits of a whole batch never exist.

Tokens are taken in chunks, the vocabulary in the shards the weight is kept in. Of a chunk all logits [C, V] exist at
once, as scratch that the next chunk reuses. With a frozen vocabulary only tokens that have a label go through it:
chunks are of these (labelled.py), so that completions after long prompts cost what they are long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from entrenar_gpu.dtypes import ELEMENT_BYTES
from entrenar_gpu.graph import Binding, Caps, Launch, Node, Tensor, grid_of, literal, reads, split_offset, writes
from entrenar_gpu.ops.elementwise import copy_launch, mul
from entrenar_gpu.ops.embedding import shard_starts
from entrenar_gpu.ops.gemm.launches import Block, Matmul, single_launch, sum_launch, whole
from entrenar_gpu.ops.gemm.tiles import Arithmetic, matrices_of
from entrenar_gpu.ops.gemm.vocabulary import (
    DSCORE_SCALE,
    arithmetic_of,
    back_launches,
    back_slices,
    back_workspace,
    logits_launches,
    vocabulary_of,
)
from entrenar_gpu.ops.labelled import (
    chunks_of,
    clear_launch,
    counted_launches,
    find_launch,
    gather_launch,
    labelled_specs,
    scatter_launch,
)
from entrenar_gpu.ops.reduce import rows_launch
from entrenar_gpu.ops.registry import GradientContext, Gradients, Op, Placement, Spec, in_place, record, register

IGNORE = -100  # the label of a position without loss, as PyTorch's cross-entropy and transformers have it
LOGITS_BYTES = 80 << 20  # scratch for the logits of a chunk: of a vocabulary of 152k 128 tokens, or 256 in f16
LARGE_CHUNKS = 2  # times as many on large cards and on matrix units, which fewer tokens do not keep busy


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
    backward pass computes the logits again. A second output is the log-sum-exp of each token, with a frozen W 0 where
    there is no label.

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
    attrs["labelled"] = not trains and low_rank is None
    tensors = {"x": x, "targets": targets, "weights": weights, "p": p, "q": q, "shards": list(shards)}
    return record("cross_entropy", **tensors, **attrs)[0]


def _logits(tokens: int, shards: Sequence[Tensor], dtype: str, caps: Caps) -> Spec:
    """Scratch for the logits of as many tokens as are taken at once."""
    vocabulary = vocabulary_of(shards)
    large = caps.large or (dtype == "f16" and matrices_of(caps) is not None)
    wanted = LOGITS_BYTES * (LARGE_CHUNKS if large else 1)
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
    lse = np.where(counted, lse, 0).astype(lse.dtype) if node.attrs.get("labelled") else lse
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
    """Logits, the losses of tokens; then, of labelled tokens, their list, the grids of launches for them, a chunk of x
    and, where dx is emitted, of its partial sums. Of all tokens, partial sums of what is emitted, if any."""
    x, shards, emit = node.inputs["x"], node.group("shards"), node.attrs["emit"]
    logits = _logits(x.rows, shards, node.attrs["arithmetic"], caps)
    specs = [logits, ((x.rows,), "f32")]
    if node.attrs["labelled"]:
        size = logits[0][0]
        specs += labelled_specs(x.rows, size, _launches_of_a_chunk(len(shards), emit))
        specs += [((size, x.columns), logits[1]), *([back_slices(shards, logits, caps)] if emit else [])]
    elif emit:
        tables = (shards, *([q] for q in _low_rank(node)[1:]))
        specs += [spec for some in tables for spec in back_workspace(some, logits, caps)]
    return specs


def _launches_of_a_chunk(shards: int, emit: bool) -> int:
    """Of labelled tokens: they are gathered, multiplied, and priced; multiplied back and scattered."""
    return 1 + shards + 1 + (shards + 1 if emit else 0)


def _row_constants(node: Node, logits: Tensor, first: int, count: int, mode: str) -> dict[str, Any]:
    s, vocabulary = node.attrs["smoothing"], logits.columns
    return {
        "T": node.inputs["x"].rows,
        "labelled": node.attrs.get("labelled", False),
        "VECTOR": _vector(logits),
        "format": logits.dtype,
        "scale": literal(DSCORE_SCALE if logits.dtype == "f16" else 1.0),
        "mode": mode,
        "C": count,
        "V": vocabulary,
        "first": first,
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
    x, loss, losses = node.inputs["x"], node.outputs[0], placed.workspace[1]
    launches = (_labelled_launches if node.attrs["labelled"] else _every_launch)(node, caps, placed.workspace)
    return [*launches, rows_launch(losses, loss, 1, x.rows, caps)]


def _every_launch(node: Node, caps: Caps, workspace: Sequence[Tensor]) -> list[Launch]:
    """Losses and lse of all tokens, chunk by chunk, in f32: for a backward pass that reads them, or with what is of low
    rank and its gradients."""
    x, targets, shards = node.inputs["x"], node.inputs["targets"], node.group("shards")
    lse, low_rank, (logits, losses, *scratch) = node.outputs[1], _low_rank(node), workspace
    back = []  # (gradient, what dscores are multiplied by, partial sums), of tokens
    if node.attrs["emit"]:
        for dx, tables in zip(node.outputs[2:], (shards, [*low_rank[1:]]), strict=False):
            slices = back_workspace(tables, (logits.shape, logits.dtype), caps)
            back.append((dx, tables, scratch.pop(0) if slices else None))
    launches = []
    for at, count in chunks_of(x.rows, logits.shape[0]):
        launches += logits_launches(Block(x, at * x.columns, x.columns), shards, logits, count, caps)
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
            block = Block(dx, at * dx.columns, dx.columns)
            launches += _back_to_tokens(tables, logits, block, partial, count, caps)
        if back and low_rank:
            sizes, rank = (logits.columns, low_rank[0].columns, count), low_rank[0].columns
            dq, p = Block(node.outputs[4], 0, rank), Block(low_rank[0], at * rank, rank)
            product = Matmul(sizes, Block(logits, 0, logits.columns), p, dq, transpose_a=True, accumulate=at > 0)
            launches.append(single_launch(product, caps))
    return launches


def _labelled_launches(node: Node, caps: Caps, workspace: Sequence[Tensor]) -> list[Launch]:
    """Losses, lse and dx of tokens that have a label, chunk by chunk; zero for all others."""
    x, targets, lse = node.inputs["x"], node.inputs["targets"], node.outputs[1]
    logits, losses, order, counts, *_ = workspace
    size = logits.shape[0]
    chunks = [_chunk_launches(node, caps, workspace, at, count) for at, count in chunks_of(x.rows, size)]
    launches = [find_launch(targets, order, counts, (losses, lse), size, chunks)]
    if node.attrs["emit"]:
        launches.append(clear_launch(targets, node.outputs[2], caps))
    return launches + counted_launches(chunks, counts)


def _chunk_launches(node: Node, caps: Caps, workspace: Sequence[Tensor], at: int, count: int) -> list[Launch]:
    """The labelled tokens from `at` on: their logits, then losses and dscores, then dx."""
    shards, (logits, losses, order, _, rows, *partial) = node.group("shards"), workspace
    launches = [gather_launch(node.inputs["x"], order, rows, at, count, caps)]
    launches += logits_launches(whole(rows), shards, logits, count, caps)
    mode, use = ("loss and dscores", writes) if node.attrs["emit"] else ("loss", reads)
    offset, first = split_offset(at, order)
    bindings = (
        reads("targets", node.inputs["targets"]),
        *_weights(node, 0),
        reads("order", order, offset=offset),
        use("logits", logits, _vector(logits)),
        writes("losses", losses),
        writes("lse", node.outputs[1]),
    )
    constants = _row_constants(node, logits, first, count, mode)
    launches.append(Launch("cross_entropy", bindings, constants, grid_of(count, caps)))
    for sums in partial:
        factor = 1 / DSCORE_SCALE if logits.dtype == "f16" else 1.0
        launches += back_launches(shards, logits, whole(sums), count, caps)
        launches.append(scatter_launch(sums, order, node.outputs[2], at, count, factor, caps))
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
    for at, count in chunks_of(x.rows, logits.shape[0]):
        rows = Block(x, at * depth, depth)
        launches += logits_launches(rows, shards, logits, count, caps)
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
        launches += _back_to_tokens(
            shards, logits, Block(dx, at * depth, depth), next(iter(partial), None), count, caps
        )
        for total, start in zip(totals, shard_starts(shards), strict=True):
            block = Block(logits, start, vocabulary)
            sizes = (total.shape[0], depth, count)
            added = Matmul(sizes, block, rows, Block(total, 0, depth), transpose_a=True, accumulate=True)
            launches.append(single_launch(added, caps))
    return launches


def _back_to_tokens(
    shards: Sequence[Tensor], logits: Tensor, dx: Block, partial: Tensor | None, count: int, caps: Caps
) -> list[Launch]:
    """dx[:count] = dscores W, by slices in `partial` where a shard is several."""
    if partial is None:
        return back_launches(shards, logits, dx, count, caps)
    sizes = (count, dx.stride, shards[0].shape[0])
    added = Matmul(sizes, whole(logits), whole(shards[0]), dx)
    return [*back_launches(shards, logits, whole(partial), count, caps), sum_launch(added, partial, caps)]


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
    return logits_launches(whole(x), shards, node.output, x.rows, caps)


register(
    Op(
        "project",
        lambda node: [((node.inputs["x"].rows, vocabulary_of(node.group("shards"))), "f32")],
        lambda node, x, shards: [x.reshape(-1, x.shape[-1]) @ _table(x, shards).T],
        _project_launch,
        flops=lambda node: 2 * node.inputs["x"].columns * node.output.size,
    )
)
