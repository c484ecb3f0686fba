"""A random BF16 checkpoint of a known model's shape: `python -m benchmarks.random_checkpoint qwen3-4b FOLDER`.

Sharded safetensors with an index and a config.json, as on the Hub, but no tokenizer. Values repeat after a few million:
what loads and quantises weights does not care, and fresh ones would take longer to draw than to write.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from entrenar_gpu.config import SHAPES
from entrenar_gpu.export import SHARD_BYTES, save_checkpoint
from entrenar_gpu.files import TensorSource, write_text
from entrenar_gpu.model import parse_model_config

SPREAD = 0.02  # standard deviation, as models are initialised


def make_checkpoint(raw: dict[str, Any], folder: Path, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write a checkpoint of a config.json's shape; returns its files. Memory stays at the largest tensor."""
    sources = [
        TensorSource(spec.name, spec.shape, "BF16", partial(_values, spec.shape, spec.kind == "norm"))
        for spec in parse_model_config(raw).weights
    ]
    written = save_checkpoint(folder, sources, shard_bytes)
    write_text(folder / "config.json", json.dumps({**raw, "torch_dtype": "bfloat16"}, indent=2) + "\n")
    return written


def _values(shape: tuple[int, ...], norm: bool) -> np.ndarray:
    if norm:
        return np.ones(shape, ml_dtypes.bfloat16)
    deviates = _deviates()
    return np.resize(np.roll(deviates, -math.prod(shape) % deviates.size), shape)


@functools.cache
def _deviates() -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(3_000_017, dtype=np.float32) * np.float32(SPREAD)
    return values.astype(ml_dtypes.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    for path in make_checkpoint(SHAPES[args.shape], args.folder):
        print(f"{path}  {path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
