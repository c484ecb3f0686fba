"""An adapter folded into its base model, tensor by tensor, as safetensors that transformers loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from entrenar_gpu.adapters import AdapterSpec, load_adapter
from entrenar_gpu.errors import UserError
from entrenar_gpu.export.hf_writer import copy_model_files, save_checkpoint
from entrenar_gpu.files import TensorSource
from entrenar_gpu.model import INDEX_FILE, SINGLE_FILE, HFCheckpoint, is_projection

Floats = np.ndarray
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def merge_adapter(checkpoint: HFCheckpoint, adapter: Path, output: Path) -> None:
    """Write W + scale * B A for every adapted W, the rest as it is, each in the dtype it is stored in.

    A checkpoint with NF4 weights is written in F32 throughout. Memory stays at the largest tensor.
    """
    spec, values = load_adapter(adapter, checkpoint.config)
    if any((output / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        raise UserError(f"--output: {output} already holds a model; choose another folder")
    names = checkpoint.config.parameter_shapes()
    quantised = any(map(checkpoint.is_nf4, names))
    dtypes = {name: "F32" if quantised else checkpoint.info(name).dtype for name in names}
    copy_model_files(checkpoint.folder, output, TORCH_NAMES[dtypes["model.embed_tokens.weight"]])
    save_checkpoint(output, [_source(checkpoint, spec, values, name, dtype) for name, dtype in dtypes.items()])


def _source(
    checkpoint: HFCheckpoint, spec: AdapterSpec, values: dict[str, Floats], name: str, dtype: str
) -> TensorSource:
    def produce() -> Floats:
        weight = checkpoint.f32(name)
        lora = spec.modules.get(name.removesuffix(".weight")) if is_projection(name) else None
        if lora is not None:
            weight += np.float32(lora.scale) * (values[lora.b_name] @ values[lora.a_name])
        return weight

    return TensorSource(name, checkpoint.config.parameter_shapes()[name], dtype, produce)
