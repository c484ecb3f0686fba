"""What a fresh adapter starts from."""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import numpy as np

from entrenar_gpu.adapters.lora import AdapterSpec
from entrenar_gpu.quant import Floats


def init_adapter(spec: AdapterSpec, seed: int, kind: Literal["kaiming", "gaussian"] = "kaiming") -> dict[str, Floats]:
    """Fresh adapter tensors: B zero; A from U(-1/sqrt(in), 1/sqrt(in)) ("kaiming", with a = sqrt(5)) or N(0, 1/rank^2).

    Each A depends on the seed and its own name only, so that adding a module does not change the others.
    """
    tensors: dict[str, Floats] = {}
    for name, shape in spec.shapes().items():
        if name.endswith("lora_B.weight"):
            tensors[name] = np.zeros(shape, np.float32)
            continue
        words = np.frombuffer(hashlib.sha256(name.encode()).digest(), "<u4")
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *words.tolist()])))
        if kind == "kaiming":
            bound = np.float32(1 / math.sqrt(shape[1]))
            tensors[name] = (2 * rng.random(shape, np.float32) - 1) * bound
        else:
            tensors[name] = rng.standard_normal(shape, np.float32) * np.float32(1 / shape[0])
    return tensors
