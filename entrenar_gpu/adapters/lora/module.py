"""The LoRA adapter of one projection: what it trains, what it adds to the matmul, and what it merges into."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from entrenar_gpu import ops
from entrenar_gpu.graph import Tensor
from entrenar_gpu.model import ProjectionCall
from entrenar_gpu.quant import Floats


@dataclass(frozen=True)
class LoraModule:
    """`path` is the module's in the checkpoint, as in `model.layers.0.self_attn.q_proj`."""

    path: str
    in_features: int
    out_features: int
    rank: int
    alpha: float
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def a_name(self) -> str:
        return f"{self.path}.lora_A.weight"

    @property
    def b_name(self) -> str:
        return f"{self.path}.lora_B.weight"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the trained tensors, A before B."""
        return {self.a_name: (self.rank, self.in_features), self.b_name: (self.out_features, self.rank)}

    def apply(self, call: ProjectionCall) -> Tensor:
        """x W^T + scale * (x A^T) B^T + bias + residual, in one matmul; dropout takes elements of A's x alone."""
        a, b = (call.parameter(name, shape) for name, shape in self.shapes().items())
        if call.takes_lora:
            return call.record(lora=(a, b, self.scale))
        x = call.dropped(call.x) if call.dropped is not None else call.x
        return call.record(low_rank=(ops.matmul(x, a, transpose_b=True), b, self.scale))

    def merge(self, weight: Floats, values: Mapping[str, Floats]) -> None:
        """Add scale * B A to a weight [out, in], in place."""
        weight += np.float32(self.scale) * (values[self.b_name] @ values[self.a_name])
