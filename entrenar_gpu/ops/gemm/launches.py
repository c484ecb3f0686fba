"""Launches of matmuls over blocks of tensors, in f32, f16 and int8, for the ops that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from entrenar_gpu.graph import Binding, Caps, Launch, Tensor, grid_of, reads, split_offset, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.gemm.tiles import (
    HALF_K,
    Arithmetic,
    Choice,
    MatrixTile,
    Tile,
    choose,
    slice_length,
    summed_at_once,
)

SHADERS: dict[Arithmetic, str] = {
    "f32": "matmul",
    "f16": "matmul_f16",
    "int8": "matmul_int8",
    "int8_rows": "matmul_matrix_int8",
}


@dataclass(frozen=True)
class Block:
    """A row-major matrix inside a tensor: `base` element offset, `stride` elements a row."""

    tensor: Tensor
    base: int
    stride: int


def whole(tensor: Tensor) -> Block:
    return Block(tensor, 0, tensor.columns)


def layout_of(transpose_a: bool, transpose_b: bool) -> str:
    return ("t" if transpose_a else "n") + ("t" if transpose_b else "n")


@dataclass(frozen=True)
class Matmul:
    """C (+)= alpha op(A) op(B) + lora_scale op(P) op(Q) + bias + residual; M, N, K and the low-rank inner length R.

    Of `low_rank`, P is transposed as A is, and Q by itself: [N, R] with `low_rank_transposed`. `accumulate` adds onto
    what C holds; a `residual` that is another tensor has C's layout. With `scales` of A and B, these hold int8, four
    to a u32; an A of f16 makes it a matmul in f16. Neither has a transposed A, and int8 has alpha 1 and a transposed B.
    """

    sizes: tuple[int, int, int]
    a: Block
    b: Block
    c: Block
    transpose_a: bool = False
    transpose_b: bool = False
    alpha: float = 1.0
    low_rank: tuple[Block, Block, float, int] | None = None
    low_rank_transposed: bool = False
    bias: Tensor | None = None
    residual: Tensor | None = None
    accumulate: bool = False
    scales: tuple[Tensor, Tensor] | None = None

    @property
    def arithmetic(self) -> Arithmetic:
        if self.scales is not None:
            return "int8_rows" if len(self.scales[0].shape) == 1 else "int8"
        return "f16" if self.a.tensor.dtype == "f16" else "f32"

    @property
    def layout(self) -> str:
        return layout_of(self.transpose_a, self.transpose_b)

    @property
    def vector(self) -> bool:
        """Whether four consecutive elements of C may be written at once."""
        return self.sizes[1] % 4 == 0 and self.c.stride % 4 == 0 and self.c.base % 4 == 0


def single_launch(matmul: Matmul, caps: Caps) -> Launch:
    """A matmul in one launch, for callers without a workspace to split K in."""
    matrices = all(not (block.stride % 4 or block.base % 4) for block in (matmul.a, matmul.b))
    choice = choose(matmul.arithmetic, *matmul.sizes, matmul.layout, caps, split=False, matrices=matrices)
    return matmul_launch(matmul, choice)


def matmul_launches(matmul: Matmul, choice: Choice, partial: Tensor | None, caps: Caps) -> list[Launch]:
    """A matmul in one launch; or split along K into `partial` [slices, M, N], or the tail's columns for N."""
    n = matmul.sizes[1]
    if partial is None:
        return [matmul_launch(matmul, choice)]
    if choice.tail:
        return [matmul_launch(matmul, choice, partial), sum_launch(matmul, partial, caps, n - choice.tail)]
    apart = replace(matmul, c=Block(partial, 0, n), bias=None, residual=None, accumulate=False)
    return [matmul_launch(apart, choice), sum_launch(matmul, partial, caps)]


