"""Tables that are trained themselves beside LoRA: a whole embedding or head, or the rows of chosen tokens.

PEFT's `modules_to_save` and `trainable_token_indices`, as its files have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from entrenar_gpu import ops
from entrenar_gpu.graph import Tensor
from entrenar_gpu.model import Head, HeadAdapter, TableCall
from entrenar_gpu.quant import Floats

Base = Callable[[], Floats]  # the rows that a table has in the model, f32 [V, D]


@dataclass(frozen=True)
class SavedTable:
    """The embedding or the head at `path`, in f32 and as a whole: an entry of `modules_to_save`.

    A head that is tied to the embedding becomes one of its own, and so stays as it was where the embedding is trained.
    """

    path: str
    rows: int
    columns: int

    @property
    def name(self) -> str:
        return f"{self.path}.modules_to_save.weight"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: (self.rows, self.columns)}

    def constants(self) -> dict[str, np.ndarray]:
        return {}

    def fresh(self, base: Base) -> dict[str, Floats]:
        return {self.name: base()}

    @property
    def tied_head(self) -> HeadAdapter | None:
        return None

    def embedded(self, call: TableCall, ids: Tensor, order: Tensor | None) -> Tensor:
        return ops.embedding(ids, call.trained_rows(self.name, (self.rows, self.columns)), order)

    def head(self, call: TableCall) -> Head:
        return Head(call.trained_rows(self.name, (self.rows, self.columns)))

    def merge(self, weight: Floats, values: Mapping[str, Floats]) -> None:
        weight[:] = values[self.name]


@dataclass(frozen=True)
class TrainedTokens:
    """The rows of some tokens at `path`: an entry of `trainable_token_indices`, whose file holds rows, not changes.

    In an embedding they stand behind the table's own rows, and ids are changed to find them (`looked_up`). In a head
    their logits are the table's and what the rows changed by: x W^T + (x (rows - W[tokens])^T) S^T, where S [V, n]
    says whose row is whose. A tied head has the embedding's rows.
    """

    path: str
    rows: int
    columns: int
    tokens: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.path}.token_adapter.trainable_tokens_delta"

    @property
    def _tokens_name(self) -> str:
        return f"{self.path}.token_adapter.tokens"

    @property
    def _selection_name(self) -> str:
        return f"{self.path}.token_adapter.selection"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: (len(self.tokens), self.columns)}

    def constants(self) -> dict[str, np.ndarray]:
        """What a head with these tokens is made with, by name."""
        selection = np.zeros((self.rows, len(self.tokens)), np.float32)
        selection[list(self.tokens), range(len(self.tokens))] = 1
        return {self._tokens_name: np.array(self.tokens, np.uint32), self._selection_name: selection}

    def fresh(self, base: Base) -> dict[str, Floats]:
        return {self.name: base()[list(self.tokens)]}

    def looked_up(self, ids: np.ndarray) -> np.ndarray:
        """Ids in the embedding with these rows behind its own."""
        places = np.arange(self.rows, dtype=np.uint32)
        places[list(self.tokens)] = self.rows + np.arange(len(self.tokens))
        return places[ids]

    @property
    def tied_head(self) -> HeadAdapter | None:
        return self

    def embedded(self, call: TableCall, ids: Tensor, order: Tensor | None) -> Tensor:
        return ops.embedding(ids, [*call.base(), self._rows(call)], order)

    def head(self, call: TableCall) -> Head:
        base, count = call.base(), len(self.tokens)
        before = ops.embedding(call.constant(self._tokens_name, (count,), "u32"), base)
        selection = call.constant(self._selection_name, (self.rows, count))
        return Head(base, (ops.sub(self._rows(call), before), selection, 1.0))

    def _rows(self, call: TableCall) -> Tensor:
        return call.parameter(self.name, (len(self.tokens), self.columns))

    def merge(self, weight: Floats, values: Mapping[str, Floats]) -> None:
        weight[list(self.tokens)] = values[self.name]
