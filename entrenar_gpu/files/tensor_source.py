"""Tensors to be written as safetensors, each made when its turn comes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar_gpu.dtypes import STORED_NAMES, STORED_TYPES
from entrenar_gpu.files.atomic import new_file
from entrenar_gpu.files.checksums import SummedStream


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written: `produce` is called once, when its turn comes, and its result dropped after."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    produce: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * STORED_TYPES[self.dtype].itemsize


def write_tensors(stream: SummedStream, sources: Sequence[TensorSource], metadata: Mapping[str, str]) -> None:
    """Write a whole safetensors file to a stream. `produce` must return `shape`; it is converted to `dtype`.

    Wider types come first, so that every tensor is aligned to its element.
    """
    ordered = sorted(sources, key=lambda source: -STORED_TYPES[source.dtype].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for source in ordered:
        header[source.name] = {
            "dtype": source.dtype,
            "shape": list(source.shape),
            "data_offsets": [start, start + source.nbytes],
        }
        start += source.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for source in ordered:
        array = source.produce()
        if array.shape != source.shape:
            raise ValueError(f"{source.name}: announced as {source.shape}, produced as {array.shape}")
        stream.begin(source.name)
        converted = np.ascontiguousarray(array, dtype=STORED_TYPES[source.dtype])
        stream.write(converted.reshape(-1).view(np.uint8).data)


def save_safetensors(
    path: str | Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays that are in memory, each in its own dtype. Raises UserError, with nothing written, when it fails."""
    sources = [
        TensorSource(name, array.shape, STORED_NAMES[array.dtype], lambda array=array: array)  # type: ignore[misc]
        for name, array in tensors.items()
    ]
    with new_file(path) as stream:
        write_tensors(stream, sources, metadata or {})
