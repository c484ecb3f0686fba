"""What an element of a tensor is: its size, its types in WGSL and NumPy, and what files call it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class DType:
    """`nbytes` in a storage buffer; the names in safetensors (`stored`) and in `config.json` (`torch`), if any."""

    nbytes: int
    wgsl: str
    numpy: np.dtype[Any]
    stored: str | None = None
    torch: str | None = None


# Kernels read bf16, half (IEEE binary16 as stored, which needs no f16 feature) and u8 packed in u32, and widen them
# exactly; f16 is WGSL's own type, for devices that have it.
DTYPES = {
    "f32": DType(4, "f32", np.dtype(np.float32), "F32", "float32"),
    "f16": DType(2, "f16", np.dtype(np.float16)),
    "half": DType(2, "u32", np.dtype(np.float16), "F16", "float16"),
    "bf16": DType(2, "u32", np.dtype(ml_dtypes.bfloat16), "BF16", "bfloat16"),
    "u32": DType(4, "u32", np.dtype(np.uint32), "U32"),
    "i32": DType(4, "i32", np.dtype(np.int32), "I32"),
    "u8": DType(1, "u32", np.dtype(np.uint8), "U8"),
}
ELEMENT_BYTES = {name: dtype.nbytes for name, dtype in DTYPES.items()}
WGSL_TYPES = {name: dtype.wgsl for name, dtype in DTYPES.items()}
NUMPY_TYPES = {name: dtype.numpy for name, dtype in DTYPES.items()}
# The float types of checkpoints, by safetensors' name: ours, and torch's; and ours by torch's.
STORED_FLOATS = {d.stored: name for name, d in DTYPES.items() if d.stored is not None and d.torch is not None}
TORCH_NAMES = {d.stored: d.torch for d in DTYPES.values() if d.stored is not None and d.torch is not None}
TORCH_FLOATS = {d.torch: name for name, d in DTYPES.items() if d.torch is not None}
# Every type that a safetensors file may hold, and its name there by NumPy's type. Files are little-endian.
STORED_TYPES: dict[str, np.dtype[Any]] = {d.stored: d.numpy for d in DTYPES.values() if d.stored is not None} | {
    **{f"{kind}{8 * n}": np.dtype(f"<{kind.lower()}{n}") for kind in "IU" for n in (1, 2, 4, 8)},
    "F64": np.dtype("<f8"),
    "BOOL": np.dtype("?"),
}
STORED_NAMES = {dtype: name for name, dtype in STORED_TYPES.items()}
# What a NumPy array becomes as a tensor of a program.
ARRAY_TYPES = {d.numpy: name for name, d in DTYPES.items() if name in ("f32", "u32", "i32")}
ARRAY_TYPES |= {np.dtype(np.float64): "f32", np.dtype(np.int64): "i32"}
