"""Launches of the matmuls that adapters add: x A^T, dy B, and the gradients of A and B, whose one side is a rank.

They take no time to multiply: what counts is one pass over the wide operand and one launch, where tiles made for
square matmuls split the sum into a second one (docs/fusion.md). Where the wide operand is converted anyway, the launch
that does so makes theirs too (low_precision.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from entrenar_gpu.graph import Binding, Caps, Launch, Tensor, grid_of, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.gemm.tiles import SUMMED_AT_ONCE
from entrenar_gpu.ops.registry import Spec

RANKS = (4, 8, 16, 32, 64)
WORKGROUP = 256
MOST_ROWS = 1024  # that are summed in one launch: sums over more keep a device busy only when split over workgroups
FEWEST_ROWS = 256  # of a slice then
SLICED = 1056  # workgroups that they are split over, which keep a large card busy
COLUMNS, SLICED_COLUMNS = 4, 16  # of four, that a workgroup makes of the sums over rows, and where these are split
ROWS_AHEAD, COLUMNS_AHEAD = 2, 8  # steps whose loads are under way at once


def takes(sizes: tuple[int, int, int], transpose_a: bool, transpose_b: bool) -> bool:
    """Whether a matmul of M, N, K has a rank on one side, and lies in memory as adapters' do."""
    m, n, k = sizes
    if transpose_a:
        return not transpose_b and ((n in RANKS and m % 4 == 0) or (m in RANKS and n % 4 == 0))
    return n in RANKS and k % 4 == 0 and k // 4 <= SUMMED_AT_ONCE * (WORKGROUP // (n // 4))


def launch(a: Tensor, b: Tensor, c: Tensor, transpose_b: bool, alpha: float, caps: Caps) -> Launch:
    """c = alpha a op(b), for a matmul that `takes` accepts."""
    constants = {"mode": "rows", "M": a.rows, "K": a.columns, **rows_constants(c.columns, transpose_b, alpha)}
    bindings = (reads("a", a, 4), reads("b", b, 4), writes("c", c, 4))
    return Launch("low_rank", bindings, constants, grid_of(ceil_div(a.rows, 4), caps), trusted=True)


def rows_constants(rank: int, transpose_b: bool, alpha: float = 1.0) -> dict[str, Any]:
    """What lib/low_rank.wgsl wants to know of a matmul whose columns are a rank, besides M and K."""
    return {"GROUPS": rank // 4, "AHEAD": ROWS_AHEAD, "b_transposed": transpose_b, "alpha": alpha}


def beside(
    shader: str,
    bindings: Sequence[Binding],
    constants: Mapping[str, Any],
    workgroups: int,
    rows: int,
    down: tuple[Tensor, Tensor, bool] | None,
    caps: Caps,
) -> Launch:
    """A launch of `workgroups` over `rows` of x, whose shader makes c [rows, R] = x op(b) too, R one of RANKS, where
    there is a `down` = (b, c, whether b is transposed)."""
    constants = {**constants, "GROUPS": 0}
    if down is not None:
        b, c, transposed = down
        bindings = [*bindings, reads("by", b, 4), writes("down", c, 4)]
        constants |= rows_constants(c.columns, transposed)
        workgroups += ceil_div(rows, 4)
    return Launch(shader, tuple(bindings), constants, grid_of(workgroups, caps), trusted=True)


def partial_specs(sizes: tuple[int, int, int]) -> list[Spec]:
    """What sums over the rows of M, N, K leave for `matmul_sum`: a partial sum a slice of the rows, where there are
    several."""
    m, n, k = sizes
    wide, rank = (n, m) if _is_rank_first(m, n) else (m, n)
    workgroups = ceil_div(wide, 4 * SLICED_COLUMNS) * ceil_div(rank, 16)
    slices = min(ceil_div(SLICED, workgroups), k // FEWEST_ROWS) if k > MOST_ROWS else 1
    return [((ceil_div(k, ceil_div(k, slices)), m, n), "f32")] if slices > 1 else []


def _is_rank_first(m: int, n: int) -> bool:
    """Whether M is the rank: where both sides could be, the second is."""
    return n not in RANKS or m % 4 != 0


def over_rows(a: Tensor, b: Tensor, c: Tensor, alpha: float, accumulate: bool, caps: Caps) -> Launch:
    """c (+)= alpha a^T b; or, where c is of `partial_specs`, a sum a slice of the rows."""
    rank_first = _is_rank_first(a.columns, b.columns)
    wide, thin = (b, a) if rank_first else (a, b)
    quads, slices = min(thin.columns // 4, 4), c.shape[0] if len(c.shape) == 3 else 1
    columns = COLUMNS if slices == 1 else SLICED_COLUMNS
    workgroups = ceil_div(wide.columns, 4 * columns) * (thin.columns // (4 * quads))
    constants: dict[str, Any] = {"mode": "columns", "T": a.rows, "N": wide.columns, "R": thin.columns}
    constants |= {"COLUMNS": columns, "QUADS": quads, "GROUPS": columns * quads, "AHEAD": COLUMNS_AHEAD}
    constants |= {"rank_first": rank_first, "alpha": alpha, "accumulate": accumulate}
    constants |= {"slice": ceil_div(a.rows, slices), "SLICE_WORKGROUPS": workgroups if slices > 1 else 0}
    bindings = (reads("wide", wide, 4), reads("thin", thin, 4), writes("c", c, 4 if rank_first else 1))
    workgroups *= slices
    return Launch("low_rank", bindings, constants, grid_of(workgroups, caps), trusted=True)
