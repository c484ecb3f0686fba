"""A decoder whose logits follow from the whole sequence before them, so that a wrong cache shows in the next token."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entrenar_gpu.ops import NOT_FINITE


class FakeDecoder:
    """Keeps the tokens themselves in its slots. Checks what it is asked for, and counts it.

    Logits lean on the last token, so that texts repeat themselves and drafts are sometimes right, and every earlier
    token and the adapter move them a little.
    """

    def __init__(self, slots: int = 4, context: int = 64, vocabulary: int = 32, adapters: Sequence[str] = ()) -> None:
        self.slots, self.context, self.vocabulary = slots, context, vocabulary
        self.adapters = {None, *adapters}
        self.adapter: str | None = None
        self.held: list[list[tuple[int, str | None]]] = [[] for _ in range(slots)]
        self.calls: list[dict[int, int]] = []  # new tokens by slot of each `extend`
        self.copied: list[int] = []
        self.closed = False

    @property
    def lengths(self) -> list[int]:
        return [len(held) for held in self.held]

    def extend(
        self, batch: Mapping[int, Sequence[int]], all_logits: bool = False, prompt: bool | None = None
    ) -> dict[int, np.ndarray]:
        assert batch, "an empty batch"
        result = {}
        for slot, ids in batch.items():
            assert ids, f"slot {slot}: no tokens"
            assert all(0 <= i < self.vocabulary for i in ids)
            assert len(self.held[slot]) + len(ids) <= self.context, "beyond the context"
            rows = []
            for token in ids:
                self.held[slot].append((token, self.adapter))
                rows.append(self.logits(self.held[slot]))
            result[slot] = np.stack(rows if all_logits else rows[-1:])
        self.calls.append({slot: len(ids) for slot, ids in batch.items()})
        return result

    def likeliest(
        self, batch: Mapping[int, Sequence[int]], every: bool = False, prompt: bool | None = None
    ) -> dict[int, list[int]]:
        found = self.extend(batch, every, prompt)
        return {
            slot: [int(np.argmax(row)) if np.isfinite(row.max()) else NOT_FINITE for row in rows]
            for slot, rows in found.items()
        }

    def logits(self, held: Sequence[tuple[int, str | None]]) -> np.ndarray:
        near = _noise([held[-1][0]], held[-1][1], self.vocabulary)
        far = _noise([t for t, _ in held], str([a for _, a in held]), self.vocabulary)
        return (4 * near + 0.5 * far).astype(np.float32)

    def truncate(self, slot: int, length: int) -> None:
        assert length <= len(self.held[slot])
        del self.held[slot][length:]

    def copy(self, source: int, target: int, length: int) -> None:
        assert source != target
        assert length <= len(self.held[source])
        self.copied.append(length)
        self.held[target] = self.held[source][:length]

    def set_adapter(self, name: str | None) -> None:
        assert name in self.adapters
        self.adapter = name

    def close(self) -> None:
        self.closed = True


def _noise(tokens: Sequence[int], word: Any, size: int) -> np.ndarray:
    digest = hashlib.blake2b(struct.pack(f"{len(tokens)}I", *tokens) + str(word).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(size)
