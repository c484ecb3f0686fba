"""What one weight of a model is: the description that everything else reads instead of looking at names and shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# embedding, head: tables [V, D] over the vocabulary, kept in shards of rows   projection: a linear map [out, in] in a
# layer, NF4 with `--method qlora`   norm, bias: vectors, always f32 and without weight decay
Kind = Literal["embedding", "projection", "norm", "bias", "head"]


@dataclass(frozen=True)
class WeightSpec:
    """A weight by its name in the checkpoint. `adaptable`: an adapter may be added to its module."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    adaptable: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """The module that the weight belongs to, as in `model.layers.0.self_attn.q_proj`."""
        return self.name.rpartition(".")[0]

    @property
    def is_table(self) -> bool:
        return self.kind in ("embedding", "head")
