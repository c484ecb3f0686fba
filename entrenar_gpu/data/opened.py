"""Files of rows opened as bytes, those that gzip has packed unpacked as they are read."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from entrenar_gpu.errors import UserError

_UNPACKED = (".jsonl", ".json", ".csv", ".tsv")
# What a file of rows may end in, the likeliest first.
SUFFIXES = (*_UNPACKED, ".parquet", *(f"{suffix}.gz" for suffix in _UNPACKED))
_OTHERS = (".zst", ".bz2", ".xz", ".zip", ".tar", ".7z", ".lz4")


def suffix_of(path: str | Path) -> str:
    """What says how a file is read, in small letters; of one that gzip packed, with `.gz` behind."""
    ends = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    return "".join(ends) if ends[-1:] == [".gz"] else "".join(ends[-1:])


def refuse_other_packing(path: Path) -> None:
    """Raise UserError for a file that another program packed than gzip."""
    if path.suffix.lower() in _OTHERS or suffix_of(path) == ".parquet.gz":
        raise UserError(f"{path}: packed; of packed files {', '.join(SUFFIXES[-len(_UNPACKED) :])} are read, unpack it")


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The file's bytes. Raises UserError naming it where it, or what gzip made of it, cannot be read."""
    packed = suffix_of(path).endswith(".gz")
    try:
        with cast(BinaryIO, gzip.open(path)) if packed else open(path, "rb") as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
