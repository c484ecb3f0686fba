"""Matmuls between tokens and a vocabulary W [V, D] that is kept in shards of rows: logits, and the way back to tokens.

Both work on a chunk of tokens, shard by shard. In f16 the tokens are converted first, W on its way into a tile, and the
dscores that come back are scaled by a power of two, so that small probabilities stay normal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from entrenar_gpu.graph import Caps, Launch, Tensor
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.embedding import shard_starts
from entrenar_gpu.ops.gemm.launches import Block, Matmul, matmul_launch, single_launch, sum_launch, whole
from entrenar_gpu.ops.gemm.low_precision import low_precision_rows_launch
from entrenar_gpu.ops.gemm.tiles import Arithmetic, Choice, choose, slice_length
from entrenar_gpu.ops.registry import Spec
from entrenar_gpu.quant import BLOCK

# Of the dscores in f16: from 2^-26 on, a four-hundredth of a uniform 1 / 152k, they are normal numbers, which no device
# flushes to zero; and as those of a token sum to at most 2, products with |w| < 8 stay below the largest f16.
DSCORE_SCALE = 4096.0


def vocabulary_of(shards: Sequence[Tensor]) -> int:
    return sum(p.shape[0] for p in shards)


def arithmetic_of(wanted: Arithmetic, shards: Sequence[Tensor]) -> Arithmetic:
    """The arithmetic of matmuls with these shards: f16 takes whole tiles only, and int8 is for NF4's blocks."""
    fits = all(p.rows % BLOCK == 0 and p.columns % BLOCK == 0 for p in shards)
    return "f16" if wanted != "f32" and fits else "f32"


def logits_launches(
    x: Tensor, low_precision: Tensor | None, shards: Sequence[Tensor], logits: Tensor, at: int, count: int, caps: Caps
) -> list[Launch]:
    """logits[:count] = x[at : at + count] W^T; in f16 by way of `low_precision` [C, D]."""
    depth = x.columns
    rows, launches = Block(x, at * depth, depth), []
    if low_precision is not None:
        launches.append(low_precision_rows_launch(rows, count, depth, low_precision, None, caps))
        rows = whole(low_precision)
    for shard, start in zip(shards, shard_starts(shards), strict=True):
        sizes, out = (count, shard.shape[0], depth), Block(logits, start, logits.columns)
        launches.append(single_launch(Matmul(sizes, rows, Block(shard, 0, depth), out, transpose_b=True), caps))
    return launches


def _back_choice(shards: Sequence[Tensor], logits: Spec, caps: Caps) -> Choice:
    """How dscores W is cut up: [C, D] alone fills no GPU, so the long sum over a shard's rows is split.

    Pages are multiplied one after the other, so each alone must fill the GPU; the first is the longest.
    """
    (count, _), dtype = logits
    depth, rows = shards[0].columns, shards[0].shape[0]
    choice = choose("f16" if dtype == "f16" else "f32", count, depth, rows, "nn", caps, tail=False)
    return Choice(choice.tile, ceil_div(rows, slice_length(rows, choice)))


def back_workspace(shards: Sequence[Tensor], logits: Spec, caps: Caps) -> Sequence[Spec]:
    """Partial sums of `back_launches`; none where a shard is one slice."""
    slices = _back_choice(shards, logits, caps).slices
    return [((slices, logits[0][0], shards[0].columns), "f32")] if slices > 1 else []


def back_launches(
    dx: Tensor, shards: Sequence[Tensor], logits: Tensor, partial: Tensor | None, at: int, count: int, caps: Caps
) -> list[Launch]:
    """dx[at : at + count] = dscores W, summed over the shards, by slices in `partial`; dscores lie in `logits`.

    Partial sums are of dscores as they are scaled, so that nothing is done to them until they are added up.
    """
    depth, vocabulary = dx.columns, logits.columns
    out = Block(dx, at * depth, depth)
    choice = _back_choice(shards, (logits.shape, logits.dtype), caps)
    target = out if partial is None else whole(partial)
    alpha = 1 / DSCORE_SCALE if logits.dtype == "f16" else 1.0
    operands = [
        (Block(logits, start, vocabulary), shard) for shard, start in zip(shards, shard_starts(shards), strict=True)
    ]
    matmuls = [
        Matmul(
            (count, depth, shard.shape[0]),
            dscores,
            Block(shard, 0, depth),
            target,
            alpha=alpha if partial is None else 1.0,
        )
        for dscores, shard in operands
    ]
    launches = [matmul_launch(replace(m, accumulate=m is not matmuls[0]), choice) for m in matmuls]
    if partial is not None:
        launches.append(sum_launch(replace(matmuls[0], c=out), partial, caps, factor=alpha))
    return launches
