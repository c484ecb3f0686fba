"""Launches of matrix products over blocks of tensors, in f32 and f16, for ops that are made of products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from entrenar_gpu.graph import Binding, Caps, Launch, Tensor, grid_of, reads, split_offset, writes
from entrenar_gpu.ops.gemm.tiles import Choice, choose, slice_length


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
class Product:
    """C (+)= alpha op(A) op(B) + beta op(P) op(Q) + bias + residual; M, N, K and the pair's inner length R.

    Of the pair, P is transposed as A is, and Q by itself: [N, R] with `pair_transposed`. `accumulate` adds onto what C
    holds; a `residual` that is another tensor has C's layout.
    """

    sizes: tuple[int, int, int]
    a: Block
    b: Block
    c: Block
    transpose_a: bool = False
    transpose_b: bool = False
    alpha: float = 1.0
    pair: tuple[Block, Block, float, int] | None = None
    pair_transposed: bool = False
    bias: Tensor | None = None
    residual: Tensor | None = None
    accumulate: bool = False

    @property
    def layout(self) -> str:
        return layout_of(self.transpose_a, self.transpose_b)

    @property
    def vector(self) -> bool:
        """Whether four consecutive elements of C may be written at once."""
        return self.sizes[1] % 4 == 0 and self.c.stride % 4 == 0 and self.c.base % 4 == 0


def gemm(
    caps: Caps,
    sizes: tuple[int, int, int],
    a: Block,
    b: Block,
    c: Block,
    transpose_a: bool = False,
    transpose_b: bool = False,
    accumulate: bool = False,
) -> Launch:
    """One launch of C (+)= op(A) op(B), for callers without a workspace to split K in."""
    product = Product(sizes, a, b, c, transpose_a, transpose_b, accumulate=accumulate)
    return product_launch(product, choose("f32", *sizes, product.layout, caps, split=False))


def product_launches(product: Product, choice: Choice, partial: Tensor | None, caps: Caps) -> list[Launch]:
    """The product in one launch; or split along K into `partial` [slices, M, N], or the tail's columns for N."""
    n = product.sizes[1]
    if partial is None:
        return [product_launch(product, choice)]
    if choice.tail:
        return [product_launch(product, choice, partial), sum_launch(product, partial, caps, n - choice.tail)]
    apart = replace(product, c=Block(partial, 0, n), bias=None, residual=None, accumulate=False)
    return [product_launch(apart, choice), sum_launch(product, partial, caps)]


def product_launch(product: Product, choice: Choice, partial: Tensor | None = None) -> Launch:
    """The multiplication itself: into C, or with several slices into the partial sums that C then names.

    With a tail, C gets all other columns, and `partial` the tail's sums.
    """
    (m, n, _), tile = product.sizes, choice.tile
    constants = {**_blocked(product, choice), "c_vector": product.vector}
    bindings = [_bind("a", product.a, constants["A"]), _bind("b", product.b, constants["B"])]
    if product.pair is not None:
        p, q, beta, r = product.pair
        constants.update(R=r, beta=beta, P=_operand(p, (m, r), (tile.BM, tile.BK), not product.transpose_a))
        constants.update(Q=_operand(q, (n, r), (tile.BN, tile.BK), product.pair_transposed))
        bindings += [_bind("p", p, constants["P"]), _bind("q", q, constants["Q"])]
    out, written = _output(product, 4 if product.vector else 1)
    tail = [writes("partial", partial, 4)] if partial is not None else []
    constants |= {**written, "tail": choice.tail}
    return Launch("matmul", (*bindings, *out, *tail), constants, _grid(product, choice), trusted=True)


def f16_launch(product: Product, choice: Choice) -> Launch:
    """The multiplication in f16 with f32 sums (shaders/matmul_f16.wgsl), otherwise as `product_launch`.

    A is f16 and not transposed; B any float, converted on the way in. K is whole tiles, N and every base and stride a
    multiple of four.
    """
    constants = {**_blocked(product, choice), "f16": True, "c_format": product.c.tensor.dtype}
    bindings = [_bind("a", product.a, constants["A"]), _bind("b", product.b, constants["B"])]
    pair, paired = flat_pair(product)
    out, written = _output(product, 4)
    constants |= {**paired, **written}
    return Launch("matmul_f16", (*bindings, *pair, *out), constants, _grid(product, choice), trusted=True)


