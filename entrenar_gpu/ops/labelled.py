"""The tokens of a batch that have a label: found on the device, so that work can be launched for them alone.

Their numbers come into a list, in order, and the grids of launches over chunks of that list into a tensor that the
device reads them from (`Launch.counted`). Where every token has a label, the list is all of them and every grid whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from entrenar_gpu.graph import Caps, Launch, Tensor, grid_of, literal, reads, split_offset, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.registry import Spec

_INVOCATIONS = 256  # that take a row


def chunks_of(tokens: int, size: int) -> list[tuple[int, int]]:
    """(first token, count) of each chunk."""
    return [(start, min(size, tokens - start)) for start in range(0, tokens, size)]


def labelled_specs(tokens: int, size: int, launches: int) -> list[Spec]:
    """The list of labelled tokens, and the grids of `launches` per chunk of `size` of them."""
    return [((tokens,), "u32"), ((ceil_div(tokens, size) * launches, 3), "u32")]


def counted_launches(chunks: Sequence[Sequence[Launch]], counts: Tensor) -> list[Launch]:
    """The launches of all chunks, each over as much of its grid as its chunk has labelled tokens."""
    every = [launch for chunk in chunks for launch in chunk]
    return [replace(launch, counted=(counts, row)) for row, launch in enumerate(every)]


def find_launch(
    targets: Tensor,
    order: Tensor,
    counts: Tensor,
    zeroed: tuple[Tensor, Tensor],
    size: int,
    chunks: Sequence[Sequence[Launch]],
) -> Launch:
    """`order` and `counts` from the targets; what is `zeroed`, losses and lse, is so for tokens without a label.

    `chunks` are the launches of each chunk of `size`, those of all whole ones with the same grids.
    """
    tokens = targets.size
    whole = tokens // size
    parts, grids = [], [[launch.grid for launch in chunk] for chunk in chunks]
    if whole:
        parts.append({"count": whole, "first": 0, "size": size, "row": 0, "grids": grids[0]})
    if tokens % size:
        last = {"count": 1, "first": whole * size, "size": tokens % size, "row": whole * len(chunks[0])}
        parts.append({**last, "grids": grids[-1]})
    losses, lse = zeroed
    bindings = (
        reads("targets", targets),
        writes("order", order),
        writes("counts", counts),
        writes("losses", losses),
        writes("lse", lse),
    )
    return Launch("labelled_tokens", bindings, {"T": tokens, "parts": parts}, (1, 1, 1))


def gather_launch(x: Tensor, order: Tensor, out: Tensor, at: int, count: int, caps: Caps) -> Launch:
    """out[:count] = the rows of x [T, D] of the labelled tokens from `at` on, as f32 or f16."""
    constants, offset = _constants("gather", x.rows, x.columns, order, at, count)
    constants["format"] = out.dtype
    vector = constants["VECTOR"]
    bindings = (reads("x", x, vector), reads("order", order, offset=offset), writes("out", out, vector))
    return Launch("labelled_rows", bindings, constants, grid_of(count, caps))


def scatter_launch(
    partial: Tensor, order: Tensor, dx: Tensor, at: int, count: int, factor: float, caps: Caps
) -> Launch:
    """dx [T, D] of the labelled tokens from `at` on = factor * the sum over slices of partial [slices, count, D]."""
    constants, offset = _constants("scatter", dx.rows, dx.columns, order, at, count)
    constants |= {"slices": partial.shape[0], "factor": "" if factor == 1.0 else literal(factor)}
    vector = constants["VECTOR"]
    bindings = (reads("partial", partial, vector), reads("order", order, offset=offset), writes("dx", dx, vector))
    return Launch("labelled_rows", bindings, constants, grid_of(count, caps))


def clear_launch(targets: Tensor, dx: Tensor, caps: Caps) -> Launch:
    """dx [T, D] = 0 for tokens without a label."""
    vector = _vector(dx.columns)
    constants = {"mode": "clear", "rows": dx.rows, "D": dx.columns, "VECTOR": vector, "WIDTH": _INVOCATIONS}
    bindings = (reads("targets", targets), writes("dx", dx, vector))
    return Launch("labelled_rows", bindings, {**constants, "format": "f32"}, grid_of(dx.rows, caps))


def _constants(mode: str, tokens: int, columns: int, order: Tensor, at: int, count: int) -> tuple[dict[str, Any], int]:
    """Constants of a launch for labelled tokens, and the bytes at which its binding of `order` begins."""
    offset, first = split_offset(at, order)
    constants = {"mode": mode, "T": tokens, "rows": count, "D": columns, "first": first, "format": "f32"}
    return {**constants, "VECTOR": _vector(columns), "WIDTH": _INVOCATIONS}, offset


def _vector(columns: int) -> int:
    return 4 if columns % 4 == 0 else 1
