"""Data that a program hands over: paths, objects in memory, arrays of tokens, iterators, data sets of `datasets`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from entrenar_gpu.data.rows import RowsInMemory, RowSource
from entrenar_gpu.data.sources import find_sources
from entrenar_gpu.errors import UserError

# Rows that an iterable of unknown length may have where nobody said how many steps to take.
MOST_ROWS = 1_000_000


class Stream:
    """Rows that come one by one, maybe without end: read as steps need them. `again` where they can be begun anew."""

    def __init__(self, rows: Iterable[Any], name: str) -> None:
        self.name, self._rows = name, rows
        self.again = iter(rows) is not rows

    def source(self) -> RowSource:
        return RowsInMemory(self._rows, self.name)

    def to_the_end(self) -> list[list[RowSource]]:
        """All rows as one source. Raises UserError, when it is read, where they do not seem to end."""
        return [[RowsInMemory(_Bounded(self._rows, self.name), self.name)]]


class _Bounded:
    def __init__(self, rows: Iterable[Any], name: str) -> None:
        self._rows, self._name = rows, name

    def __iter__(self) -> Iterator[Any]:
        for number, row in enumerate(self._rows):
            if number == MOST_ROWS:
                raise UserError(f"{self._name}: no end after {MOST_ROWS:,} rows; say how many --steps to take")
            yield row


def given_sources(data: Any, name: str, seq: int, split: str | None = None) -> list[list[RowSource]] | Stream:
    """The sources that `data` stands for, which an argument called `name` was given.

    A path, or a list of paths; rows as mappings, or arrays of token ids, in anything that can be gone through; one long
    array of token ids, which is cut into rows of `seq`. What has no length is a Stream. Raises UserError.
    """
    if isinstance(data, (str, os.PathLike)):
        return [find_sources(os.fspath(data), "train" if name == "data" else "valid", split, name)]
    if isinstance(data, (list, tuple)) and data and all(isinstance(part, (str, os.PathLike)) for part in data):
        return [found for part in data for found in _sources(given_sources(part, name, seq, split))]
    if isinstance(data, Mapping):
        raise UserError(
            f"{name}: a mapping of {', '.join(map(repr, list(data)[:3]))}, not rows; give one of its values"
        )
    if getattr(data, "ndim", None) == 1:
        return [[RowsInMemory(_cut(data, seq), name)]]
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not hasattr(data, "__iter__"):
        return [[RowsInMemory(_Indexed(data), name)]]
    if not isinstance(data, Iterable) or isinstance(data, bytes):
        raise UserError(f"{name}: neither a path nor rows, but of type {type(data).__name__}")
    return [[RowsInMemory(data, name)]] if hasattr(data, "__len__") else Stream(data, name)


def paths_of(data: Any) -> list[str]:
    """The paths that `data` is; none where it holds rows."""
    parts = data if isinstance(data, (list, tuple)) else [data]
    return [os.fspath(part) for part in parts] if all(isinstance(part, (str, os.PathLike)) for part in parts) else []


def _sources(found: list[list[RowSource]] | Stream) -> list[list[RowSource]]:
    assert not isinstance(found, Stream)
    return found


def _cut(tokens: Any, seq: int) -> Sequence[Any]:
    return [tokens[at : at + seq] for at in range(0, len(tokens), seq)]


class _Indexed:
    """What has a length and items, as a data set of torch has."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return (self._items[i] for i in range(len(self._items)))