def _blocked(product: Product, choice: Choice) -> dict[str, Any]:
    """Constants of a multiplication without a pair: sizes, tile, slices of K, and how A and B are read."""
    (m, n, k), tile = product.sizes, choice.tile
    length = slice_length(k, choice)
    a = _operand(product.a, (m, k), (tile.BM, tile.BK), not product.transpose_a)
    b = _operand(product.b, (n, k), (tile.BN, tile.BK), product.transpose_b)
    constants: dict[str, Any] = {**asdict(tile), "M": m, "N": n, "K": k, "A": a, "B": b, "R": 0, "alpha": product.alpha}
    return {**constants, "slices": -(-k // length), "slice": length}


def _grid(product: Product, choice: Choice) -> tuple[int, int, int]:
    (m, n, k), tile = product.sizes, choice.tile
    down, slices = -(-m // tile.BM), -(-k // slice_length(k, choice))
    if choice.tail:  # behind the whole tiles, those of the tail slice by slice
        return down, (n - choice.tail) // tile.BN + slices * -(-choice.tail // tile.BN), 1
    return down, -(-n // tile.BN), slices


def flat_pair(product: Product) -> tuple[list[Binding], dict[str, Any]]:
    """Bindings and constants of a pair that is read element by element, as low-precision products do."""
    if product.pair is None:
        return [], {}
    p, q, beta, r = product.pair
    q_n, q_r = (r, 1) if product.pair_transposed else (1, product.sizes[1])
    return [reads("p", p.tensor), reads("q", q.tensor)], {"R": r, "beta": beta, "q_n": q_n, "q_r": q_r}


def _output(product: Product, width: int) -> tuple[list[Binding], dict[str, Any]]:
    """Bindings (vectors of `width`) and constants of C and of what is added to it."""
    extra, added = epilogue(product, width)
    offset, base = split_offset(product.c.base, product.c.tensor)
    return [*extra, writes("c", product.c.tensor, width, offset)], {**added, "c_base": base, "ldc": product.c.stride}


def sum_launch(product: Product, partial: Tensor, caps: Caps, first_column: int = 0) -> Launch:
    """C's columns from `first_column` on (+)= the sum of the partial products + bias + residual."""
    m, n = product.sizes[0], product.sizes[1] - first_column
    width = 4 if product.vector else 1
    begins = replace(product.c, base=product.c.base + first_column)
    out, written = _output(replace(product, c=begins), width)
    bindings = (reads("partial", partial, width), *out)
    constants = {"M": m, "N": n, "slices": partial.shape[0], "vector": product.vector, **written}
    constants["first_column"] = first_column
    return Launch("matmul_sum", bindings, constants, grid_of(-(-m * n // (256 * width)), caps), trusted=True)


def epilogue(product: Product, width: int) -> tuple[list[Binding], dict[str, Any]]:
    """Bindings (vectors of `width`) and constants of what is added to a product as it is written."""
    bindings = [reads("bias", product.bias, width)] if product.bias is not None else []
    apart = product.residual is not None and not product.accumulate
    if product.residual is not None and apart:
        offset, _ = split_offset(product.c.base, product.c.tensor)  # it has C's layout, and begins where C does
        bindings.append(reads("residual", product.residual, width, offset))
    named = "c" if product.accumulate else "residual" if apart else ""
    return bindings, {"bias": product.bias is not None, "residual": named}


def _operand(block: Block, lengths: tuple[int, int], steps: tuple[int, int], k_contiguous: bool) -> dict[str, Any]:
    """How the shader reads an operand of (outer, inner) `lengths`, in tiles of `steps`.

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
        "vector": minors % 4 == 0 and block.stride % 4 == 0 and block.base % 4 == 0,
    }


def _bind(name: str, block: Block, operand: dict[str, Any]) -> Binding:
    width = 1 if not operand["vector"] else 2 if operand["format"] in ("bf16", "half") else 4
    return reads(name, block.tensor, width, split_offset(block.base, block.tensor)[0])


def partial_shapes(sizes: Sequence[int], choice: Choice) -> list[tuple[tuple[int, ...], str]]:
    """The workspace that a choice needs, as specs for `Op.workspace`."""
    m, n, k = sizes
    slices = -(-k // slice_length(k, choice))
    return [((slices, m, choice.tail or n), "f32")] if slices > 1 else []