def matmul_launch(matmul: Matmul, choice: Choice, partial: Tensor | None = None) -> Launch:
    """The multiplication itself: into C, or with several slices into the partial sums that C then names.

    With a tail, C gets all other columns, and `partial` the tail's sums. In f16 and int8 K is whole tiles; N is whole
    tiles in int8, and with every base and stride a multiple of four in f16.
    """
    (m, n, k), tile, length = matmul.sizes, choice.tile, slice_length(matmul.sizes[2], choice)
    constants = {**asdict(tile), "M": m, "N": n, "K": k, "slices": ceil_div(k, length), "slice": length}
    constants |= {"tail": choice.tail, "alpha": matmul.alpha, **_blocks(matmul, choice)}
    # Elements of C that a thread writes at once: in int8, its columns do not lie side by side.
    width = 1 if matmul.arithmetic == "int8" or not matmul.vector else 4
    shader = SHADERS[matmul.arithmetic]
    if isinstance(tile, MatrixTile) and matmul.arithmetic == "int8_rows":
        constants |= {"HALF_K": HALF_K, "groups": tile.stored_groups("int8_rows", matmul.low_rank is not None)}
    elif isinstance(tile, MatrixTile):
        shader, direct = "matmul_matrix", _stores_sums(matmul, tile) and constants["blocks"] == 1
        constants |= {"direct": direct, "groups": tile.stored_groups(matmul.arithmetic, False)}
        width = 1 if direct else width
    bindings: list[Binding] = []
    for bound, given in (_operands(matmul, tile), _low_rank(matmul, tile), epilogue(matmul, width)):
        bindings += bound
        constants |= given
    if partial is not None:
        bindings.append(writes("partial", partial, 4))
    return Launch(shader, tuple(bindings), constants, _grid(matmul, choice), trusted=True)


def _stores_sums(matmul: Matmul, tile: MatrixTile) -> bool:
    """Whether sums go to C as matrix units hold them: all of them lie inside, and no more is done to them."""
    m, n, _ = matmul.sizes
    added = matmul.accumulate or matmul.bias is not None or matmul.residual is not None
    plain = matmul.alpha == 1.0 and not added and matmul.c.tensor.dtype == "f32"
    return plain and m % tile.BM == 0 and n % tile.BN == 0 and matmul.vector


def _blocks(matmul: Matmul, choice: Choice) -> dict[str, int]:
    """How many blocks of which length an accumulator sums one after the other, in the longest of its slices."""
    k, depth = matmul.sizes[2], choice.tile.BK
    longest = k if choice.tail else slice_length(k, choice)
    most = summed_at_once(matmul.arithmetic, choice.tile)
    blocks = ceil_div(longest, most) if most else 1
    return {"blocks": blocks, "block": ceil_div(longest, blocks * depth) * depth}


def _grid(matmul: Matmul, choice: Choice) -> tuple[int, int, int]:
    (m, n, k), tile = matmul.sizes, choice.tile
    down, slices = ceil_div(m, tile.BM), ceil_div(k, slice_length(k, choice))
    if choice.tail:  # behind the whole tiles, those of the tail slice by slice
        return down, (n - choice.tail) // tile.BN + slices * ceil_div(choice.tail, tile.BN), 1
    return down, ceil_div(n, tile.BN), slices


def _operands(matmul: Matmul, tile: Tile) -> tuple[list[Binding], dict[str, Any]]:
    """Bindings and constants of A, B and, in int8, their scales."""
    (m, n, k), depth = matmul.sizes, tile.BK
    if matmul.arithmetic == "int8_rows" and matmul.scales is not None:  # whole matrices, as they lie
        a_scale, b_scale = matmul.scales
        words = [reads("a", matmul.a.tensor, 4), reads("b", matmul.b.tensor, 4)]
        return [*words, reads("a_scale", a_scale), reads("b_scale", b_scale, 4)], {}
    if matmul.scales is not None:  # four codes to a word
        k, depth = k // 4, depth // 4
    a = _operand(matmul.a, (m, k), (tile.BM, depth), not matmul.transpose_a)
    b = _operand(matmul.b, (n, k), (tile.BN, depth), matmul.transpose_b)
    if isinstance(tile, MatrixTile):
        bindings = [_bind_words("a", matmul.a, a, tile), _bind_words("b", matmul.b, b, tile)]
    else:
        bindings = [_bind("a", matmul.a, a), _bind("b", matmul.b, b)]
    bindings += [reads(f"{name}_scale", t) for name, t in zip("ab", matmul.scales or (), strict=False)]
    return bindings, {"A": a, "B": b}


