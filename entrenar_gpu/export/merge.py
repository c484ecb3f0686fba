"""An adapter folded into its base model, tensor by tensor, as safetensors that transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from entrenar_gpu.adapters import AdapterSpec, load_adapter, trained_base
from entrenar_gpu.config import path_text
from entrenar_gpu.dtypes import TORCH_NAMES
from entrenar_gpu.errors import UserError
from entrenar_gpu.export.hf_writer import carried_sources, copy_model_files, name_to_write, save_checkpoint
from entrenar_gpu.files import FolderLock, TensorSource, sweep
from entrenar_gpu.model import INDEX_FILE, SINGLE_FILE, HFCheckpoint, WeightSpec, resolve_model
from entrenar_gpu.quant import Nf4Weight

Floats = np.ndarray
MERGED = "merged_adapters"  # key in the metadata of merged files: checksums of the adapters in them, comma between


def merge_model(model: str | Path, adapter: str | Path, output: str | Path, base: str = "stored") -> list[str]:
    """Merge the model of a folder or Hub id as `merge_adapter` does; returns what is worth knowing of it.

    `base` is "stored", or "nf4" for the NF4 form of the weights.
    """
    for name, folder in (("--adapter", adapter), ("--output", output)):
        if not path_text(folder, name):  # the current one, to Path
            raise UserError(f"{name}: missing; name a folder")
    if base not in ("stored", "nf4"):
        raise UserError(f"--base: {base!r} is not one of stored, nf4")
    trained = trained_base(adapter)
    double_quant = None if base == "stored" else trained is None or trained.double_quant
    checkpoint = HFCheckpoint.open(resolve_model(model))
    if Path(output).resolve() == Path(adapter).resolve():
        raise UserError(f"--output: {output} holds the adapter; choose another folder")
    with FolderLock(Path(output)):
        sweep(Path(output))
        merge_adapter(checkpoint, Path(adapter), Path(output), double_quant)
    notes = [*checkpoint.notes, *load_adapter(adapter, checkpoint.config)[0].notes]
    if base == "stored" and trained is not None and trained.method == "qlora" and not checkpoint.is_quantised:
        notes.append(
            f"{trained.source}: the adapter was trained on the NF4 form of them; --base nf4 folds it into that"
        )
    return notes


def merge_adapter(checkpoint: HFCheckpoint, adapter: Path, output: Path, double_quant: bool | None = None) -> None:
    """Write W + scale * B A for every adapted W, the rest as it is, each in the dtype it is stored in.

    With `double_quant` (true or false) projections pass through NF4 first, as a QLoRA run trains on them; such a
    model, and a checkpoint with NF4 weights, is written in F32 throughout. Memory stays at the largest tensor. Raises
    UserError naming the tensor that is not finite, or is not once rounded to its dtype.
    """
    spec, values = load_adapter(adapter, checkpoint.config)
    if any((output / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        raise UserError(f"--output: {output} already holds a model; choose another folder")
    marks = _marks(checkpoint, adapter, values)
    model, unties = checkpoint.config, spec.unties(checkpoint.config)
    weights = [*model.weights, *(model.tables[1:] if unties else ())]  # of a tied model, a head that is so no more
    in_f32 = checkpoint.is_quantised or double_quant is not None
    dtypes = ["F32" if in_f32 else checkpoint.info(model.stored_as(weight)).dtype for weight in weights]
    merging = _Merging(checkpoint, spec, values, double_quant)
    merged = [merging.source(*each) for each in zip(weights, dtypes, strict=True)]
    save_checkpoint(output, [*merged, *carried_sources(checkpoint)], metadata={MERGED: ",".join(marks)})
    copy_model_files(checkpoint.folder, output, TORCH_NAMES[dtypes[0]], model.tie_word_embeddings and not unties)


def merged_weight(checkpoint: HFCheckpoint, adapter: Path, double_quant: bool | None) -> Callable[[WeightSpec], Floats]:
    """What makes each weight of the model in float32, with the adapter folded in as `merge_adapter` does.

    Raises UserError for an adapter that gives a tied model a head of its own.
    """
    spec, values = load_adapter(adapter, checkpoint.config)
    if spec.unties(checkpoint.config):
        what = f"{', '.join(spec.tables)} differs from what the model ties it to; merge into a model folder first"
        raise UserError(f"{adapter}: {what}")
    _marks(checkpoint, adapter, values)
    return _Merging(checkpoint, spec, values, double_quant).value


def _marks(checkpoint: HFCheckpoint, adapter: Path, values: Mapping[str, Floats]) -> list[str]:
    """Checksums of the adapters that the model will have in it. Raises UserError where this one is in it already."""
    there = [mark for file in checkpoint.opened() for mark in str(file.metadata.get(MERGED, "")).split(",") if mark]
    digest = xxhash.xxh3_128()
    for name in sorted(values):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values[name], np.float32).tobytes())
    if digest.hexdigest() in there:
        raise UserError(f"--model: {checkpoint.folder} has the adapter {adapter} merged into it already")
    return list(dict.fromkeys([*there, digest.hexdigest()]))


class Merges(Protocol):
    """What is folded into one weight."""

    def merge(self, weight: Floats, values: Mapping[str, Floats]) -> None: ...


@dataclass(frozen=True)
class _Merging:
    """Where merged weights come from."""

    checkpoint: HFCheckpoint
    adapters: AdapterSpec
    values: dict[str, Floats]
    double_quant: bool | None

    def source(self, spec: WeightSpec, dtype: str) -> TensorSource:
        return TensorSource(
            name_to_write(self.checkpoint, spec.name), spec.shape, dtype, partial(self._produce, spec, dtype)
        )

    def _produce(self, spec: WeightSpec, dtype: str) -> Floats:
        weight = self.value(spec)
        with np.errstate(over="ignore"):
            stored = weight.astype(np.float16) if dtype == "F16" else weight
        if not np.isfinite(stored).all():
            file = self.checkpoint.info(self.checkpoint.config.stored_as(spec)).file
            merged = " merged with the adapter" if self._adapter(spec) is not None else ""
            raise UserError(f"{file}: tensor {spec.name!r}{merged} holds numbers that are not finite in {dtype}")
        return weight

    def value(self, spec: WeightSpec) -> Floats:
        """The weight in float32, merged where it has an adapter."""
        weight, adapter = self._base(spec), self._adapter(spec)
        if adapter is not None:
            adapter.merge(weight, self.values)
        return weight

    def _adapter(self, spec: WeightSpec) -> Merges | None:
        if spec.is_table:
            return self.adapters.tables.get(spec.module)
        return self.adapters.modules.get(spec.module) if spec.adaptable else None

    def _base(self, spec: WeightSpec) -> Floats:
        weight = self.checkpoint.f32(self.checkpoint.config.stored_as(spec))
        stays = self.checkpoint.is_quantised  # as it is: NF4 already, or left out by whoever quantised the checkpoint
        if self.double_quant is None or stays or spec.kind != "projection":
            return weight
        return Nf4Weight.from_dense(weight, self.double_quant).dequantize()
