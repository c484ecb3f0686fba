"""Weights that loading has quantised, kept so that the next start reads 4.1 bits a parameter and computes nothing.

One safetensors file for a model folder and a kind of quantisation, in a folder of their own (`cache_folder`, or
--cache-dir). Its metadata names what it was made from: project version, quantisation, and name, size and time of last
change of every file of the checkpoint. Where one of them differs, or a tensor's CRC-32 does, it is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from entrenar_gpu import __version__
from entrenar_gpu.dtypes import NUMPY_TYPES, STORED_NAMES
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import SafetensorsFile, TensorSource, cache_folder, cannot_write, new_file, write_tensors
from entrenar_gpu.gpu import THREADS
from entrenar_gpu.graph import Tensor
from entrenar_gpu.model import HFCheckpoint

LAYOUT = "1"  # of the tensors in the file, and of the arithmetic that made them
FILES = f"nf4-{'[0-9a-f]' * 24}.safetensors"  # nothing else in the folder is touched
LARGEST_BYTES = 64 << 30  # of all files together; the ones used longest ago go first
CHECKSUMS = "crc32"  # the tensor that holds them, as u32, in the order of the others' names
ABANDONED_SECONDS = 24 * 3600.0

Tensors = Mapping[str, Tensor]


class WeightCache:
    """The place of one checkpoint's quantised weights."""

    def __init__(self, checkpoint: HFCheckpoint, double_quant: bool, folder: str | Path | None = None) -> None:
        """`folder` is where cache files are, by default the system's."""
        self.folder = Path(folder) if folder is not None else cache_folder() / "weights"
        sources = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files()]
        self._made_from = {
            "version": __version__,
            "layout": LAYOUT,
            "quantisation": "nf4, double" if double_quant else "nf4",
            "sources": json.dumps(sources),
        }
        place = f"{checkpoint.folder.resolve()} {self._made_from['quantisation']}"
        self.path = self.folder / f"nf4-{hashlib.sha256(place.encode()).hexdigest()[:24]}.safetensors"

    def open(self, wanted: Tensors) -> SafetensorsFile | None:
        """The file, if it was made from this checkpoint and holds just these tensors undamaged.

        None where it has to be made. Raises UserError when there is no room for it then.
        """
        file = self._valid(wanted)
        if file is not None:
            with contextlib.suppress(OSError):  # a folder that may only be read serves as well
                os.utime(self.path)  # says that it is in use
            return file
        self._make_room(sum(tensor.nbytes for tensor in wanted.values()))
        return None

    def write(self, tensors: Tensors, read: Callable[[str], np.ndarray]) -> None:
        """Keep tensors, read from the executor one after the other. Raises UserError when the disk is full."""
        sums: dict[str, int] = {}

        def produce(name: str) -> np.ndarray:
            values = read(name)
            sums[name] = zlib.crc32(values.data)
            return values

        sources = [
            TensorSource(name, tensor.shape, STORED_NAMES[NUMPY_TYPES[tensor.dtype]], partial(produce, name))
            for name, tensor in tensors.items()
        ]
        # The last of the narrowest type comes last in the file: when its turn comes, all sums are known.
        sources.append(TensorSource(CHECKSUMS, (4 * len(sources),), "U8", lambda: _packed(sums)))
        with new_file(self.path) as stream:
            write_tensors(stream, sources, self._made_from)

    def _valid(self, wanted: Tensors) -> SafetensorsFile | None:
        if not self.path.exists():
            return None
        try:
            file = SafetensorsFile(self.path)
        except UserError:
            return None
        shapes = {name: (tensor.shape, STORED_NAMES[NUMPY_TYPES[tensor.dtype]]) for name, tensor in wanted.items()}
        shapes[CHECKSUMS] = ((4 * len(wanted),), "U8")
        if file.metadata != self._made_from or {n: (i.shape, i.dtype) for n, i in file.tensors.items()} != shapes:
            return None
        with ThreadPoolExecutor(THREADS) as threads:
            sums = dict(zip(wanted, threads.map(lambda name: zlib.crc32(file[name].data), wanted), strict=True))
        return file if np.array_equal(file[CHECKSUMS], _packed(sums)) else None

    def _make_room(self, nbytes: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another start removes the same files, and makes the room
                self._remove_files(nbytes)
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        free = shutil.disk_usage(self.folder).free
        if free < nbytes:
            need, have = nbytes / 2**30, free / 2**30
            raise UserError(
                f"--cache: {self.folder} needs {need:.2f} GiB and its disk has {have:.2f} left;"
                " choose another folder with --cache-dir, or leave --cache out"
            )

    def _remove_files(self, nbytes: int) -> None:
        """Remove what a crash left, what is to be made again, and, past LARGEST_BYTES, what was used longest ago."""
        for left in self.folder.glob(f".{FILES}.*.tmp"):
            if left.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                left.unlink()
        self.path.unlink(missing_ok=True)
        total = nbytes
        for path in sorted(self.folder.glob(FILES), key=lambda p: p.stat().st_mtime, reverse=True):
            total += path.stat().st_size
            if total > LARGEST_BYTES:
                path.unlink()


def _packed(sums: Mapping[str, int]) -> np.ndarray:
    return np.array([sums[name] for name in sorted(sums)], "<u4").view(np.uint8)
