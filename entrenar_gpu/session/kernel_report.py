"""Which kernels a plan's attention, projections and head take, by what sets their layers apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from entrenar_gpu.compiler import Plan
from entrenar_gpu.graph import Node

_ATTENTION = ("attention", "attention_grad", "cached_attention")
_HEAD = ("cross_entropy", "cross_entropy_grad", "project")
_PRODUCTS = ("linear", "matmul", "gemv", "gemv_group", "gemv_gate")
_DEQUANTISE = "nf4_dequantize"  # ops whose names begin so make a weight dense for the product behind them


@dataclass
class _Use:
    """One kind of work: the layers that do it, and the shaders of each pass over them, in their order."""

    what: str
    variant: str
    layers: set[int] = field(default_factory=set)
    kernels: dict[str, list[str]] = field(default_factory=dict)

    def add(self, layer: int | None, phase: str, shaders: Iterator[str]) -> None:
        if layer is not None:
            self.layers.add(layer)
        held = self.kernels.setdefault(phase, [])
        held += [shader for shader in dict.fromkeys(shaders) if shader not in held]


def kernel_report(plan: Plan) -> list[dict[str, Any]]:
    """What takes which kernels: attention by variant, projections and head by arithmetic.

    `kernels` are the names of shaders by pass: forward and backward of training, prefill and decode of a decoder.
    """
    uses: dict[tuple[str, str], _Use] = {}
    for name, steps in plan.steps.items():
        for step in steps:
            if (described := _described(step.node)) is None:
                continue
            phase = _phase(name, step.node)
            use = uses.setdefault(described, _Use(*described))
            use.add(step.node.layer, phase, (launch.shader for launch in step.launches))
    order = ("attention", "projections", "adapters and gradients", "head")
    ordered = sorted(uses.values(), key=lambda use: order.index(use.what))
    return [{"what": u.what, "variant": u.variant, "layers": len(u.layers), "kernels": u.kernels} for u in ordered]


def _phase(graph: str, node: Node) -> str:
    kind = graph.partition(".")[0]
    return {"pass": "decode", "prompt": "prefill", "head": "prefill", "evaluate": "evaluation"}.get(kind, node.phase)


def _described(node: Node) -> tuple[str, str] | None:
    """What a node is for, and the variant of it."""
    if node.op in _ATTENTION:
        return "attention", _attention(node)
    if node.op in _HEAD or (node.op in _PRODUCTS and node.scope.endswith("lm_head")):
        return "head", node.attrs.get("arithmetic", "f32")
    dequantises = node.op.startswith(_DEQUANTISE)
    if (node.op in _PRODUCTS or dequantises) and node.layer is not None:
        arithmetic = node.attrs.get("arithmetic", "f32")
        made = any(t.node is not None and t.node.op.startswith(_DEQUANTISE) for t in node.inputs.values())
        if node.op == "linear" or dequantises or made or any(name.startswith("nf4") for name in node.inputs):
            return "projections", f"NF4, {arithmetic}"
        if any(tensor.role == "weight" for tensor in node.inputs.values()):
            return "projections", f"dense, {arithmetic}"
        return "adapters and gradients", arithmetic
    return None


def _attention(node: Node) -> str:
    values = node.inputs.get("q", node.inputs.get("out"))
    assert values is not None
    heads = node.attrs.get("heads")
    parts = [f"heads of {values.columns // heads}"] if heads else []
    parts += [f"window {node.attrs['window']}"] if node.attrs.get("window") else []
    parts += [f"soft cap {node.attrs['softcap']:g}"] if node.attrs.get("softcap") else []
    return ", ".join(parts)
