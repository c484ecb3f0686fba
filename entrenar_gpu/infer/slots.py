"""Which sequence lies in which slot of the key/value cache, and prefixes that a new one shares with what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

SHORTEST_SHARED = 8  # tokens; copying fewer saves nothing


class CachedDecoder(Protocol):
    """A model with a key/value cache of `slots` sequences of at most `context` tokens each."""

    @property
    def slots(self) -> int: ...

    @property
    def context(self) -> int: ...

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens in each slot."""

    def extend(
        self, batch: Mapping[int, Sequence[int]], all_logits: bool = False, prompt: bool | None = None
    ) -> dict[int, np.ndarray]:
        """Append tokens to slots; logits [1, V] of each slot's last token, or [n, V] of all of its new ones. `prompt`
        tells a prompt's tokens from others, which may be computed in another arithmetic."""

    def likeliest(
        self, batch: Mapping[int, Sequence[int]], every: bool = False, prompt: bool | None = None
    ) -> dict[int, list[int]]:
        """The same, but where those logits are largest, the first of equal ones, or NOT_FINITE."""

    def truncate(self, slot: int, length: int) -> None:
        """Forget what stands behind the first `length` tokens of a slot."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Make `target` hold the first `length` tokens of `source`."""

    def set_adapter(self, name: str | None) -> None:
        """The adapter that the next `extend` runs with; None for the base model."""

    def close(self) -> None: ...


@dataclass
class Slot:
    """What a slot holds: keys and values of `tokens`, computed with `adapter`."""

    number: int
    tokens: list[int] = field(default_factory=list)
    adapter: str | None = None
    taken: bool = False
    used: int = 0  # when it was last given back


class SlotTable:
    """Gives out slots. What an earlier sequence left in one is kept until the slot is needed.

    A new sequence takes over the longest prefix of its own tokens that any slot holds of the same adapter. So answers
    to one prompt share its prefill, a chat goes on where it stood, and prompts share their system message.
    """

    def __init__(self, decoder: CachedDecoder) -> None:
        self._decoder = decoder
        self._slots = [Slot(number) for number in range(decoder.slots)]
        self._clock = 0

    @property
    def free(self) -> int:
        return sum(not slot.taken for slot in self._slots)

    def take(self, tokens: Sequence[int], adapter: str | None) -> Slot:
        """A free slot that holds as long a prefix of `tokens` as there is, but never all: the last one's logits are
        still to be computed. Raises IndexError where none is free."""
        free = [slot for slot in self._slots if not slot.taken]
        if not free:
            raise IndexError("no free slot")
        shared = {slot.number: _shared(slot, tokens, adapter) for slot in self._slots}
        source = max(self._slots, key=lambda slot: (shared[slot.number], not slot.taken))
        length = shared[source.number]
        target = source
        if source.taken or length < max(SHORTEST_SHARED, len(source.tokens) // 2):  # too much would be forgotten
            target = min(free, key=lambda slot: (bool(slot.tokens), slot.used))
        if length < SHORTEST_SHARED:
            length = 0
        elif target is not source:
            self._decoder.copy(source.number, target.number, length)
        self._decoder.truncate(target.number, length)
        target.tokens, target.adapter, target.taken = list(tokens[:length]), adapter, True
        return target

    def give_back(self, slot: Slot) -> None:
        self._clock += 1
        slot.taken, slot.used = False, self._clock

    def forget_all(self) -> None:
        """Nothing that is in the slots is to be used again."""
        for slot in self._slots:
            slot.tokens = []


def _shared(slot: Slot, tokens: Sequence[int], adapter: str | None) -> int:
    """Length of the prefix of `tokens`, without the last, that a slot holds."""
    if slot.adapter != adapter:
        return 0
    most = min(len(slot.tokens), len(tokens) - 1)
    return next((n for n in range(most) if slot.tokens[n] != tokens[n]), most)
