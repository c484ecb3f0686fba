"""What a fresh LoRA adapter starts from."""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import numpy as np

from entrenar_gpu.adapters.lora.module import LoraModule
from entrenar_gpu.adapters.lora.tables import LoraEmbedding
from entrenar_gpu.quant import Floats


def fresh_values(module: LoraModule, seed: int, kind: Literal["kaiming", "gaussian"]) -> dict[str, Floats]:
    """B zero; A from U(-1/sqrt(in), 1/sqrt(in)) ("kaiming", with a = sqrt(5)) or N(0, 1/rank^2).

    Of an embedding A is zero and B from N(0, 1), as in PEFT: the gradient of A has rows for tokens that occur alone.

    Each A depends on the seed and its own name only, so that adding a module does not change the others.
    """
    words = np.frombuffer(hashlib.sha256(module.a_name.encode()).digest(), "<u4")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *words.tolist()])))
    shape = (module.rank, module.in_features)
    if isinstance(module, LoraEmbedding):
        b = rng.standard_normal((module.out_features, module.rank), np.float32)
        return {module.a_name: np.zeros(shape, np.float32), module.b_name: b}
    if kind == "kaiming":
        bound = np.float32(1 / math.sqrt(module.in_features))
        a = (2 * rng.random(shape, np.float32) - 1) * bound
    else:
        a = rng.standard_normal(shape, np.float32) * np.float32(1 / module.rank)
    return {module.a_name: a, module.b_name: np.zeros((module.out_features, module.rank), np.float32)}
