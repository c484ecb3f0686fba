"""The safetensors format: 8 bytes of header length, a JSON header, the tensors one after another.

Read by position, in parts where a tensor is large; written from a list of producers, so that a model never has to be in
memory as a whole. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from numpy.typing import NDArray

from entrenar_gpu.dtypes import STORED_TYPES
from entrenar_gpu.errors import UserError
from entrenar_gpu.files.stored import OpenFile, StoredArray

# The reference implementation's limit. A header this long would describe a million tensors.
LARGEST_HEADER = 100_000_000
# A tensor is described in at least 55 bytes, of which seven are brackets, braces or colons. What is denser would be
# gigabytes of Python objects.
SMALL_HEADER, BYTES_PER_MARK = 1 << 20, 6


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` in bytes from the beginning of `file`. `dtype` is the format's name for it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    nbytes: int


class SafetensorsFile:
    """One open file. `tensors` describes its tensors in the order they lie; `metadata` its strings."""

    def __init__(self, path: str | Path) -> None:
        """Open the file and check its whole header. Raises UserError naming the file, and the tensor at fault."""
        self.path = Path(path)
        self.open_file = OpenFile(self.path)
        header, data_start = _read_header(self.open_file)
        metadata = header.pop("__metadata__", {})
        self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
        self.tensors = _check_tensors(self.path, header, data_start, self.open_file.size)
        self._header_bytes = data_start

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A tensor, read whole. Raises UserError where the file has become shorter since it was opened."""
        return self.stored(name).read()

    def stored(self, name: str) -> StoredArray:
        """A tensor of which nothing is read before its elements are asked for."""
        info = self.tensors[name]
        if info.dtype not in STORED_TYPES:
            raise UserError(f"{self.path}: tensor {name!r}: dtype {info.dtype} is not supported")
        return StoredArray(self.open_file, info.start, info.shape, STORED_TYPES[info.dtype], f"tensor {name!r}")

    def header(self) -> bytes:
        """The bytes before the first tensor."""
        return self.open_file.read(0, self._header_bytes, "its header")

    def read_ahead(self, name: str) -> None:
        """Let the system read a tensor before it is asked for; where it takes no such advice, nothing."""
        info = self.tensors[name]
        self.open_file.read_ahead(info.start, info.nbytes)


def _read_header(file: OpenFile) -> tuple[dict[str, Any], int]:
    """The decoded header and the offset at which tensor data begins."""
    path, size = file.path, file.size
    length = int.from_bytes(file.read(0, min(size, 8), "its header"), "little")
    if size < 8 or length > LARGEST_HEADER or 8 + length > size:
        raise UserError(f"{path}: not a safetensors file, or cut off within its header ({size} bytes)")
    text = file.read(8, length, "its header")
    if length > SMALL_HEADER and sum(map(text.count, (b"[", b"{", b":"))) > length // BYTES_PER_MARK:
        raise UserError(f"{path}: not a safetensors file: its header holds more than descriptions of tensors")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
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
    if dtype in STORED_TYPES and nbytes != math.prod(shape) * STORED_TYPES[dtype].itemsize:
        raise UserError(f"{path}: tensor {name!r}: {nbytes} bytes do not hold {dtype} of shape {list(shape)}")
    return TensorInfo(path, tuple(shape), dtype, data_start + offsets[0], nbytes)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    """A short JSON list of whole numbers >= 0, small enough for any file."""
    return isinstance(value, list) and len(value) <= 64 and all(type(v) is int and 0 <= v < 2**63 for v in value)
