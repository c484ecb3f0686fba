"""The table of cases: every differentiable op on the shapes and options that can break it.

A case is an op applied to named inputs. The tests put it in the middle of a program (`equivalence.build`), so one row
here gives: GPU against NumPy, forward and backward; gradient against central differences; rendering; planning.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar_gpu import ops
from entrenar_gpu.graph.tensor import Tensor
from entrenar_gpu.ops.quantize import host_parts
from entrenar_gpu.quant import nf4

Make = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def off_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Further than 0.01 from relu's kink."""
    x = normal(rng, shape)
    return np.where(np.abs(x) < 0.01, np.float32(0.5), x)


def wide(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Up to where activations saturate."""
    return rng.uniform(-12, 12, shape).astype(np.float32)


def positive(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """What may be divided by."""
    return rng.uniform(0.5, 2, shape).astype(np.float32)


@dataclass(frozen=True)
class Input:
    """`role` "temp" is differentiated and reaches the op as a temporary, "param" as a parameter with a gradient that
    already holds something, "leaf" as an input; "weight" and "input" are not differentiated."""

    shape: tuple[int, ...]
    role: str = "temp"
    dtype: str = "f32"
    make: Make = normal


@dataclass(frozen=True)
class Case:
    name: str
    inputs: tuple[Input, ...]
    apply: Callable[..., Tensor]
    logits_bytes: int | None = None  # forces cross-entropy into small chunks

    @property
    def op(self) -> str:
        return self.name.split("-")[0]


def x(*shape: int, make: Make = normal) -> Input:
    return Input(shape, make=make)


def param(*shape: int) -> Input:
    return Input(shape, "param")


def frozen(*shape: int, dtype: str = "f32") -> Input:
    return Input(shape, "weight", dtype)


def below(limit: int, *shape: int, dtype: str = "u32") -> Input:
    return Input(shape, "input", dtype, lambda rng, s: rng.integers(0, limit, s))


def _dims(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def elementwise() -> list[Case]:
    shapes = [(1,), (3, 5), (15, 17), (16, 16), (257,), (2, 31, 33)]
    cases = [Case(f"{op}-{_dims(s)}", (x(*s), x(*s)), getattr(ops, op)) for op in ("add", "sub", "mul") for s in shapes]
    for op, f in [("add", ops.add), ("sub", ops.sub), ("mul", ops.mul)]:
        cases += [Case(f"{op}-broadcast-{_dims(b)}", (x(2, 31, 33), x(*b)), f) for b in [(33,), (31, 33), (1,)]]
        cases.append(Case(f"{op}-one-row", (x(1, 33), param(33)), f))
        cases.append(Case(f"{op}-itself", (x(5, 33),), lambda a, f=f: f(a, a)))
    cases += [Case(f"div-{_dims(s)}", (x(*s), x(*s, make=positive)), ops.div) for s in shapes]
    cases += [Case(f"div-broadcast-{_dims(b)}", (x(2, 31, 33), x(*b, make=positive)), ops.div) for b in [(33,), (1,)]]
    cases += [Case(f"scale-{_dims(s)}", (x(*s),), lambda a: ops.scale(a, -0.3)) for s in shapes]
    for op, make in [
        ("relu", off_zero),
        ("relu_squared", normal),
        ("gelu", normal),
        ("gelu_tanh", normal),
        ("swish", normal),
    ]:
        cases += [Case(f"{op}-{_dims(s)}", (x(*s, make=make),), getattr(ops, op)) for s in shapes]
    cases += [Case(f"{op}-wide", (x(5, 129, make=wide),), getattr(ops, op)) for op in ("gelu", "gelu_tanh", "swish")]
    for gate in ("swiglu", "geglu", "geglu_tanh"):
        cases += [Case(f"{gate}-{_dims(s)}", (x(*s), x(*s)), getattr(ops, gate)) for s in shapes]
    cases.append(Case("swiglu-itself", (x(5, 33),), lambda a: ops.swiglu(a, a)))
    return cases


def reductions() -> list[Case]:
    cases = [Case(f"sum-{_dims(s)}", (x(*s),), ops.sum) for s in [(1,), (63,), (65,), (4096,), (4097,), (129, 65)]]
    cases += [Case(f"mean-{_dims(s)}", (x(*s),), ops.mean) for s in [(1,), (17, 33), (2, 4097)]]
    cases += [Case(f"sum_rows-{_dims(s)}", (x(*s),), ops.sum_rows) for s in [(1, 5), (128, 3), (129, 65), (300, 17)]]
    cases.append(Case("sum_rows-3x5x7", (x(3, 5, 7),), lambda a: ops.sum_rows(a, (5, 7))))
    cases += [Case(f"sum_columns-{_dims(s)}", (x(*s),), ops.sum_columns) for s in [(5, 1), (17, 63), (3, 129)]]
    cases += [Case(f"softmax-{_dims(s)}", (x(*s),), ops.softmax) for s in [(17, 33), (3, 1), (2, 64), (2, 3, 129)]]
    return cases


def views() -> list[Case]:
    """Axes of one element, of all orders and lengths that no power of two divides; parts from both ends."""
    orders = {(1, 0): (5, 33), (2, 0, 1): (3, 5, 7), (0, 2, 1): (3, 1, 7), (3, 1, 0, 2): (2, 3, 5, 4)}
    cases = [
        Case(f"transpose-{_dims(s)}-{_dims(o)}", (x(*s),), functools.partial(ops.transpose, axes=o))
        for o, s in orders.items()
    ]
    cases.append(Case("reshape-3x5x7", (x(3, 5, 7),), lambda a: ops.reshape(a, (7, 15))))
    wider = [((1,), (3, 5)), ((5, 1), (5, 33)), ((3, 1, 7), (2, 3, 5, 7)), ((1, 5, 1), (3, 5, 7)), ((7,), (2, 3, 7))]
    wider += [((1, 3), (300, 3)), ((3, 1, 1), (3, 5, 7))]
    cases += [
        Case(f"broadcast-{_dims(a)}-{_dims(b)}", (x(*a),), functools.partial(ops.broadcast, shape=b)) for a, b in wider
    ]
    parts: list[tuple[tuple[int, ...], ...]] = [
        ((9,), (2,), (1,), (3,)),
        ((9,), (8,), (-3,), (3,)),
        ((5, 33), (1, 0), (2, 1), (2, 33)),
        ((3, 5, 7), (2, 0, 6), (-1, 2, -2), (3, 3, 4)),
        ((3, 5, 7), (1, 3, 1), (1, 1, 5), (1, 1, 2)),
    ]
    for number, (shape, starts, steps, lengths) in enumerate(parts):
        take = functools.partial(ops.part, starts=starts, steps=steps, shape=lengths)
        cases.append(Case(f"part-{_dims(shape)}-{number}", (x(*shape),), take))
    return cases


def norms() -> list[Case]:
    def rms(a: Tensor, w: Tensor) -> Tensor:
        return ops.rms_norm(a, w, 1e-6)

    def layer(a: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.layer_norm(a, w, b, 1e-5)

    cases = []
    for shape in [(1, 5), (17, 33), (3, 64), (2, 3, 129)]:
        n = shape[-1]
        cases.append(Case(f"rms_norm-{_dims(shape)}", (x(*shape), param(n)), rms))
        cases.append(Case(f"layer_norm-{_dims(shape)}", (x(*shape), param(n), param(n)), layer))
    cases.append(Case("rms_norm-by-head", (x(7, 3 * 24), param(24)), rms))
    cases.append(Case("rms_norm-many-rows", (x(131, 16), x(16)), rms))
    cases.append(Case("rms_norm-frozen", (x(5, 65), frozen(65)), rms))
    shifted = functools.partial(ops.rms_norm, eps=1e-6, offset=1.0)
    cases.append(Case("rms_norm-offset", (x(7, 40), param(40)), shifted))
    cases.append(Case("rms_norm-residual", (x(5, 64), param(64)), lambda a, w: ops.add(a, ops.swish(rms(a, w)))))
    cases.append(Case("layer_norm-residual", (x(7, 33), param(33), param(33)), _residual_layer))
    return cases


def _residual_layer(a: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The gradient of `a` is the norm's plus one that is read again, so that the sum cannot take its place."""
    return ops.add(ops.mul(a, a), ops.swish(ops.layer_norm(a, w, b, 1e-5)))


def _table(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return ops.rope_table(1e4 ** (-np.arange(shape[1] // 2) / (shape[1] // 2)), shape[0])


def ropes() -> list[Case]:
    """(tokens, heads, head size)."""
    cases = []
    for tokens, heads, size in [(1, 1, 2), (1, 1, 4), (17, 3, 6), (5, 2, 24), (33, 2, 64), (3, 1, 80)]:
        inputs = (x(tokens, heads * size), Input((50, size), "weight", "f32", _table), below(50, tokens))
        cases.append(Case(f"rope-{tokens}x{heads}x{size}", inputs, ops.rope))
        if size == 2:  # a norm's gradient is orthogonal to x: of two elements hardly anything may be left
            continue
        learnt = param(size) if heads > 1 else frozen(size)
        cases.append(Case(f"norm_rope-{tokens}x{heads}x{size}", (inputs[0], learnt, *inputs[1:]), _norm_rope))
    table, at = Input((50, 12), "weight", "f32", _table), below(50, 17)
    shifted = functools.partial(_norm_rope, offset=1.0)
    cases.append(Case("norm_rope-offset", (x(17, 36), param(12), table, at), shifted))
    for name, size, interleaved in [
        ("partial", 20, False),
        ("interleaved", 12, True),
        ("partial-interleaved", 14, True),
    ]:
        apply = functools.partial(ops.rope, head_dim=size, interleaved=interleaved)
        cases.append(Case(f"rope-{name}", (x(17, 3 * size), table, at), apply))
    return cases


def _norm_rope(a: Tensor, weight: Tensor, table: Tensor, positions: Tensor, offset: float = 0.0) -> Tensor:
    return ops.norm_rope(a, weight, 1e-6, table, positions, offset)


def segment_starts(lengths: Sequence[Sequence[int]]) -> Input:
    """For each token the place in its row where its segment starts; a row is given by its segments' lengths."""
    starts = np.array([np.repeat(np.cumsum([0, *row[:-1]]), row) for row in lengths], np.uint32).reshape(-1)
    return Input(starts.shape, "input", "u32", lambda rng, shape: starts)


def attentions() -> list[Case]:
    """(rows as segment lengths, query heads, key/value heads, head size); the last segment may be padding."""
    table = {
        "one-token": ([[1]], 1, 1, 8),
        "short": ([[15], [15]], 4, 2, 8),
        "tile-less-one": ([[31]], 2, 2, 24),
        "tile": ([[32], [32]], 4, 1, 8),
        "tile-and-one": ([[33]], 2, 1, 64),
        "two-tiles-less-one": ([[63]], 3, 3, 8),
        "two-tiles-and-one": ([[65]], 2, 1, 8),
        "four-tiles-and-one": ([[129]], 1, 1, 16),
        "head-6": ([[34]], 2, 1, 6),
        "head-80": ([[17]], 2, 2, 80),
        "head-96": ([[33]], 2, 1, 96),
        "head-128": ([[34]], 4, 1, 128),
        "head-256": ([[5]], 1, 1, 256),
        "packed": ([[1, 5, 1, 1, 20, 32, 5], [40, 1, 24]], 4, 2, 16),
        "packed-long": ([[1, 63, 1, 64, 4], [32, 32, 32, 1, 36]], 2, 1, 8),
        "packed-across": ([[50, 40, 38]], 2, 1, 8),
        "single-tokens": ([[1] * 35], 2, 1, 8),
    }
    variants: dict[str, tuple[list[list[int]], dict[str, float]]] = {
        "window-1": ([[33]], {"window": 1}),
        "window-short": ([[1, 5, 1, 1, 20, 32, 5], [40, 1, 24]], {"window": 7}),
        "window-long": ([[200]], {"window": 67}),
        "window-of-a-tile": ([[129, 63]], {"window": 64}),
        "window-beyond": ([[50, 40, 38]], {"window": 45}),
        "softcap": ([[50, 40, 38]], {"softcap": 1.5}),
        "scale": ([[33]], {"scale": 0.21}),
        "window-softcap-scale": (
            [[1, 63, 1, 64, 4], [32, 32, 32, 1, 36]],
            {"window": 20, "softcap": 2.0, "scale": 0.5},
        ),
    }
    cases = []
    for name, (rows, heads, kv_heads, size) in table.items():
        tokens, segments = len(rows) * sum(rows[0]), segment_starts(rows)
        inputs = (x(tokens, heads * size), x(tokens, kv_heads * size), x(tokens, kv_heads * size), segments)
        apply = functools.partial(ops.attention, rows=len(rows), heads=heads, kv_heads=kv_heads)
        cases.append(Case(f"attention-{name}", inputs, apply))
    for name, (rows, options) in variants.items():
        tokens, segments = len(rows) * sum(rows[0]), segment_starts(rows)
        inputs = (x(tokens, 16), x(tokens, 8), x(tokens, 8), segments)
        apply = functools.partial(ops.attention, rows=len(rows), heads=2, kv_heads=1, **options)
        cases.append(Case(f"attention-{name}", inputs, apply))
    return cases


def dropouts() -> list[Case]:
    words = Input((3,), "input", "u32", lambda rng, s: rng.integers(0, 2**32, s, dtype=np.uint32))
    drop = functools.partial(ops.dropout, key=7)
    cases = [Case(f"dropout-{p}", (x(17, 33), words), functools.partial(drop, probability=p)) for p in (0.0, 0.1, 0.9)]
    noise = functools.partial(ops.uniform_noise, key=7)
    return [*cases, Case("uniform_noise-17x33", (x(17, 33), Input((17,), "input", make=positive), words), noise)]


def matmul_shape(m: int, n: int, k: int, ta: bool, tb: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    return ((k, m) if ta else (m, k), (n, k) if tb else (k, n))


def matmuls() -> list[Case]:
    cases = []
    # The gradients of each layout are products in two others, so that every size reaches every layout.
    sizes = {
        "nn": [(1, 1, 1), (17, 65, 33), (65, 33, 129)],
        "nt": [(5, 3, 7), (16, 16, 16), (17, 65, 33)],
        "tn": [(15, 31, 17), (32, 64, 128)],
        "tt": [(17, 65, 33), (127, 63, 31)],
    }
    for kind in sizes:
        ta, tb = kind[0] == "t", kind[1] == "t"
        for m, n, k in sizes[kind]:
            a, b = matmul_shape(m, n, k, ta, tb)
            apply = functools.partial(ops.matmul, transpose_a=ta, transpose_b=tb)
            cases.append(Case(f"matmul-{kind}-{m}x{n}x{k}", (x(*a), x(*b)), apply))
        for m, n, k, r in [(17, 33, 20, 5), (64, 64, 32, 16)][: 2 if ta == tb else 1]:
            (a, b), (p, q) = matmul_shape(m, n, k, ta, tb), matmul_shape(m, n, r, ta, tb)
            apply = functools.partial(_matmul_with_everything, ta=ta, tb=tb)
            inputs = (x(*a), param(*b), x(*p), param(*q), param(n), x(m, n))
            cases.append(Case(f"matmul-{kind}-pair-bias-residual-{m}x{n}x{k}", inputs, apply))
        for dtype, (m, n, k) in [("bf16", (33, 64, 96)), ("bf16", (17, 33, 65)), ("half", (17, 33, 65))]:
            a, b = matmul_shape(m, n, k, ta, tb)
            apply = functools.partial(ops.matmul, transpose_a=ta, transpose_b=tb)
            cases.append(Case(f"matmul-{kind}-{dtype}-{m}x{n}x{k}", (x(*a), frozen(*b, dtype=dtype)), apply))
    cases += [
        Case("matmul-leading-axes", (x(3, 11, 20), param(17, 20)), functools.partial(ops.matmul, transpose_b=True)),
        Case("matmul-alpha", (x(19, 20), param(20, 24)), functools.partial(ops.matmul, alpha=-0.7)),
        Case("matmul-two-products", (x(19, 20), param(20, 24), param(20, 24)), _two_products),
        Case("matmul-two-wide-products", (x(3, 300), param(300, 5), param(300, 5)), _two_products),
        Case("matmul-of-a-sum", (x(19, 20), param(20, 24), param(20, 24)), _product_of_sum),
        Case("matmul-after-itself-added", (x(19, 20), param(20, 24)), _doubled),
        Case("matmul-long-odd", (x(5, 1000), frozen(1000, 33), param(33)), _with_bias),
        Case("matmul-long-fours", (x(16, 1024), frozen(1024, 32), param(32)), _with_bias),
        Case("matmul-square", (x(33, 33),), lambda a: ops.matmul(a, a)),
        Case("matmul-residual-stream", (x(33, 24), param(24, 24)), _residual_stream),
        Case("matmul-lora", (x(35, 40), frozen(33, 40), param(8, 40), param(33, 8)), _lora),
    ]
    return cases


def _matmul_with_everything(a: Any, b: Any, p: Any, q: Any, bias: Any, residual: Any, ta: bool, tb: bool) -> Tensor:
    return ops.matmul(a, b, ta, tb, 0.5, (p, q, -1.5), bias, residual)


def _with_bias(a: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return ops.matmul(a, w, bias=bias)


def _two_products(a: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Both gradients of `a` are products: the second joins the first."""
    return ops.mul(ops.matmul(a, v), ops.matmul(a, w))


def _product_of_sum(a: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """One product is the gradient of two parameters."""
    return ops.matmul(a, ops.add(v, w))


def _doubled(a: Tensor, w: Tensor) -> Tensor:
    """One product reaches a tensor's gradient twice."""
    return ops.matmul(ops.add(a, a), w)


def _residual_stream(a: Tensor, w: Tensor) -> Tensor:
    for _ in range(3):
        a = ops.add(a, ops.matmul(ops.relu(a), w))
    return a


def _lora(a: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    h = ops.matmul(a, down, transpose_b=True)
    return ops.matmul(a, weight, transpose_b=True, low_rank=(h, up, 2.0))


def embeddings() -> list[Case]:
    def gather(ids: Tensor, *pages: Tensor) -> Tensor:
        return ops.embedding(ids, pages)

    def learn(ids: Tensor, order: Tensor, *pages: Tensor) -> Tensor:
        return ops.embedding(ids, pages, order)

    cases = [
        Case(f"embedding-{dtype}", (below(60, 17), frozen(23, 33, dtype=dtype), frozen(37, 33, dtype=dtype)), gather)
        for dtype in ("f32", "bf16", "half")
    ]
    for name, tokens, pages in [
        ("one", 1, [(9, 5)]),
        ("repeats", 65, [(9, 33)]),
        ("pages", 40, [(13, 65), (1, 65), (30, 65)]),
    ]:
        ids = np.random.default_rng(3).integers(0, sum(rows for rows, _ in pages), tokens)
        fixed = [
            Input((tokens,), "input", "u32", lambda rng, shape, a=a: a) for a in (ids, np.argsort(ids, kind="stable"))
        ]
        cases += [
            Case(f"embedding-learn-{name}-{role}", (*fixed, *(Input(p, role) for p in pages)), learn)
            for role in ("param", "temp")
        ]
    return cases


def targets(tokens: int, vocabulary: int, ignored: float) -> Input:
    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        ids = rng.integers(0, vocabulary, shape)
        ids[rng.random(shape) < ignored] = ops.IGNORE
        return ids

    return Input((tokens,), "input", "i32", make)


def losses() -> list[Case]:
    """(tokens, width, pages, ignored share, smoothing, page dtype, tokens a chunk or None)."""
    table = {
        "one": (1, 4, [5], 0.0, 0.0, "f32", None),
        "plain": (17, 33, [65], 0.0, 0.0, "f32", None),
        "ignored": (33, 16, [31], 0.4, 0.0, "f32", None),
        "all-ignored": (5, 16, [31], 1.0, 0.1, "f32", None),
        "smoothed": (17, 24, [257], 0.3, 0.1, "f32", None),
        "pages": (15, 24, [31, 33, 1], 0.3, 0.1, "f32", None),
        "pages-of-fours": (15, 24, [32, 64, 4], 0.3, 0.0, "f32", None),
        "chunks": (19, 33, [65], 0.3, 0.0, "f32", 8),
        "chunks-smoothed": (65, 16, [80, 49], 0.3, 0.2, "f32", 64),
        "bf16": (17, 32, [33, 64], 0.2, 0.1, "bf16", None),
        "half": (17, 33, [33], 0.2, 0.0, "half", None),
    }
    cases = []
    for name, (tokens, width, pages, ignored, smoothing, dtype, chunk) in table.items():
        size = None if chunk is None else 4 * sum(pages) * chunk
        fixed = (x(tokens, width), targets(tokens, sum(pages), ignored))
        for role in ("weight", "param", "temp"):
            if (role != "weight" and dtype != "f32") or (role == "temp" and name not in ("one", "pages", "chunks")):
                continue
            tables = tuple(Input((rows, width), role, dtype) for rows in pages)
            apply = functools.partial(_cross_entropy, smoothing=smoothing)
            cases.append(Case(f"cross_entropy-{name}-{role}", (*fixed, *tables), apply, size))
    frozen_x = Input((17, 24), "input")
    tail = (targets(17, 65, 0.2), frozen(65, 24))
    for name, rows, role in [("fours", 64, "weight"), ("odd", 65, "weight"), ("odd", 65, "param")]:
        fixed = (x(17, 24), targets(17, rows, 0.2), Input((rows, 24), role))
        apply = functools.partial(_cross_entropy, smoothing=0.1, softcap=3.0)
        cases.append(Case(f"cross_entropy-softcap-{name}-{role}", fixed, apply))
    for name, role, tokens, size in [("adapter", "param", 17, None), ("rows", "weight", 19, 4 * 65 * 8)]:
        tables = tuple(Input((rows, 24), "weight") for rows in (31, 33, 1))
        inputs = (x(tokens, 24), targets(tokens, 65, 0.2), x(tokens, 3), Input((65, 3), role), *tables)
        cases.append(Case(f"cross_entropy-low-rank-{name}", inputs, _cross_entropy_low_rank, size))
    cases.append(Case("cross_entropy-evaluation", (frozen_x, *tail), functools.partial(_cross_entropy, smoothing=0.1)))
    for role in ("weight", "param"):
        fixed = (x(19, 33), targets(19, 65, 0.3), Input((19,), "input", make=positive), Input((65, 33), role))
        cases.append(Case(f"cross_entropy-weighted-{role}", fixed, _weighted_cross_entropy, 4 * 65 * 8))
    return cases


def _weighted_cross_entropy(a: Tensor, ids: Tensor, weights: Tensor, page: Tensor) -> Tensor:
    return ops.cross_entropy(a, ids, [page], 0.1, weights=weights)


def _cross_entropy(a: Tensor, ids: Tensor, *pages: Tensor, smoothing: float, softcap: float | None = None) -> Tensor:
    return ops.cross_entropy(a, ids, pages, smoothing, softcap=softcap)


def _cross_entropy_low_rank(a: Tensor, ids: Tensor, p: Tensor, q: Tensor, *pages: Tensor) -> Tensor:
    return ops.cross_entropy(a, ids, pages, 0.1, softcap=3.0, low_rank=(p, q))


def quantised() -> list[Case]:
    cases = []
    for name, shape, double, dtype in [
        ("single", (33, 64), False, "float32"),
        ("double", (96, 72), True, "float32"),
        ("odd", (5, 13), True, "bfloat16"),
        ("half", (17, 24), False, "float16"),
        ("transposed", (128, 64), True, "bfloat16"),
    ]:
        rng = np.random.default_rng(5)
        weight = nf4.Nf4Weight.from_dense(normal(rng, shape), double, dtype)
        arrays = host_parts(weight)
        kinds = {np.dtype(np.uint8): "u8", np.dtype(np.float32): "f32"}
        parts = tuple(Input(a.shape, "weight", kinds[a.dtype], lambda rng, s, a=a: a) for a in arrays)

        # f32 products take a weight whose sides are multiples of 64 transposed.
        op = "nf4_dequantize_transposed" if name == "transposed" else "nf4_dequantize"

        def apply(a: Tensor, *tensors: Tensor, shape: Any = shape, dtype: str = dtype) -> Tensor:
            return ops.linear(a, ops.Nf4Tensors(shape, tensors, dtype))

        cases.append(Case(f"{op}-{name}", (x(19, shape[1]), *parts), apply))
    return cases


CASES: dict[str, Case] = {
    case.name: case
    for family in (
        elementwise,
        reductions,
        views,
        norms,
        ropes,
        attentions,
        dropouts,
        matmuls,
        embeddings,
        losses,
        quantised,
    )
    for case in family()
}
