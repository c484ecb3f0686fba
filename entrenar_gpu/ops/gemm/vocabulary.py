"""Matmuls between tokens and a vocabulary W [V, D] that is kept in shards of rows: logits, and the way back to tokens.

Both work on a chunk of tokens, shard by shard. In f16 the tokens have been converted, W is on its way into a tile, and
the dscores that come back are scaled by a power of two, so that small probabilities stay normal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from entrenar_gpu.graph import Caps, Launch, Tensor
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.embedding import shard_starts
from entrenar_gpu.ops.gemm.launches import Block, Matmul, matmul_launch, single_launch
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


def logits_launches(rows: Block, shards: Sequence[Tensor], logits: Tensor, count: int, caps: Caps) -> list[Launch]:
    """logits[:count] = the rows times W^T."""
    launches: list[Launch] = []
    depth = rows.stride
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
    whole = all(p.shape[0] % BLOCK == 0 for p in shards)  # dscores of each begin at a word, and are whole tiles of K
    choice = choose("f16" if dtype == "f16" else "f32", count, depth, rows, "nn", caps, tail=False, matrices=whole)
    return Choice(choice.tile, ceil_div(rows, slice_length(rows, choice)))


def back_slices(shards: Sequence[Tensor], logits: Spec, caps: Caps) -> Spec:
    """Partial sums of `back_launches`: [slices, C, D]."""
    return (_back_choice(shards, logits, caps).slices, logits[0][0], shards[0].columns), "f32"


def back_workspace(shards: Sequence[Tensor], logits: Spec, caps: Caps) -> Sequence[Spec]:
    """Partial sums of `back_launches`; none where a shard is one slice."""
    partial = back_slices(shards, logits, caps)
    return [partial] if partial[0][0] > 1 else []


def back_launches(shards: Sequence[Tensor], logits: Tensor, target: Block, count: int, caps: Caps) -> list[Launch]:
    """dscores W, summed over the shards, where dscores lie in `logits`: [count, D], or by slices [slices, count, D].

    dscores are as they are scaled, so that nothing is done to the sums until they are added up: DSCORE_SCALE in f16.
    """
    depth, vocabulary = shards[0].columns, logits.columns
    choice = _back_choice(shards, (logits.shape, logits.dtype), caps)
    launches: list[Launch] = []
    for shard, start in zip(shards, shard_starts(shards), strict=True):
        sizes, dscores = (count, depth, shard.shape[0]), Block(logits, start, vocabulary)
        matmul = Matmul(sizes, dscores, Block(shard, 0, depth), target, accumulate=bool(launches))
        launches.append(matmul_launch(matmul, choice))
    return launches
