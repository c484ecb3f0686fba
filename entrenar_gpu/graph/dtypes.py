"""What an element of a tensor is: its size, and its type in WGSL and in NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np

# Bytes an element takes in a storage buffer. Kernels read bf16, half (IEEE binary16 as stored, which needs no f16
# feature) and u8 packed in u32, and widen them exactly; f16 is WGSL's own type, for devices that have it.
ELEMENT_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "half": 2, "u32": 4, "i32": 4, "u8": 1}
WGSL_TYPES = {"f32": "f32", "f16": "f16", "bf16": "u32", "half": "u32", "u32": "u32", "i32": "i32", "u8": "u32"}


NUMPY_TYPES: dict[str, np.dtype] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "half": np.dtype(np.float16),
    "u32": np.dtype(np.uint32),
    "i32": np.dtype(np.int32),
    "u8": np.dtype(np.uint8),
}
