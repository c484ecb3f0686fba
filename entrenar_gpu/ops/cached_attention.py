"""Attention of new tokens to the keys and values that a cache keeps, and how these come into the cache.

A cache has a row, called slot, for each sequence. The tokens of a pass may belong to any slots and stand at any
positions there: T tokens are T rows, each with its slot and its position, and none is ever computed otherwise for what
else is in the pass. Rows that fill up a pass have a slot that the cache does not have: they write nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, grid_of, literal, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.elementwise import copy_launch
from entrenar_gpu.ops.registry import Op, Placement, Spec, in_place, record, register

THREADS = 128
SPLIT = 64  # keys that are attended to at once; sums go from one such run to the next, in order
HEADS_AT_ONCE = 8  # query heads of one key/value head that a workgroup takes
KEY_SHARE = 4  # neighbours that share a key
BLOCK_ROWS, BLOCK_KEYS = 64, 32  # a prompt's rows, a token's head each, and keys that meet at once
SPLIT_ROWS = 16  # up to so many tokens the runs of keys go to workgroups of their own: few heads leave a GPU idle


def cache_write(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """keys[slots[t], positions[t]] = k[t], and so for values: caches [B, S, W] of f32 or f16, k and v f32 [T, W].

    slots and positions u32 [T]; a token whose slot or position the cache does not have is left out. The caches are
    overwritten in place, and the results stand for them from then on.
    """
    made = record("cache_write", keys=keys, values=values, k=k, v=v, slots=slots, positions=positions)
    return in_place(made[0], keys), in_place(made[1], values)


def _write_infer(node: Node) -> Sequence[Spec]:
    keys, values, k, v, slots, positions = node.inputs.values()
    if keys.shape != values.shape or len(keys.shape) != 3 or k.shape != v.shape or k.columns != keys.columns:
        raise ValueError(f"{node.label()}: {k!r} and {v!r} are no rows of {keys!r} and {values!r}")
    if slots.size != k.rows or positions.size != k.rows:
        raise ValueError(f"{node.label()}: {slots!r} and {positions!r} do not name the places of {k!r}")
    return [(keys.shape, keys.dtype), (values.shape, values.dtype)]


def _write_reference(
    node: Node,
    keys: np.ndarray,
    values: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    slots: np.ndarray,
    positions: np.ndarray,
) -> Sequence[np.ndarray]:
    there = (slots < keys.shape[0]) & (positions < keys.shape[1])
    for cache, rows in ((keys, k), (values, v)):  # as large as a cache is, it is written where it lies
        cache[slots[there], positions[there]] = rows.reshape(-1, cache.shape[-1])[there]
    return [keys, values]


def _write_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    keys, values, k, v, slots, positions = node.inputs.values()
    copies = [
        copy_launch(source, output, caps)
        for source, output in zip((keys, values), node.outputs, strict=True)
        if not placed.aliased(output, source)
    ]
    width = 4 if k.columns % 4 == 0 else 1
    constants = {
        "T": k.rows,
        "WIDTH": k.columns // width,
        "SLOTS": keys.shape[0],
        "CONTEXT": keys.shape[1],
        "element": f"vec{width}<{keys.dtype}>" if width > 1 else keys.dtype,
    }
    bindings = [reads("k", k, width), reads("v", v, width), reads("slots", slots), reads("positions", positions)]
    bindings += [writes("keys", node.outputs[0], width), writes("values", node.outputs[1], width)]
    grid = grid_of(ceil_div(k.size // width, 64), caps)
    return [*copies, Launch("cache_write", tuple(bindings), constants, grid, trusted=True)]


register(
    Op(
        "cache_write",
        _write_infer,
        _write_reference,
        _write_launch,
        flops=lambda node: 0,
        inplace=lambda node: [(0, "keys"), (1, "values")],
    )
)


def cached_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    heads: int,
    kv_heads: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    low_precision: bool = False,
) -> Tensor:
    """softmax(scale q k^T) v, where token t sees the keys of its slot up to its own position.

    q [T, H*E]; keys and values [B, S, K*E] in f32 or f16; slots and positions u32 [T]. Returns f32 [T, H*E]; zeros
    where the cache has no such slot. `scale`, `window` and `softcap` as for `attention`. With `low_precision` queries
    may be read as f16, as a prompt's are: tokens then share a reading of keys.

    Keys are taken in runs of SPLIT, counted from position 0, and the runs' sums put together in their order (online
    softmax, Milakov & Gimelshein, arXiv 1805.02867), in one workgroup or in several (Dao et al., Flash-Decoding): a
    token's result has one order of sums, whatever else is in the pass.
    """
    return record(
        "cached_attention",
        q=q,
        keys=keys,
        values=values,
        slots=slots,
        positions=positions,
        heads=heads,
        kv_heads=kv_heads,
        scale=scale,
        window=window,
        softcap=softcap,
        low_precision=low_precision,
    )[0]


def _sizes(node: Node) -> dict[str, int]:
    """T tokens, H query and K key/value heads of E, of which each of the latter serves GROUP."""
    q, keys, heads, kv_heads = node.inputs["q"], node.inputs["keys"], node.attrs["heads"], node.attrs["kv_heads"]
    sizes = {"T": q.rows, "H": heads, "K": kv_heads, "E": q.columns // heads, "GROUP": heads // kv_heads}
    return sizes | {"SLOTS": keys.shape[0], "CONTEXT": keys.shape[1]}


def _infer(node: Node) -> Sequence[Spec]:
    q, keys, values, slots, positions = node.inputs.values()
    s = _sizes(node)
    whole = q.columns == s["H"] * s["E"] and keys.columns == s["K"] * s["E"] and s["H"] == s["K"] * s["GROUP"]
    if keys.shape != values.shape or not whole or not slots.size == positions.size == q.rows:
        raise ValueError(f"{node.label()}: {q!r}, {keys!r}, {values!r}, {slots!r}, {positions!r} do not fit {s}")
    return [(q.shape, "f32")]


def _reference(
    node: Node, q: np.ndarray, keys: np.ndarray, values: np.ndarray, slots: np.ndarray, positions: np.ndarray
) -> Sequence[np.ndarray]:
    s, attrs = _sizes(node), node.attrs
    rows, kind = q.reshape(s["T"], s["K"], s["GROUP"], s["E"]), q.dtype.type
    scale, out = kind(attrs.get("scale", 1 / math.sqrt(s["E"]))), np.zeros_like(rows)
    for t, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        if slot >= s["SLOTS"]:
            continue
        seen = slice(max(position + 1 - attrs.get("window", position + 1), 0), position + 1)
        k, v = (c[slot, seen].reshape(-1, s["K"], s["E"]).transpose(1, 0, 2).astype(q.dtype) for c in (keys, values))
        scores = rows[t] @ k.swapaxes(-1, -2) * scale
        if "softcap" in attrs:
            scores = kind(attrs["softcap"]) * np.tanh(scores / kind(attrs["softcap"]))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[t] = weights / weights.sum(axis=-1, keepdims=True) @ v
    return [out.reshape(q.shape)]


def _runs(node: Node, caps: Caps) -> int:
    """Runs of keys that have workgroups of their own; 0 where one workgroup goes through all of them."""
    runs = ceil_div(_sizes(node)["CONTEXT"], SPLIT)
    return runs if _sizes(node)["T"] <= SPLIT_ROWS and runs > 1 and not _block_bytes(node, caps) else 0


def _block_bytes(node: Node, caps: Caps) -> int:
    """Bytes of a workgroup of the kernel in which tokens share a reading of keys; 0 where that is not taken."""
    s = _sizes(node)
    fits = node.attrs["low_precision"] and node.inputs["keys"].dtype == "f16" and s["E"] % 4 == 0
    nbytes = 8 * (s["E"] // 4 * BLOCK_ROWS + BLOCK_KEYS * (s["E"] // 4 + 1 + BLOCK_ROWS // 4)) + 16 * 256
    return nbytes if fits and s["GROUP"] <= BLOCK_ROWS and nbytes <= caps.max_workgroup_bytes else 0


def _workspace(node: Node, caps: Caps) -> Sequence[Spec]:
    """Of each run: the sum of weighted values, then the peak of the scores and the sum of the weights."""
    s, runs = _sizes(node), _runs(node, caps)
    return [((s["T"], s["H"], runs, s["E"]), "f32"), ((s["T"], s["H"], runs, 2), "f32")] if runs else []


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    if _block_bytes(node, caps):
        return [_block_launch(node, caps)]
    s, runs, width = _sizes(node), _runs(node, caps), 4 if _sizes(node)["E"] % 4 == 0 else 1
    at_once = min(s["GROUP"], HEADS_AT_ONCE)
    lanes = min(1 << (s["E"] // width - 1).bit_length(), THREADS)
    held = 4 * (at_once * (s["E"] + 2 * SPLIT) + THREADS * width)  # bytes of a workgroup, but for shares
    fits = (caps.max_workgroup_bytes - held) // (4 * at_once * SPLIT)
    share = _most_that_divide(s["E"] // width, max(min(fits, KEY_SHARE), 1))
    constants: dict[str, Any] = {
        **s,
        **_score_constants(node),
        "VEC": width,
        "COLUMNS": s["E"] // width,
        "LANES": lanes,
        "HEADS": at_once,
        "PARTS": ceil_div(s["GROUP"], at_once),
        "SPLIT": SPLIT,
        "THREADS": THREADS,
        "RUNS": runs,
        # Loads under way at once: of a run's values by a piece, and of a key's columns.
        "AHEAD": 1 if caps.software else _most_that_divide(SPLIT * lanes // THREADS, 8),
        "SHARE": share,
        "AHEAD_KEYS": 1 if caps.software else _most_that_divide(s["E"] // width // share, 8),
    }
    bindings = [reads("q", node.inputs["q"], width)]
    bindings += [reads(name, node.inputs[name], width) for name in ("keys", "values")]
    bindings += [reads(name, node.inputs[name]) for name in ("slots", "positions")]
    groups = s["T"] * s["K"] * constants["PARTS"]
    if not runs:
        bindings.append(writes("out", node.output, width))
        return [Launch("cached_attention", tuple(bindings), constants, grid_of(groups, caps), trusted=True)]
    sums, weights = placed.workspace
    bindings += [writes("sums", sums, width), writes("weights", weights)]
    joined = (
        reads("sums", sums, width),
        reads("weights", weights),
        reads("slots", node.inputs["slots"]),
        reads("positions", node.inputs["positions"]),
        writes("out", node.output, width),
    )
    grid = grid_of(ceil_div(node.output.size // width, 64), caps)
    return [
        Launch("cached_attention", tuple(bindings), constants, (*grid_of(groups, caps)[:2], runs), trusted=True),
        Launch("cached_attention_join", joined, constants, grid, trusted=True),
    ]


def _score_constants(node: Node) -> dict[str, Any]:
    """Which keys are seen, and how scores come about, to the base 2."""
    scale = node.attrs.get("scale", 1 / math.sqrt(_sizes(node)["E"])) * math.log2(math.e)
    cap = node.attrs.get("softcap", 0.0) * math.log2(math.e)
    capped = {"cap": literal(cap) if cap else "", "inverse_cap": literal(1 / cap) if cap else ""}
    return {"WINDOW": node.attrs.get("window", 0), "scale": literal(scale), **capped}


def _block_launch(node: Node, caps: Caps) -> Launch:
    s = _sizes(node)
    tokens = BLOCK_ROWS // s["GROUP"]
    constants = {**s, **_score_constants(node), "ROWS": BLOCK_ROWS, "TOKENS": tokens, "BK": BLOCK_KEYS}
    bindings = [reads(name, node.inputs[name], 4) for name in ("q", "keys", "values")]
    bindings += [reads(name, node.inputs[name]) for name in ("slots", "positions")]
    bindings.append(writes("out", node.output, 4))
    grid = (s["K"], ceil_div(s["T"], tokens), 1)
    return Launch("cached_attention_block", tuple(bindings), constants, grid, trusted=True)


def _most_that_divide(whole: int, most: int) -> int:
    """The largest power of two up to `most` that divides `whole`."""
    return next(n for n in (8, 4, 2, 1) if n <= most and whole % n == 0)


def _flops(node: Node) -> int:
    """At most: of a full cache."""
    s = _sizes(node)
    return 4 * s["T"] * s["H"] * s["E"] * min(s["CONTEXT"], node.attrs.get("window", s["CONTEXT"]))


register(Op("cached_attention", _infer, _reference, _launch, workspace=_workspace, flops=_flops))
