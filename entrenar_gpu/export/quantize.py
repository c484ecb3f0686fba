"""A model with its projections in NF4, in bitsandbytes' layout, which transformers loads without quantising."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from entrenar_gpu.dtypes import TORCH_NAMES
from entrenar_gpu.errors import UserError
from entrenar_gpu.export.hf_writer import carried_sources, copy_model_files, name_to_write, save_checkpoint
from entrenar_gpu.files import TensorSource
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.model import INDEX_FILE, SINGLE_FILE, HFCheckpoint, WeightSpec
from entrenar_gpu.quant import BLOCK, CODEBOOK, SCALE_BLOCK, Nf4Weight, StateDtype

STATE = "quant_state.bitsandbytes__nf4"


def quantize_model(checkpoint: HFCheckpoint, output: Path, double_quant: bool = True) -> None:
    """Write the model to `output` with NF4 projections; everything else stays in the dtype that it is stored in.

    `double_quant` quantises the block scales to 8 bits too. Raises UserError where the checkpoint is quantised already,
    or the folder holds a model.
    """
    if checkpoint.is_quantised:
        raise UserError(f"{checkpoint.folder}: its weights are quantised already")
    if any((output / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        raise UserError(f"--output: {output} already holds a model; choose another folder")
    made = lru_cache(maxsize=1)(partial(_quantised, checkpoint, double_quant))
    sources: list[TensorSource] = []
    for spec in checkpoint.config.weights:
        name = name_to_write(checkpoint, spec.name)
        if spec.kind == "projection":
            sources += _parts(name, spec, _dtype(checkpoint, spec), double_quant, partial(made, spec))
        else:
            dtype = checkpoint.info(spec.name).dtype
            sources.append(TensorSource(name, spec.shape, dtype, partial(checkpoint.f32, spec.name)))
    save_checkpoint(output, [*sources, *carried_sources(checkpoint)])
    dense = TORCH_NAMES[checkpoint.info(checkpoint.config.weights[0].name).dtype]
    described = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dense,
        "bnb_4bit_quant_storage": "uint8",
    }
    copy_model_files(checkpoint.folder, output, dense, checkpoint.config.tie_word_embeddings, described)


def _dtype(checkpoint: HFCheckpoint, spec: WeightSpec) -> StateDtype:
    return cast(StateDtype, TORCH_NAMES[checkpoint.info(spec.name).dtype])


def _quantised(checkpoint: HFCheckpoint, double_quant: bool, spec: WeightSpec) -> Nf4Weight:
    return Nf4Weight.from_dense(checkpoint.f32(spec.name), double_quant, _dtype(checkpoint, spec))


def _parts(
    weight_name: str, spec: WeightSpec, dtype: str, double: bool, made: Callable[[], Nf4Weight]
) -> Iterator[TensorSource]:
    """The tensors that stand for a weight: codes, scales, the two code books, and a description as JSON."""
    count = int(np.prod(spec.shape))
    blocks = ceil_div(count, BLOCK)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": list(spec.shape)}

    def part(name: str, shape: tuple[int, ...], kind: str, take: Callable[[Nf4Weight], Any]) -> TensorSource:
        return TensorSource(f"{weight_name}{name}", shape, kind, lambda: np.asarray(take(made())).reshape(shape))

    yield part("", (ceil_div(count, 2), 1), "U8", lambda weight: weight.codes)
    yield part(".quant_map", (len(CODEBOOK),), "F32", lambda weight: CODEBOOK)
    if not double:
        yield part(".absmax", (blocks,), "F32", lambda weight: weight.absmax)
    else:
        yield part(".absmax", (blocks,), "U8", lambda weight: weight.absmax_codes)
        yield part(".nested_absmax", (ceil_div(blocks, SCALE_BLOCK),), "F32", lambda weight: weight.nested_absmax)
        yield part(".nested_quant_map", (256,), "F32", lambda weight: weight.nested_code)
        state |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32"}
    # The offset of the scales is known when the weight is; white space behind the JSON leaves room for it.
    length = len(json.dumps(state)) + 48

    def description(weight: Nf4Weight) -> np.ndarray:
        text = json.dumps(state | ({"nested_offset": weight.offset} if double else {}))
        return np.frombuffer(text.ljust(length).encode(), np.uint8)

    yield part(f".{STATE}", (length,), "U8", description)
