"""Rows of tables, one after the other: CSV as the standard library reads it, Parquet through pyarrow."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterator
from typing import Any, TextIO

from entrenar_gpu.data.lines import MOST_OF_LINE
from entrenar_gpu.data.opened import opened, suffix_of
from entrenar_gpu.errors import UserError

_ROWS_AT_ONCE = 256
# Columns that hold lists: a cell of text is their JSON.
_LISTS = (
    "messages",
    "conversations",
    "input_ids",
    "labels",
    "weights",
    "attention_mask",
    "completion_mask",
    "assistant_masks",
)


def read_csv(path: str) -> Iterator[dict[str, Any]]:
    """Records of a file with commas (.tsv: tabs) whose first line names the columns. An empty cell is None."""
    csv.field_size_limit(max(csv.field_size_limit(), MOST_OF_LINE))
    number = 0
    try:
        with opened(path) as stream:
            delimiter = "\t" if suffix_of(path).startswith(".tsv") else ","
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            reader = csv.reader(_lines(text), delimiter=delimiter, strict=True)
            names = _names(next(reader, []), delimiter, path)
            for cells in reader:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(names):
                    raise UserError(f"{path}: row {number}: {len(cells)} cells, but {len(names)} columns are named")
                yield {name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)}
    except UnicodeDecodeError:
        raise UserError(f"{path}: row {number + 1}: not UTF-8 text") from None
    except csv.Error as error:
        raise UserError(f"{path}: row {number + 1}: not valid CSV: {error}") from None


def _lines(stream: TextIO) -> Iterator[str]:
    """Lines of bounded length: a file without any must not be read whole."""
    while line := stream.readline(MOST_OF_LINE):
        if len(line) == MOST_OF_LINE:
            raise csv.Error(f"more than {MOST_OF_LINE >> 20} MiB in one line")
        yield line


def _names(header: list[str], delimiter: str, path: str) -> list[str]:
    names = [name.strip() for name in header]
    if not any(names):
        raise UserError(f"{path}: empty; the first line names the columns")
    other = next((each for each in ",;\t|" if each != delimiter and each in names[0]), None)
    if other is not None and len(names) == 1:
        raise UserError(
            f"{path}: one column, {names[0][:80]!r}; .csv has {','!r} between columns and .tsv {chr(9)!r}, this file"
            f" seems to have {other!r}"
        )
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise UserError(f"{path}: two columns are named {doubled!r}")
    return names


def _cell(name: str, cell: str) -> Any:
    if name in _LISTS and cell.lstrip()[:1] == "[":
        with contextlib.suppress(ValueError, RecursionError):  # what it is then is said by whoever wanted a list
            return json.loads(cell)
    return cell or None


def read_parquet(path: str) -> Iterator[dict[str, Any]]:
    """Records of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'entrenar-gpu[parquet]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # Of dates, which nothing is read from, some are beyond what Python has.
            read = [column.name for column in file.schema_arrow if not pyarrow.types.is_temporal(column.type)]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=read):
                for record in batch.to_pylist():
                    number += 1
                    yield {name: _cell(name, cell) if isinstance(cell, str) else cell for name, cell in record.items()}
    except (pyarrow.ArrowException, ValueError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: row {number + 1}: not valid Parquet: {reason}") from None
