"""How matmuls are cut up: tile shapes, slices of K, and the choice of both for a matmul on a device.

`choose` is a pure function of the matmul and of `Caps`: what was measured (`Target.tiles`) wins, else a model of waves
of workgroups picks among the tiles below. So a choice is the same wherever it is made, and a checkpoint that stores
what was measured resumes with equal arithmetic (another tile sums in another order).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Literal

from entrenar_gpu.graph import Caps, MatrixConfig
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.quant import BLOCK

# "int8" has a scale for every 64 values along K, "int8_rows" one for each row, of rotated values (rotated.py).
Arithmetic = Literal["f32", "f16", "int8", "int8_rows"]


@dataclass(frozen=True)
class Tile:
    """Blocking of a matmul: BM x BN outputs a workgroup over BK-long slices, TM x TN of them a thread.

    `unroll` steps of k (in int8, of 16) are written out in the inner loop. With two `buffers` in workgroup memory, one
    barrier a slice is enough.
    """

    BM: int
    BN: int
    BK: int
    TM: int
    TN: int
    unroll: int = 1
    buffers: int = 1

    @property
    def threads(self) -> int:
        return (self.BM // self.TM) * (self.BN // self.TN)

    def workgroup_bytes(self, arithmetic: Arithmetic) -> int:
        """Workgroup memory of the tile. In int8, BK counts bytes and rows are padded against bank conflicts; in f16, A
        is kept twice."""
        if arithmetic == "int8":
            return (self.BM + self.BN) * (self.BK + 16) * self.buffers
        if arithmetic == "f16":
            return (2 * self.BM + self.BN) * self.BK * 2
        return (self.BM + self.BN) * self.BK * 4 * self.buffers


_MATRICES = ((4, 5), (4, 4), (2, 2))  # of a subgroup's sums, down and across
HALF_K = 16  # steps of K of a matrix of f16, on every device that has int8 too


@dataclass(frozen=True)
class MatrixTile(Tile):
    """Blocking of a product on matrix units: a subgroup of SUBGROUP invocations makes TM x TN outputs, by matrices of
    MM x MK times MK x MN. `pinned`: the device's subgroups vary in size, and this one is asked for. An element of A
    and B in workgroup memory has BYTES: of f16, or of f32 where the device multiplies matrices of that alone."""

    MM: int = 16
    MN: int = 16
    MK: int = 16
    SUBGROUP: int = 32
    pinned: int = 0
    BYTES: int = 2

    @property
    def threads(self) -> int:
        return super().threads * self.SUBGROUP

    def workgroup_bytes(self, arithmetic: Arithmetic) -> int:
        """Both tiles, rows padded by 16 bytes.

        In int8, BK counts bytes, and sums go through the tiles' memory, with what an adapter adds to them.
        """
        if arithmetic == "int8_rows":
            tiles = (self.BM + self.BN) * (self.BK + 16)
            return max(tiles, self.sums_bytes(self.stored_groups(arithmetic, True)[0][1], True))
        padding = 16 // self.BYTES
        b = max(self.BN * (self.BK + padding), self.BK * (self.BN + padding))
        return (self.BM * (self.BK + padding) + b) * self.BYTES

    def sums_bytes(self, matrices: int, low_rank: bool) -> int:
        """What so many matrices of sums of each subgroup take, and in int8 operands in f16 of what an adapter adds."""
        subgroups = self.threads // self.SUBGROUP
        down = self.BM // self.TM * self.MM
        adapter = (down + self.BN) * (HALF_K + 8) if low_rank else 0
        return subgroups * self.MM * (matrices * self.MN + 4) * 4 + 2 * adapter

    def stored_groups(self, arithmetic: Arithmetic, low_rank: bool) -> tuple[tuple[int, int], ...]:
        """How a row of a subgroup's matrices of sums goes through workgroup memory: (first, how many) at once.

        Powers of two, so that lanes share them evenly; as many as need no more memory than A's tile, in int8 both.
        """
        if arithmetic == "int8_rows":
            room = (self.BM + self.BN) * (self.BK + 16)
        else:
            room, low_rank = self.BM * (self.BK * self.BYTES + 16), False  # adapters are multiplied before
        groups, first, most = [], 0, self.TN // self.MN
        while most > 1 and (most & (most - 1) or self.sums_bytes(most, low_rank) > room):
            most -= 1
        while first < self.TN // self.MN:
            while first + most > self.TN // self.MN:
                most //= 2
            groups.append((first, most))
            first += most
        return tuple(groups)


@dataclass(frozen=True)
class Choice:
    """A tile, and how many slices of K are summed apart and then added up: of all columns or, with a tail, the last.

    Large tiles are fastest but come in few, long waves: of 4.6 waves the last keeps a device busy to 60%. So the
    `tail` columns beyond the last full wave may be cut along K, and the rest left whole (the hybrid schedules of
    Stream-K, arXiv 2301.03598).
    """

    tile: Tile
    slices: int = 1
    tail: int = 0


@dataclass(frozen=True)
class Candidate:
    """A tile with its pace when the device is full, relative to the best of its arithmetic, and how many workgroups
    a compute unit needs for that. Both from an H200 (docs/gemm.md); other cards are measured by the autotuner."""

    tile: Tile
    pace: float
    saturating: int


CANDIDATES: dict[Arithmetic, tuple[Candidate, ...]] = {
    "f32": (
        Candidate(Tile(256, 128, 8, 16, 8, unroll=8, buffers=2), 1.00, 1),
        Candidate(Tile(128, 128, 8, 8, 8, unroll=8, buffers=2), 0.80, 2),
        Candidate(Tile(64, 64, 16, 8, 8, unroll=16, buffers=2), 0.90, 8),
        Candidate(Tile(32, 64, 16, 4, 8, unroll=16, buffers=2), 0.60, 8),
        Candidate(Tile(128, 16, 16, 8, 4, unroll=8), 0.40, 8),
        Candidate(Tile(16, 128, 16, 4, 8, unroll=8), 0.40, 8),
        Candidate(Tile(64, 16, 32, 4, 4, unroll=8, buffers=2), 0.25, 12),
        Candidate(Tile(16, 64, 32, 4, 4, unroll=8, buffers=2), 0.25, 12),
        Candidate(Tile(32, 32, 16, 4, 4, unroll=8, buffers=2), 0.35, 12),
    ),
    "f16": (
        Candidate(Tile(64, 128, 32, 8, 8, unroll=32), 1.0, 6),
        Candidate(Tile(64, 64, 32, 8, 8, unroll=32), 0.9, 10),
    ),
    "int8": (
        Candidate(Tile(64, 64, 64, 8, 8, unroll=4), 1.0, 8),
        Candidate(Tile(128, 64, 64, 8, 8, unroll=4), 0.93, 4),
    ),
    "int8_rows": (),  # on matrix units only
}
# lavapipe runs a workgroup on one core: small tiles, and code that compiles fast.
SOFTWARE: dict[Arithmetic, Tile] = {
    "f32": Tile(64, 64, 16, 8, 4),
    "f16": Tile(64, 64, 32, 8, 8),
    "int8": Tile(64, 64, 64, 8, 8),
}

# What the model of waves assumes where nothing was measured: an H200's units, rates of full waves and memory, or a
# small device's units, since only ratios of the rest matter. Another figure may choose another tile, which sums in
# another order. (cost.py prices whole ops, with rates of their own.)
_UNITS = {True: 132, False: 16}  # of a large card or not
_FLOPS: dict[Arithmetic, float] = {"f32": 40e12, "f16": 59e12, "int8": 90e12, "int8_rows": 110e12}
_BYTES_PER_SECOND = 4e12
_LAUNCH_SECONDS = 3e-6
_WORKSPACE_BYTES = 64 << 20  # of partial sums
_MEASURED = 8  # choices of a matmul that are measured at most; it takes most of a second each
_SLICES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SUMMED_AT_ONCE = 1024
_TAIL_SATURATING = 2  # tiles of which a unit needs more at once come in waves short enough as they are


def key(arithmetic: Arithmetic, m: int, n: int, k: int, layout: str) -> str:
    """The name of a matmul in `Target.tiles`; `layout` says which operands are transposed, as in "nt"."""
    return f"{arithmetic} {layout} {m}x{n}x{k}"


def choose(
    arithmetic: Arithmetic,
    m: int,
    n: int,
    k: int,
    layout: str,
    caps: Caps,
    split: bool = True,
    tail: bool = True,
    matrices: bool = True,
) -> Choice:
    """The blocking of C[m, n] over k. `split=False` where the caller has no workspace for partial sums, `tail=False`
    where it cannot leave a tail apart, `matrices=False` where rows of operands begin within words of 16 bytes.

    What was measured on a larger device, from which a run resumes on this one, counts only where it fits this one.
    """
    measured = caps.measured_tile(key(arithmetic, m, n, k, layout))
    choice = from_numbers(measured) if measured is not None else None
    units = matrix_choices(arithmetic, m, n, k, layout, caps, split) if matrices else []
    if choice is not None and _available(arithmetic, choice, units, caps) and _tail_fits(arithmetic, choice, n):
        return choice if split and (tail or not choice.tail) else Choice(choice.tile)
    if units:
        return min(units, key=lambda c: _cost(arithmetic, c, m, n, k, caps))
    if arithmetic == "int8_rows":
        raise ValueError(f"{caps.name} has no matrix units for int8")
    if caps.software:
        return Choice(software_tile(arithmetic, m, n))
    return _predicted(arithmetic, m, n, k, caps, split, tail)


def matrices_of(caps: Caps, component: str = "f16") -> MatrixConfig | None:
    """The device's matrices of f16, or of f32, with sums in f32, if any: of several sizes the largest, as they read
    least."""
    offered = [c for c in caps.matrices if (c.component, c.result) == (component, "f32") and c.max_subgroup >= 8]
    return max(offered, key=lambda c: c.m * c.n * c.k, default=None)


def int8_matrices_of(caps: Caps) -> MatrixConfig | None:
    """The device's matrices of int8 with sums in int32, if some are as large as those of f16, for adapters."""
    half = matrices_of(caps)
    if half is None or half.k != HALF_K:
        return None
    beside = half.m, half.n, half.min_subgroup, half.max_subgroup
    offered = [
        c
        for c in caps.matrices
        if (c.component, c.result) == ("i8", "i32") and (c.m, c.n, c.min_subgroup, c.max_subgroup) == beside
    ]
    return max(offered, key=lambda c: c.k, default=None)