def _low_rank(matmul: Matmul, tile: Tile) -> tuple[list[Binding], dict[str, Any]]:
    """Bindings and constants of P and Q: of tiles as A's and B's in f32 and on matrix units, else of what is read
    element by element."""
    if matmul.low_rank is None:
        return [], {"R": 0, "q_contiguous": False}
    (m, n, _), (p, q, lora_scale, r) = matmul.sizes, matmul.low_rank
    constants: dict[str, Any] = {"R": r, "lora_scale": lora_scale}
    if isinstance(tile, MatrixTile):
        constants["q_contiguous"] = matmul.low_rank_transposed
        along_r = 4 if r % (16 // tile.BYTES) == 0 else 1
        along_q = along_r if matmul.low_rank_transposed else 4
        return [reads("p", p.tensor, along_r), reads("q", q.tensor, along_q)], constants
    if matmul.arithmetic != "f32":
        q_n, q_r = (r, 1) if matmul.low_rank_transposed else (1, n)
        return [reads("p", p.tensor), reads("q", q.tensor)], {**constants, "q_n": q_n, "q_r": q_r}
    constants["P"] = _operand(p, (m, r), (tile.BM, tile.BK), not matmul.transpose_a)
    constants["Q"] = _operand(q, (n, r), (tile.BN, tile.BK), matmul.low_rank_transposed)
    return [_bind("p", p, constants["P"]), _bind("q", q, constants["Q"])], constants


def epilogue(matmul: Matmul, width: int) -> tuple[list[Binding], dict[str, Any]]:
    """Bindings (vectors of `width`) and constants of C and of what is added to a matmul as it is written there."""
    offset, base = split_offset(matmul.c.base, matmul.c.tensor)
    bindings = [reads("bias", matmul.bias, width)] if matmul.bias is not None else []
    added = "c" if matmul.accumulate else "residual" if matmul.residual is not None else ""
    if matmul.residual is not None and added == "residual":  # it has C's layout, and begins where C does
        bindings.append(reads("residual", matmul.residual, width, offset))
    bindings.append(writes("c", matmul.c.tensor, width, offset))
    constants = {"bias": matmul.bias is not None, "residual": added, "c_base": base, "ldc": matmul.c.stride}
    return bindings, {**constants, "c_format": matmul.c.tensor.dtype, "c_width": width}


def sum_launch(matmul: Matmul, partial: Tensor, caps: Caps, first_column: int = 0, factor: float = 1.0) -> Launch:
    """C's columns from `first_column` on (+)= factor * the sum of the slices in `partial` + bias + residual."""
    m, n = matmul.sizes[0], matmul.sizes[1] - first_column
    width = 4 if matmul.vector else 1
    bindings, constants = epilogue(replace(matmul, c=replace(matmul.c, base=matmul.c.base + first_column)), width)
    constants |= {"M": m, "N": n, "slices": partial.shape[0], "first_column": first_column, "factor": factor}
    grid = grid_of(ceil_div(m * n, 256 * width), caps)
    return Launch("matmul_sum", (reads("partial", partial, width), *bindings), constants, grid, trusted=True)


def _operand(block: Block, lengths: tuple[int, int], steps: tuple[int, int], k_contiguous: bool) -> dict[str, Any]:
    """How the shader reads an operand of (outer, inner) `lengths`, in tiles of `steps`: lib/staging.wgsl.

    Guards against reading past an edge are left out where tiles fit exactly.
    """
    (outer, inner), (outer_step, inner_step) = lengths, steps
    guards = outer % outer_step != 0, inner % inner_step != 0
    majors, minors = (outer, inner) if k_contiguous else (inner, outer)
    return {
        "majors": majors,
        "minors": minors,
        "guard_majors": guards[0] if k_contiguous else guards[1],
        "guard_minors": guards[1] if k_contiguous else guards[0],
        "base": split_offset(block.base, block.tensor)[1],
        "stride": block.stride,
        "k_contiguous": k_contiguous,
        "format": block.tensor.dtype,
        "panels": len(block.tensor.shape) == 5,
        "vector": minors % 4 == 0 and block.stride % 4 == 0 and block.base % 4 == 0,
    }


def _bind(name: str, block: Block, operand: dict[str, Any]) -> Binding:
    width = 1 if not operand["vector"] else 2 if operand["format"] in ("bf16", "half") else 4
    return reads(name, block.tensor, width, split_offset(block.base, block.tensor)[0])


def _bind_words(name: str, block: Block, operand: dict[str, Any], tile: MatrixTile) -> Binding:
    """Of an operand that is read by as many elements at once as a word in workgroup memory has, 8 or 4: f16, bf16 and
    half as u32, of two each; f32 by four."""
    vector = 4 if operand["format"] == "f32" else 8 // tile.BYTES
    return replace(_bind(name, block, operand), vector=vector, words=block.tensor.dtype == "f16")


def partial_shapes(sizes: Sequence[int], choice: Choice) -> list[tuple[tuple[int, ...], str]]:
    """The workspace that a choice needs, as specs for `Op.workspace`."""
    m, n, k = sizes
    slices = ceil_div(k, slice_length(k, choice))
    return [((slices, m, choice.tail or n), "f32")] if slices > 1 else []
