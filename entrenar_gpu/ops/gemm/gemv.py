"""x W^T for a few rows x, from W as it is stored: NF4 codes and scales, or rows in f32, bf16 or half.

What a token costs is reading the weights once, so each is read where it lies and no copy is made. A row's sums have
one order, told by the sizes of W alone (`shaders/gemm/gemv.wgsl`): its result is the same, bit for bit, whatever
other rows are multiplied beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from entrenar_gpu.graph import Binding, Caps, Launch, Node, Tensor, literal, reads, split_offset, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.activations import GATES
from entrenar_gpu.ops.embedding import shard_starts
from entrenar_gpu.ops.quantize import Nf4Tensors, codebook_text, dequantized, scale_bindings
from entrenar_gpu.ops.registry import OPS, Op, Placement, Spec, record, register
from entrenar_gpu.quant import nf4

THREADS = 128
MOST_ROWS = 8  # of x that share one reading of W
MOST_HELD = 4  # of these that are read before the first is multiplied: a read takes longer than its products
MOST_AHEAD = 3  # steps under way with one or two rows of x
MOST_CHAINS, PARTS = 32, 8  # of the sum of a row of W: see the shader


def gemv(
    x: Tensor,
    weight: Nf4Tensors | Sequence[Tensor],
    alpha: float = 1.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """alpha x W^T + bias + residual, f32 [T, N], of x f32 [T, K] and a frozen W [N, K].

    W is NF4, or shards of rows one after the other in f32, bf16 or half; bias f32 [N]; residual f32 [T, N].
    """
    if isinstance(weight, Nf4Tensors):
        attrs = {"shape": weight.shape, "rounded": weight.rounded}
        return record("gemv", x=x, nf4=[*weight.parts], bias=bias, residual=residual, alpha=alpha, **attrs)[0]
    return record("gemv", x=x, shards=list(weight), bias=bias, residual=residual, alpha=alpha)[0]


def _shape(node: Node) -> tuple[int, int]:
    """N, K of the weight."""
    shards = node.group("shards")
    return (sum(s.shape[0] for s in shards), shards[0].columns) if shards else node.attrs["shape"]


def _infer(node: Node) -> Sequence[Spec]:
    x, bias, residual, (n, k) = node.inputs["x"], node.inputs.get("bias"), node.inputs.get("residual"), _shape(node)
    if x.columns != k:
        raise ValueError(f"{node.label()}: inner lengths of {x!r} and weight {[n, k]} differ")
    if (bias is not None and bias.size != n) or (residual is not None and residual.size != x.rows * n):
        raise ValueError(f"{node.label()}: {bias!r} or {residual!r} does not fit [{x.rows}, {n}]")
    return [((*x.shape[:-1], n), "f32")]


def _reference(
    node: Node,
    x: np.ndarray,
    nf4: Sequence[np.ndarray] = (),
    shards: Sequence[np.ndarray] = (),
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> Sequence[np.ndarray]:
    weight = dequantized(node.attrs, nf4) if nf4 else shards[0] if len(shards) == 1 else np.concatenate(shards)
    out = x.dtype.type(node.attrs["alpha"]) * (x.reshape(-1, x.shape[-1]) @ weight.astype(x.dtype).T)
    for added in (bias, residual):
        if added is not None:
            out = out + added.reshape(-1, out.shape[1])
    return [out.reshape(node.output.shape)]


@dataclass(frozen=True)
class _Stored:
    """How a row of W lies: STEP values are read at once, WORDS words of them."""

    step: int
    words: int


def _stored(k: int, dtype: str) -> _Stored:
    """The widest reading, of at most 16 bytes, that whole rows are made of."""
    per_word = {"u8": 8, "f32": 1}.get(dtype, 2)  # u8: a byte of NF4 holds two codes
    widest = 2 if dtype == "u8" else 4
    words = next((w for w in (4, 2, 1) if w <= widest and k % (w * per_word) == 0), 0)
    return _Stored(words * per_word, words) if words else _Stored(1, 1)


def _blocking(t: int, k: int, stored: _Stored, caps: Caps) -> dict[str, int]:
    """The constants of a kernel. Of these STEP, CHAINS and PARTS decide how a row is summed, and follow from K.

    A lane for each chain. With few rows of x latency counts: several steps are under way. With more it is reading
    x: two rows of W share a reading, and several rows of x are read before the first is multiplied.
    """
    steps = k // stored.step
    chains = min(1 << max(steps.bit_length() - 1, 0), PARTS if caps.software else MOST_CHAINS)
    rows = min(1 << (t - 1).bit_length(), 4 if caps.software else MOST_ROWS)  # more take long to compile there
    sizes = {"T": t, "K": k, "ROWS": rows, "CHAINS": chains, "PARTS": min(chains, PARTS), "THREADS": THREADS}
    few = rows <= 2
    sizes |= {"LANES": chains, "COLUMNS": 1 if few else 2}
    if caps.software:
        return sizes | {"AHEAD": 1, "HELD": 1}
    return sizes | {"AHEAD": min(MOST_AHEAD, ceil_div(steps, chains)) if few else 1, "HELD": min(rows, MOST_HELD)}


@dataclass(frozen=True)
class _Part:
    """Rows of a weight that a launch multiplies by, and what becomes of the sums.

    `name` ends the names of its bindings. `start` is the column of `out` that the first row makes, of `columns`.
    """

    name: str
    stored: Sequence[Tensor]
    rows: int
    rounded: str
    out: Tensor | None
    start: int = 0
    columns: int = 0
    bias: Tensor | None = None
    residual: Tensor | None = None

    @property
    def is_nf4(self) -> bool:
        return len(self.stored) > 1

    def bindings(self, words: int, own: bool) -> list[Binding]:
        """`own`: the residual lies where the output does."""
        first, *scales = scale_bindings(self.stored) if self.is_nf4 else [reads("weight", self.stored[0])]
        made = [replace(first, vector=words), *scales]
        made += [reads("bias", self.bias)] if self.bias is not None else []
        made += [reads("residual", self.residual)] if self.residual is not None and not own else []
        if self.out is not None:
            made.append(writes("out", self.out, 1, split_offset(self.start, self.out)[0]))
        return [replace(binding, name=binding.name + self.name) for binding in made]

    def constants(self, own: bool) -> dict[str, Any]:
        left = split_offset(self.start, self.out)[1] if self.out is not None else 0
        added = [f"bias{self.name}[{self.start}u + n]"] if self.bias is not None else []
        if self.residual is not None:
            added.append(f"out{self.name}[{left}u + at]" if own else f"residual{self.name}[{self.start}u + at]")
        sizes = {"name": self.name, "N": self.rows, "ALL": self.columns, "START": left}
        return sizes | {"added": added, "rounded": self.rounded, "double": len(self.stored) == 4}


def _workgroup_bytes(blocking: dict[str, int], gate: str | None) -> int:
    """Of the sums that lanes leave for each other, and the codebook."""
    sums = blocking["ROWS"] * blocking["COLUMNS"] * (2 if gate else 1)
    return 4 * (sums * (blocking["THREADS"] + 1) + nf4.CODEBOOK.size)


def _launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    n, codes, rounded = _shape(node)[0], node.group("nf4"), node.attrs.get("rounded", "float32")
    bias, residual = node.inputs.get("bias"), node.inputs.get("residual")
    stored = [(codes, 0, n)] if codes else []
    shards = node.group("shards")
    stored += [((shard,), start, shard.shape[0]) for shard, start in zip(shards, shard_starts(shards), strict=True)]
    parts = [_Part("", held, rows, rounded, node.output, at, n, bias, residual) for held, at, rows in stored]
    return [_parts_launch(node.inputs["x"], [part], node.attrs["alpha"], None, caps, placed) for part in parts]


def _parts_launch(
    x: Tensor, parts: Sequence[_Part], alpha: float, gate: str | None, caps: Caps, placed: Placement
) -> Launch:
    """One launch for parts that are stored alike; with a `gate`, of two that make one output."""
    k, first = x.columns, parts[0]
    stored = _stored(k, first.stored[0].dtype)
    blocking = _blocking(x.rows, k, stored, caps)
    while blocking["COLUMNS"] > 1 and _workgroup_bytes(blocking, gate) > caps.max_workgroup_bytes:
        blocking["COLUMNS"] //= 2  # which no sum depends on
    across = blocking["THREADS"] // blocking["LANES"] * blocking["COLUMNS"]
    bindings = [reads("x", x, 4 if stored.step % 4 == 0 else 1)]
    weights, groups = [], 0
    for part in parts:
        own = part.residual is not None and part.out is not None and placed.aliased(part.out, part.residual)
        count = ceil_div(part.rows, across)
        bindings += part.bindings(stored.words, own)
        weights.append(part.constants(own) | {"FIRST": groups, "GROUPS": count})
        groups = count if gate else groups + count
    functions, expression = GATES[gate] if gate else ("", "")
    constants = {
        **blocking,
        "STEP": stored.step,
        "WORDS": stored.words,
        "kind": "nf4" if first.is_nf4 else first.stored[0].dtype,
        "codebook": codebook_text(),
        "software": caps.software,
        "alpha": "" if alpha == 1.0 else literal(alpha),
        "weights": weights,
        "gate": expression,
        "functions": functions,
    }
    folds = ceil_div(groups, caps.max_workgroups)
    grid = (ceil_div(groups, folds), folds, ceil_div(x.rows, blocking["ROWS"]))
    return Launch("gemv", tuple(bindings), constants, grid, trusted=True)


def _flops(node: Node) -> int:
    return 2 * node.inputs["x"].rows * math.prod(_shape(node))


# --- several weights at once


def merged_gemv(nodes: Sequence[Node], gate: Node | None = None) -> Node:
    """A node that makes the outputs of gemv of one x, or of a gate that follows two of them, in one launch."""
    inputs: dict[str, Tensor] = {"x": nodes[0].inputs["x"]}
    for number, node in enumerate(nodes):
        stored = node.group("nf4") or node.group("shards")
        inputs |= {f"w{number}.{i}": t for i, t in enumerate(stored)}
        inputs |= {f"{name}{number}": node.inputs[name] for name in ("bias", "residual") if name in node.inputs}
    attrs: dict[str, Any] = {"rounded": tuple(node.attrs.get("rounded", "float32") for node in nodes)}
    attrs |= {"shapes": tuple(_shape(node) for node in nodes)} | ({"gate": gate.op} if gate is not None else {})
    last = gate if gate is not None else nodes[-1]
    outputs = last.outputs if gate is not None else tuple(node.output for node in nodes)
    return Node("gemv_group", inputs, attrs, outputs, last.scope, last.layer, last.phase)


def can_merge(node: Node) -> bool:
    """Whether a node is a gemv that others may join: of one piece, nothing scaled."""
    return node.op == "gemv" and node.attrs["alpha"] == 1.0 and len(node.group("shards")) < 2


def alike(one: Node, other: Node) -> bool:
    """Whether two gemv multiply one x by weights that are stored alike, of one inner length."""
    held = [(node.group("nf4") or node.group("shards"))[0].dtype for node in (one, other)]
    return (
        one.inputs["x"] is other.inputs["x"]
        and held[0] == held[1]
        and bool(one.group("nf4")) == bool(other.group("nf4"))
    )


def bindings_of(node: Node) -> int:
    """How many buffers a merged node binds at most."""
    return len(node.inputs) + len(node.outputs)


def _merged_infer(node: Node) -> Sequence[Spec]:
    made = [((*node.inputs["x"].shape[:-1], n), "f32") for n, _ in node.attrs["shapes"]]
    return made[:1] if "gate" in node.attrs else made


def _merged_reference(node: Node, x: np.ndarray, **named: Any) -> Sequence[np.ndarray]:
    outs = []
    for number, (shape, rounded) in enumerate(zip(node.attrs["shapes"], node.attrs["rounded"], strict=True)):
        parts = named[f"w{number}"]
        weight = dequantized({"shape": shape, "rounded": rounded}, parts) if len(parts) > 1 else parts[0]
        out = x.reshape(-1, x.shape[-1]) @ weight.astype(x.dtype).T
        for name in ("bias", "residual"):
            if f"{name}{number}" in named:
                out = out + named[f"{name}{number}"].reshape(-1, out.shape[1])
        outs.append(out.reshape(*x.shape[:-1], shape[0]))
    if "gate" in node.attrs:
        return OPS[node.attrs["gate"]].reference(node, *outs)
    return outs


def _merged_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    gate, parts = node.attrs.get("gate"), []
    for number, ((n, _), rounded) in enumerate(zip(node.attrs["shapes"], node.attrs["rounded"], strict=True)):
        out = node.outputs[number] if gate is None else node.output if number == 0 else None
        name = f"_{number}" if gate is None or number else ""
        bias, residual = node.inputs.get(f"bias{number}"), node.inputs.get(f"residual{number}")
        parts.append(_Part(name, node.group(f"w{number}"), n, rounded, out, 0, n, bias, residual))
    return [_parts_launch(node.inputs["x"], parts, 1.0, gate, caps, placed)]


register(
    Op(
        "gemv_group",
        _merged_infer,
        _merged_reference,
        _merged_launch,
        flops=lambda node: sum(2 * node.inputs["x"].rows * n * k for n, k in node.attrs["shapes"]),
    )
)


register(
    Op(
        "gemv",
        _infer,
        _reference,
        _launch,
        flops=_flops,
        inplace=lambda node: [(0, "residual")] if "residual" in node.inputs else [],
    )
)