def arithmetic_on(precision: Arithmetic, caps: Caps) -> Arithmetic:
    """What a device multiplies projections in, of a run's precision: int8 by rows where it has matrix units for it."""
    return "int8_rows" if precision == "int8" and matrix_tiles("int8_rows", caps) else precision


@functools.lru_cache(maxsize=64)
def matrix_tiles(arithmetic: Arithmetic, caps: Caps) -> tuple[MatrixTile, ...]:
    """Blockings on the device's matrix units, largest first; none where it has none for this arithmetic.

    Those of f16 and f32 sum in f32. Where a device multiplies matrices of f32 alone (Apple's), f16 is widened to it.
    """
    config, bytes_each = _config(arithmetic, caps)
    if config is None:
        return ()
    found = []
    depth = 64 if arithmetic == "int8_rows" else 64 // bytes_each  # 64 bytes of K
    for tall, wide in _MATRICES:
        down, across = tall * config.m, wide * config.n
        tile = MatrixTile(2 * down, 2 * across, depth, down, across, 1, 1, config.m, config.n, config.k)
        tile = replace(tile, SUBGROUP=config.max_subgroup, pinned=config.pinned, BYTES=bytes_each)
        if depth % config.k == 0 and _can_store(arithmetic, tile) and fits(arithmetic, tile, caps):
            found.append(tile)
    return tuple(sorted(dict.fromkeys(found), key=lambda tile: -tile.BM * tile.BN))


