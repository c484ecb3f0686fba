"""Where rows come from: JSON lines and arrays, tables, a data set of the Hub, objects in memory. All are read as they
are asked for, a few MiB at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from entrenar_gpu.data.json_array import ArrayElements
from entrenar_gpu.data.lines import BYTE_ORDER_MARK, Row, read_lines
from entrenar_gpu.data.opened import opened, refuse_other_packing, suffix_of
from entrenar_gpu.data.tables import read_csv, read_parquet
from entrenar_gpu.errors import UserError


class RowSource(Protocol):
    """Rows in order. `name` is what errors call it, `place` how they call a row by its number."""

    name: str

    def place(self, number: int) -> str: ...

    def __iter__(self) -> Iterator[Row]:
        """Raises UserError naming the place."""


class JsonFile:
    """A row per line, or the elements of one array, whichever the file holds."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._is_array = _begins_an_array(self.name)

    def place(self, number: int) -> str:
        return f"{self.name}: row {number}" if self._is_array else f"{self.name}:{number}"

    def __iter__(self) -> Iterator[Row]:
        with opened(self.name) as stream:
            yield from read_lines(ArrayElements(stream, self.place) if self._is_array else stream, self.place)


class TableFile:
    """A row per record of a CSV or Parquet file. Cells that are empty or NaN are null."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._read = read_parquet if suffix_of(path) == ".parquet" else read_csv

    def place(self, number: int) -> str:
        return f"{self.name}: row {number}"

    def __iter__(self) -> Iterator[Row]:
        try:
            for number, record in enumerate(self._read(self.name), 1):
                yield Row(number, without_nan(record))
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read: {error.strerror or error}") from None


class RowsInMemory:
    """Objects of the caller's: mappings, or sequences of token ids. `name` is the argument they came by."""

    def __init__(self, rows: Iterable[Any], name: str) -> None:
        self.name, self._rows = name, rows

    def place(self, number: int) -> str:
        return f"{self.name}[{number - 1}]"

    def __iter__(self) -> Iterator[Row]:
        for number, row in enumerate(self._rows, 1):
            if isinstance(row, Mapping):
                yield Row(number, without_nan(row))
            else:
                yield Row(number, {"input_ids": row} if _holds_ids(row) else row)


def open_file(path: Path) -> RowSource:
    """A file of rows by its suffix; what has none of SUFFIXES is read as JSON. Raises UserError for a pipe or a device:
    files are opened more than once."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: cannot be read: it is no file; write its rows into one first")
    refuse_other_packing(path)
    if suffix_of(path).removesuffix(".gz") in (".csv", ".tsv", ".parquet"):
        return TableFile(path)
    return JsonFile(path)


def without_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    """Tables write NaN where a cell is missing."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}


def plain(value: Any) -> Any:
    """A row of the caller's as JSON has it: arrays and tuples, at any depth, as lists of what they hold."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return list(value) if value and type(value[0]) is int else [plain(inner) for inner in value]
    return value


def _holds_ids(row: Any) -> bool:
    return isinstance(row, (list, tuple)) or hasattr(row, "tolist")


def _begins_an_array(path: str) -> bool:
    """Whether `[` comes first, and within it a row or nothing."""
    with opened(path) as stream:
        beginning = stream.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()
    return beginning[:1] == b"[" and beginning[1:].lstrip()[:1] in (b"{", b"]", b"")
