"""Dropout and noise: each element's draw is a pure function of (seed, step, micro-batch, node, element)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, literal
from entrenar_gpu.ops.elementwise import elementwise_launch
from entrenar_gpu.ops.registry import GradientContext, Gradients, Op, Placement, Spec, record, register, same_as

# Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC'11), section 3.3: Philox4x32-10.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def dropout(x: Tensor, rng: Tensor, probability: float, key: int) -> Tensor:
    """x / (1 - p) where kept, 0 where dropped with probability p.

    rng u32 [3] holds seed, step and micro-batch; `key` tells the dropouts of one graph apart. Recomputation, the
    NumPy executor and a resumed run see the same mask.
    """
    return record("dropout", x=x, rng=rng, probability=probability, key=key)[0]


def uniform_noise(x: Tensor, magnitude: Tensor, rng: Tensor, key: int) -> Tensor:
    """x [T, D] with noise added to each element, uniform in [-m, m) for the m of its row: magnitude f32 [T].

    rng and `key` as in `dropout`; the gradient passes as it is. NEFTune (Jain et al., arXiv 2310.05914, algorithm 1)
    adds it to embeddings, with m = alpha / sqrt(L D) for a sample of L tokens.
    """
    return record("uniform_noise", x=x, magnitude=magnitude, rng=rng, key=key)[0]


def philox(counter: Sequence[np.ndarray | int], key: tuple[int, int]) -> list[np.ndarray]:
    """The four u32 words of Philox4x32-10 for a counter of four words (arrays broadcast) and a key of two."""
    c = [np.asarray(word, np.uint64) for word in counter]
    k = list(key)
    for _ in range(_ROUNDS):
        p0, p1 = c[0] * np.uint64(_MULTIPLIERS[0]), c[2] * np.uint64(_MULTIPLIERS[1])
        low = np.uint64(0xFFFFFFFF)
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = [high1 ^ c[1] ^ np.uint64(k[0]), p1 & low, high0 ^ c[3] ^ np.uint64(k[1]), p0 & low]
        k = [(k[0] + _WEYL[0]) & 0xFFFFFFFF, (k[1] + _WEYL[1]) & 0xFFFFFFFF]
    return [word.astype(np.uint32) for word in c]


def _threshold(probability: float) -> int:
    """An element is dropped where its random word is below this."""
    return min(round(probability * 2**32), 2**32 - 1)


def _words(node: Node, x: np.ndarray, rng: np.ndarray) -> np.ndarray:
    """The random word of each element."""
    seed, step, micro = (int(word) for word in rng)
    return philox([np.arange(x.size), node.attrs["key"], step, micro], (seed, 0))[0]


def _word(node: Node) -> str:
    return f"philox(vec4<u32>(i, {node.attrs['key']}u, in_rng[1], in_rng[2]), in_rng[0])"


def _reference(node: Node, x: np.ndarray, rng: np.ndarray) -> Sequence[np.ndarray]:
    word = _words(node, x, rng)
    keep = (word >= _threshold(node.attrs["probability"])).reshape(x.shape)
    return [np.where(keep, x * x.dtype.type(1 / (1 - node.attrs["probability"])), x.dtype.type(0))]


def _source() -> str:
    # 32 x 32 -> 64 bit products from 16-bit halves: WGSL has no wide multiply
    return f"""
fn multiply_high(a: u32, b: u32) -> u32 {{
  let al = a & 0xffffu; let ah = a >> 16u; let bl = b & 0xffffu; let bh = b >> 16u;
  let middle = ah * bl + ((al * bl) >> 16u);
  let other = al * bh + (middle & 0xffffu);
  return ah * bh + (middle >> 16u) + (other >> 16u);
}}
fn philox(start: vec4<u32>, seed: u32) -> u32 {{
  var c = start;
  var k = vec2<u32>(seed, 0u);
  for (var round = 0u; round < {_ROUNDS}u; round++) {{
    c = vec4<u32>(
      multiply_high(c.z, {_MULTIPLIERS[1]}u) ^ c.y ^ k.x, c.z * {_MULTIPLIERS[1]}u,
      multiply_high(c.x, {_MULTIPLIERS[0]}u) ^ c.w ^ k.y, c.x * {_MULTIPLIERS[0]}u);
    k += vec2<u32>({_WEYL[0]}u, {_WEYL[1]}u);
  }}
  return c.x;
}}
"""


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    p = node.attrs["probability"]
    kept = f"select(0.0, x * {literal(1 / (1 - p))}, {_word(node)} >= {_threshold(p)}u)"
    return elementwise_launch(node, caps, placed, [kept], _source())


def _gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
    return {"x": record("dropout", x=upstream[0], rng=node.inputs["rng"], **node.attrs)[0]}


register(
    Op(
        "dropout",
        same_as("x"),
        _reference,
        _launch,
        _gradient,
        flops=lambda node: 100 * node.output.size,
        inplace=lambda node: [(0, "x")],
    )
)


def _noise_infer(node: Node) -> Sequence[Spec]:
    x, magnitude = node.inputs["x"], node.inputs["magnitude"]
    if magnitude.size != x.rows:
        raise ValueError(f"{node.label()}: {magnitude!r} does not have a value for each row of {x!r}")
    return [(x.shape, x.dtype)]


def _noise_reference(node: Node, x: np.ndarray, magnitude: np.ndarray, rng: np.ndarray) -> Sequence[np.ndarray]:
    unit = (_words(node, x, rng) >> np.uint32(8)).astype(x.dtype) * x.dtype.type(2.0**-23) - 1  # 24 bits: exact in f32
    return [x + unit.reshape(x.shape) * magnitude.reshape(*x.shape[:-1], 1)]


def _noise_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    unit = f"(f32({_word(node)} >> 8u) * {literal(2.0**-23)} - 1.0)"
    return elementwise_launch(node, caps, placed, [f"x + {unit} * magnitude"], _source(), by_row=["magnitude"])


register(
    Op(
        "uniform_noise",
        _noise_infer,
        _noise_reference,
        _noise_launch,
        lambda node, upstream, context: {"x": upstream[0]},
        flops=lambda node: 100 * node.output.size,
        inplace=lambda node: [(0, "x")],
    )
)
