"""An adapter folded into its base model, tensor by tensor, as safetensors that transformers loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from entrenar_gpu.adapters import AdapterSpec, load_adapter
from entrenar_gpu.errors import UserError
from entrenar_gpu.export.hf_writer import copy_model_files, save_checkpoint
from entrenar_gpu.files import TensorSource
from entrenar_gpu.model import INDEX_FILE, SINGLE_FILE, HFCheckpoint, WeightSpec

Floats = np.ndarray
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def merge_adapter(checkpoint: HFCheckpoint, adapter: Path, output: Path) -> None:
    """Write W + scale * B A for every adapted W, the rest as it is, each in the dtype it is stored in.

    A checkpoint with NF4 weights is written in F32 throughout. Memory stays at the largest tensor.
    """
    spec, values = load_adapter(adapter, checkpoint.config)
    if any((output / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        raise UserError(f"--output: {output} already holds a model; choose another folder")
    weights = checkpoint.config.weights
    quantised = any(checkpoint.is_nf4(weight.name) for weight in weights)
    dtypes = ["F32" if quantised else checkpoint.info(weight.name).dtype for weight in weights]
    copy_model_files(checkpoint.folder, output, TORCH_NAMES[dtypes[0]])  # the embedding's
    sources = [_source(checkpoint, spec, values, *each) for each in zip(weights, dtypes, strict=True)]
    save_checkpoint(output, sources)


def _source(
    checkpoint: HFCheckpoint, adapters: AdapterSpec, values: dict[str, Floats], spec: WeightSpec, dtype: str
) -> TensorSource:
    def produce() -> Floats:
        weight = checkpoint.f32(spec.name)
        adapter = adapters.modules.get(spec.module) if spec.adaptable else None
        if adapter is not None:
            adapter.merge(weight, values)
        return weight

    return TensorSource(spec.name, spec.shape, dtype, produce)
