"""LoRA on the embedding and on the output head, in the tensors that PEFT has of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from entrenar_gpu import ops
from entrenar_gpu.adapters.lora.module import LoraModule
from entrenar_gpu.graph import Tensor
from entrenar_gpu.model import Head, HeadAdapter, TableCall
from entrenar_gpu.quant import Floats


@dataclass(frozen=True)
class LoraHead(LoraModule):
    """Of `lm_head`, [V, D]: logits x W^T + scale * (x A^T) B^T."""

    def head(self, call: TableCall) -> Head:
        a, b = (call.parameter(name, shape) for name, shape in self.shapes().items())
        return Head(call.base(), (a, b, self.scale))


@dataclass(frozen=True)
class LoraEmbedding(LoraModule):
    """Of `embed_tokens`, D values for each of V tokens: E[ids] + scale * A^T[ids] B^T, with A [R, V] and B [D, R].

    The names are PEFT's, who keeps these as parameters and not as weights of modules. A head that is tied to the
    embedding stays as it was, and no dropout is taken of ids.
    """

    @property
    def a_name(self) -> str:
        return f"{self.path}.lora_embedding_A"

    @property
    def b_name(self) -> str:
        return f"{self.path}.lora_embedding_B"

    @property
    def tied_head(self) -> HeadAdapter | None:
        return None

    def embedded(self, call: TableCall, ids: Tensor, order: Tensor | None) -> Tensor:
        a, b = (call.parameter(name, shape) for name, shape in self.shapes().items())
        p = ops.scale(ops.embedding(ids, [ops.transpose(a)], order), self.scale)
        return ops.matmul(p, b, transpose_b=True, residual=ops.embedding(ids, call.base()))

    def merge(self, weight: Floats, values: Mapping[str, Floats]) -> None:
        """Add scale * (B A)^T to an embedding [V, D], in place."""
        super().merge(weight.T, values)
