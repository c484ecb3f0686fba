"""The safetensors format: 8 bytes of header length, a JSON header, the tensors one after another.

Read by memory map, so that a tensor costs address space until its pages are touched; written from a list of producers,
so that a model never has to be in memory as a whole. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from entrenar_gpu.errors import UserError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The reference implementation's limit. A header this long would describe a million tensors.
LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` in bytes from the beginning of `file`. `dtype` is the format's name for it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    nbytes: int


class SafetensorsFile:
    """One memory-mapped file. `tensors` describes its tensors in the order they lie; `metadata` its strings."""

    def __init__(self, path: str | Path) -> None:
        """Map the file and check its whole header. Raises UserError naming the file, and the tensor at fault."""
        self.path = Path(path)
        try:
            with open(self.path, "rb") as stream:
                size = stream.seek(0, 2)
                header, data_start = _read_header(self.path, stream, size)
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        metadata = header.pop("__metadata__", {})
        self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
        self.tensors = _check_tensors(self.path, header, data_start, size)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A read-only view of a tensor; nothing is read before its elements are."""
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise UserError(f"{self.path}: tensor {name!r}: dtype {info.dtype} is not supported")
        raw = np.frombuffer(self._map, np.uint8, info.nbytes, info.start)
        return raw.view(DTYPES[info.dtype]).reshape(info.shape)

    def read_ahead(self, name: str) -> None:
        """Let the system read a tensor before it is touched, in long runs; where it takes no such advice, nothing."""
        if hasattr(self._map, "madvise"):
            info = self.tensors[name]
            start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, info.start + info.nbytes - start)


def _read_header(path: Path, stream: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The decoded header and the offset at which tensor data begins."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > LARGEST_HEADER or 8 + length > size:
        raise UserError(f"{path}: not a safetensors file, or cut off within its header ({size} bytes)")
    try:
        header = json.loads(stream.read(length).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a safetensors file: its header is not valid JSON") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: not a safetensors file: its header is not a JSON object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _check_tensors(path: Path, header: dict[str, Any], data_start: int, size: int) -> dict[str, TensorInfo]:
    """Tensors by name, in file order. They must follow each other without gap or overlap up to the end of the file."""
    infos = {name: _check_entry(path, name, entry, data_start) for name, entry in header.items()}
    ordered = sorted(infos.items(), key=lambda item: (item[1].start, item[1].nbytes))
    end = data_start
    for name, info in ordered:
        if info.start != end:
            raise UserError(f"{path}: tensor {name!r} overlaps another or leaves a gap before it")
        end = info.start + info.nbytes
        if end > size:
            raise UserError(f"{path}: cut off: tensor {name!r} ends at byte {end:,}, the file at {size:,}")
    if end != size:
        raise UserError(f"{path}: {size - end:,} bytes follow its last tensor; the file is damaged")
    return dict(ordered)


def _check_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    bad = UserError(f"{path}: tensor {name!r}: malformed header entry")
    if not isinstance(entry, dict) or not isinstance(dtype := entry.get("dtype"), str):
        raise bad
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad
    nbytes = offsets[1] - offsets[0]
    if dtype in DTYPES and nbytes != math.prod(shape) * DTYPES[dtype].itemsize:
        raise UserError(f"{path}: tensor {name!r}: {nbytes} bytes do not hold {dtype} of shape {list(shape)}")
    return TensorInfo(path, tuple(shape), dtype, data_start + offsets[0], nbytes)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    """A short JSON list of whole numbers >= 0, small enough for any file."""
    return isinstance(value, list) and len(value) <= 64 and all(type(v) is int and 0 <= v < 2**63 for v in value)