def _config(arithmetic: Arithmetic, caps: Caps) -> tuple[MatrixConfig | None, int]:
    """The matrices that an arithmetic is multiplied by, if any, and bytes of an element of operands in f16 or f32."""
    if arithmetic == "int8_rows":
        return int8_matrices_of(caps), 2
    half = matrices_of(caps) if arithmetic == "f16" else None
    if half is not None:
        return half, 2
    return matrices_of(caps, "f32") if arithmetic in ("f32", "f16") else None, 4


def _can_store(arithmetic: Arithmetic, tile: MatrixTile) -> bool:
    """Whether lanes of a subgroup share rows of the matrices that are stored at once evenly, four columns each; and
    in int8 whether a workgroup shares tiles evenly, else whether A's tile has room for one matrix of each subgroup."""
    groups = tile.stored_groups(arithmetic, True)
    even = all(
        tile.SUBGROUP % lanes == 0 and tile.MM % (tile.SUBGROUP // lanes) == 0
        for lanes in (count * tile.MN // 4 for _, count in groups)
    )
    if arithmetic == "int8_rows":
        held = all(rows * tile.BK // 16 % tile.threads == 0 for rows in (tile.BM, tile.BN))
    else:
        held = tile.sums_bytes(groups[0][1], False) <= tile.BM * (tile.BK * tile.BYTES + 16)
    return held and even and tile.MN % 8 == 0


def matrix_choices(
    arithmetic: Arithmetic, m: int, n: int, k: int, layout: str, caps: Caps, split: bool = True
) -> list[Choice]:
    """Every blocking of a matmul on the device's matrix units: whole tiles along K, rows of whole words."""
    tiles = [tile for tile in matrix_tiles(arithmetic, caps) if k % tile.BK == 0]
    if arithmetic == "f32" and (layout.startswith("t") or n % 4):
        return []
    return [
        Choice(tile, slices)
        for tile in tiles
        for slices in (_SLICES if split else (1,))
        if slices == 1 or (_long_enough(tile, slices, k) and slices * m * n * 4 <= _WORKSPACE_BYTES)
    ]


def _tail_fits(arithmetic: Arithmetic, choice: Choice, n: int) -> bool:
    """Whether there is none, or it is of a matmul in f32 whose other columns are whole tiles."""
    whole, fours = n - choice.tail, n % 4 == 0 and choice.tail >= 0
    apart = arithmetic == "f32" and choice.slices > 1 and fours and whole > 0 and whole % choice.tile.BN == 0
    return choice.tail == 0 or apart


@functools.lru_cache(maxsize=1024)
def _predicted(arithmetic: Arithmetic, m: int, n: int, k: int, caps: Caps, split: bool, tail: bool) -> Choice:
    """The shortest blocking by the model. A search over recomputation plans the same matmuls again and again."""
    return min(choices(arithmetic, m, n, k, caps, split, tail), key=lambda c: _cost(arithmetic, c, m, n, k, caps))


def choices(
    arithmetic: Arithmetic, m: int, n: int, k: int, caps: Caps, split: bool = True, tail: bool = True
) -> list[Choice]:
    """Every blocking that fits the device and does not waste most of its work on padding."""
    found = []
    for candidate in CANDIDATES[arithmetic]:
        tile = candidate.tile
        if not fits(arithmetic, tile, caps):
            continue
        found.append(Choice(tile))
        apart = (0, _tail_columns(candidate, m, n, caps)) if arithmetic == "f32" and tail else (0,)
        for slices in _SLICES[1:] if split else ():
            for columns in dict.fromkeys(apart):
                small = slices * m * (columns or n) * 4 <= min(_WORKSPACE_BYTES, caps.max_binding_bytes)
                if small and _long_enough(tile, slices, k):
                    found.append(Choice(tile, slices, columns))
    return found


def _long_enough(tile: Tile, slices: int, k: int) -> bool:
    """Whether a slice of K is worth its start, and as long as a block of NF4."""
    return slices == 1 or k >= slices * max(4 * tile.BK, BLOCK)


def fits(arithmetic: Arithmetic, tile: Tile, caps: Caps) -> bool:
    """Whether a workgroup of the device holds the tile."""
    return tile.workgroup_bytes(arithmetic) <= caps.max_workgroup_bytes and tile.threads <= caps.max_invocations


def _available(arithmetic: Arithmetic, choice: Choice, units: Sequence[Choice], caps: Caps) -> bool:
    """Whether the device holds a tile and has what it is made for: where there are matrix units, no other."""
    if isinstance(choice.tile, MatrixTile) or units:
        return any(choice.tile == unit.tile for unit in units)
    return fits(arithmetic, choice.tile, caps)


def _units(caps: Caps) -> int:
    return _UNITS[caps.large]


def _tail_columns(candidate: Candidate, m: int, n: int, caps: Caps) -> int:
    """Columns beyond the last full wave of large tiles; 0 where there is no full wave or nothing beyond it."""
    tile, units = candidate.tile, _units(caps)
    down, across = ceil_div(m, tile.BM), ceil_div(n, tile.BN)
    whole = down * across // units * units // down
    if candidate.saturating > _TAIL_SATURATING or not 0 < whole < across or n % 4:
        return 0
    return n - whole * tile.BN


def plausible(arithmetic: Arithmetic, m: int, n: int, k: int, layout: str, caps: Caps) -> list[Choice]:
    """The choices worth measuring: what is chosen unmeasured, then those predicted to take at most twice the best's
    time, the likeliest first."""
    units = matrix_choices(arithmetic, m, n, k, layout, caps)
    every = {c: _cost(arithmetic, c, m, n, k, caps) for c in units or choices(arithmetic, m, n, k, caps)}
    best = min(every.values(), default=0.0)
    likely = sorted((c for c, cost in every.items() if cost <= 2 * best), key=every.__getitem__)
    return list(dict.fromkeys([choose(arithmetic, m, n, k, layout, caps), *likely]))[:_MEASURED]


def software_tile(arithmetic: Arithmetic, m: int, n: int) -> Tile:
    if arithmetic == "f32" and min(m, n) <= 16:
        return Tile(16, 64, 32, 4, 4) if m <= n else Tile(64, 16, 32, 4, 4)
    if arithmetic == "f32" and (min(m, n) <= 32 or m * n <= 64 * 64 * 16):
        return Tile(32, 32, 16, 4, 4)
    return SOFTWARE[arithmetic]


def _cost(arithmetic: Arithmetic, choice: Choice, m: int, n: int, k: int, caps: Caps) -> float:
    """Predicted seconds: waves of workgroups, then the sum of the slices."""
    cut = choice.tail or n if choice.slices > 1 else 0  # columns that are cut along K
    seconds = 0.0
    for columns, slices in ((n - cut, 1), (cut, choice.slices)):
        seconds += _waves(arithmetic, choice.tile, slices, m, columns, k, caps) if columns else 0.0
    if cut:
        seconds += _LAUNCH_SECONDS + 4 * (2 * choice.slices + 1) * m * cut / _BYTES_PER_SECOND
    return seconds


def _waves(arithmetic: Arithmetic, tile: Tile, slices: int, m: int, n: int, k: int, caps: Caps) -> float:
    candidate, units = _candidate(arithmetic, tile), _units(caps)
    workgroups = ceil_div(m, tile.BM) * ceil_div(n, tile.BN) * slices
    depth = ceil_div(k, slices * tile.BK) * tile.BK + tile.BK  # one step more fills the pipeline
    busiest = ceil_div(workgroups, units)
    # A unit with few workgroups does not hide all of their latency: on matrix units, where it has two or three at most,
    # not in the last wave either.
    together = candidate.saturating
    whole = (busiest - 1) // together * together if isinstance(tile, MatrixTile) else 0
    rounds = whole + (busiest - whole) / float(min(1.0, (busiest - whole) / together) ** 0.4)
    return 2.0 * rounds * units * tile.BM * tile.BN * depth / (_FLOPS[arithmetic] * candidate.pace)


def _candidate(arithmetic: Arithmetic, tile: Tile) -> Candidate:
    """What is known of a tile's pace. Matrix units': five times the other kernel's, by 4 x 4 matrices a subgroup."""
    if isinstance(tile, MatrixTile):
        if 4 * tile.MM > tile.TM:
            return Candidate(tile, 3.0, 6)
        return Candidate(tile, 4.9 if 4 * tile.MN == tile.TN else 4.65, 2)
    return next(c for c in CANDIDATES[arithmetic] if c.tile == tile)


def to_numbers(choice: Choice) -> tuple[int, ...]:
    """A choice as JSON and safetensors metadata can hold it."""
    return (*astuple(choice.tile), choice.slices, choice.tail)


def from_numbers(numbers: tuple[int, ...] | list[int]) -> Choice:
    *tile, slices, tail = numbers
    return Choice(MatrixTile(*tile) if len(tile) > len(fields(Tile)) else Tile(*tile), slices, tail)


def is_choice(name: str, numbers: Sequence[int]) -> bool:
    """Whether numbers from a file are a choice that the matmul of this `key` could have been given."""
    asked, _, sizes = name.split(" ")
    arithmetic = next((a for a in CANDIDATES if a == asked), None)
    known = len(fields(Tile)), len(fields(MatrixTile)) - 1, len(fields(MatrixTile))  # before there were BYTES
    if arithmetic is None or len(numbers) - 2 not in known:
        return False
    m, n, k = map(int, sizes.split("x"))
    choice = from_numbers(list(numbers))
    software = {software_tile(arithmetic, m, n)} if arithmetic in SOFTWARE else set()
    tiles = {c.tile for c in CANDIDATES[arithmetic]} | software
    real = _is_matrix_tile(arithmetic, choice.tile) if isinstance(choice.tile, MatrixTile) else choice.tile in tiles
    if not real or choice.slices not in _SLICES:
        return False
    return _long_enough(choice.tile, choice.slices, k) and _tail_fits(arithmetic, choice, n)


def _is_matrix_tile(arithmetic: Arithmetic, tile: MatrixTile) -> bool:
    """Whether some device's matrix units would be given this tile."""
    sizes = tile.MM, tile.MN, tile.MK, tile.SUBGROUP
    if not all(0 < size <= 128 for size in sizes) or tile.pinned not in (0, 1):
        return False
    subgroups = 1 if tile.pinned else tile.SUBGROUP, tile.SUBGROUP
    configs = [MatrixConfig("f32" if tile.BYTES == 4 else "f16", "f32", tile.MM, tile.MN, tile.MK, *subgroups)]
    if arithmetic == "int8_rows":
        configs = [replace(configs[0], k=HALF_K), MatrixConfig("i8", "i32", tile.MM, tile.MN, tile.MK, *subgroups)]
    largest = Caps(max_workgroup_bytes=1 << 20, max_invocations=1024, matrices=tuple(configs))
    return tile in matrix_tiles(arithmetic, largest)


def slice_length(k: int, choice: Choice) -> int:
    """Length of a slice of K: whole steps of the tile, so that no two slices share one."""
    return ceil_div(k, choice.slices * choice.tile.BK) * choice.tile.BK


def summed_at_once(arithmetic: Arithmetic, tile: Tile) -> int:
    """Steps of K that one f32 accumulator sums before it is added to C.

    The rounding error of a sum grows with the root of its length at least, and with its length where the terms share a
    sign, so a length that grows with the model is cut. Adding to C costs 8 bytes for 2 * length operations. A tile
    that fills a compute unit alone waits for that, so its blocks are longer. In f16 an accumulator takes the sum of
    BK steps at once; in int8 of 64, and 0 says that it takes all of K.
    """
    if arithmetic == "int8" or (isinstance(tile, MatrixTile) and arithmetic != "f32"):
        return 0  # matrix units add MK products at once, of operands that are rounded to far less
    if isinstance(tile, MatrixTile):
        return SUMMED_AT_ONCE
    if arithmetic == "f16":
        return SUMMED_AT_ONCE * tile.BK
    return 4 * SUMMED_AT_ONCE if tile.BM * tile.BN >= 256 * 128 else SUMMED_AT_ONCE


TileTable = Mapping[str, tuple[int, ...]]
