"""Checkpoints in Hugging Face layout: read tensor by tensor, checked before anything is read, and written in shards."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from entrenar_gpu.dtypes import STORED_FLOATS
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import SafetensorsFile, StoredArray, TensorInfo, read_json_object
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.model.config import HEAD, PREFIX, ModelConfig
from entrenar_gpu.model.registry import load_model_config
from entrenar_gpu.model.weight_spec import WeightSpec
from entrenar_gpu.quant import BLOCK, CODEBOOK, SCALE_BLOCK, Bytes, Floats, Nf4Weight, StateDtype

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OLDER_PREFIXES = ("language_model.model.",)  # of the language part of models that also see
COMPARED_ROWS = 4096  # of two tables at once

# Suffixes of a bitsandbytes weight; the state's ends in the quantisation type.
STATE = ".quant_state.bitsandbytes__"


class HFCheckpoint:
    """The weights of a model folder, by their Hugging Face names, read when they are asked for.

    `config` is the folder's ModelConfig. Opening checks every tensor that the model needs (present, shape, dtype);
    tensors it does not need are ignored. Where files name or tie weights otherwise than `config.json` lets expect, they
    count: `notes` says in words what was made of that.
    """

    def __init__(self, folder: Path, config: ModelConfig, files: dict[str, SafetensorsFile]) -> None:
        self.folder, self._files = folder, files
        self._stored_names = _stored_names(config, files)
        self.notes: list[str] = []
        if config.tie_word_embeddings and self._has_own_head(config):
            config = replace(config, tie_word_embeddings=False)
            file = self.info(HEAD).file
            self.notes.append(f"{file}: {HEAD} is not the embedding, though config.json ties them: it is used")
        self.config = config
        self._specs = {spec.name: spec for spec in config.weights}

    @property
    def main_file(self) -> Path:
        """The single file, or the index of the shards."""
        return next(path for name in (SINGLE_FILE, INDEX_FILE) if (path := self.folder / name).exists())

    @classmethod
    def open(cls, folder: str | Path) -> HFCheckpoint:
        """Open every shard and check all headers. Raises UserError naming the file, and the tensor or key at fault."""
        folder = Path(folder)
        config = load_model_config(folder)
        checkpoint = cls(folder, config, _open_files(folder))
        for spec in checkpoint.config.weights:
            checkpoint._check(spec)
        return checkpoint

    def names(self) -> list[str]:
        """Every tensor in the files, whether the model needs it or not."""
        return list(self._files)

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype, file and place of a stored tensor."""
        file, name = self._place(name)
        return file.tensors[name]

    def raw(self, name: str) -> NDArray[Any]:
        """A tensor as stored (BF16 as ml_dtypes.bfloat16), read whole."""
        file, name = self._place(name)
        return file[name]

    def stored(self, name: str) -> StoredArray:
        """The same, read part by part: `stored(name)[r0:r1].read()` reads those rows only."""
        file, name = self._place(name)
        return file.stored(name)

    def files(self) -> list[Path]:
        """The files that hold the tensors, each once."""
        return [file.path for file in self.opened()]

    def opened(self) -> list[SafetensorsFile]:
        """The same, open, in the order of their paths."""
        return sorted(set(self._files.values()), key=lambda file: file.path)

    def read_ahead(self, name: str) -> None:
        """Let the system read a tensor from the disk before it is asked for."""
        file, name = self._place(name)
        file.read_ahead(name)

    def f32(self, name: str) -> Floats:
        """A parameter in float32, in memory of its own; NF4 weights are dequantised."""
        quantised = self.nf4(name)
        return quantised.dequantize() if quantised else self.raw(name).astype(np.float32)

    def is_nf4(self, name: str) -> bool:
        """Whether a parameter is stored as bitsandbytes' NF4."""
        return self._has(f"{name}{STATE}nf4")

    @property
    def is_quantised(self) -> bool:
        """Whether any weight of the model is stored as NF4."""
        return any(self.is_nf4(name) for name in self._specs)

    def nf4(self, name: str) -> Nf4Weight | None:
        """A parameter stored as bitsandbytes' NF4; None when stored otherwise."""
        return self._nf4(name) if self.is_nf4(name) else None

    def stored_name(self, name: str) -> str:
        """What the files call a tensor of the model."""
        return self._stored_names.get(name, name)

    def carried(self) -> list[str]:
        """Tensors that a model which also sees has beside its language part: whoever writes the model copies them."""
        if self.config.prefix == PREFIX:
            return []
        ours = {self.stored_name(name) for name in self._specs}
        states = tuple(f"{name}." for name in ours)  # of quantised weights
        return [name for name in self._files if name not in ours and not name.startswith(states)]

    def _place(self, name: str) -> tuple[SafetensorsFile, str]:
        """The file that holds a tensor, and what that calls it."""
        stored = self._stored_names.get(name, name)
        return self._files[stored], stored

    def _has(self, name: str) -> bool:
        return self._stored_names.get(name, name) in self._files

    def _has_own_head(self, config: ModelConfig) -> bool:
        """Whether there is a head of the embedding's shape that holds other numbers."""
        table = config.embedding
        if not (self._has(HEAD) and self._has(table)) or self._place(HEAD) == self._place(table):
            return False
        head, embedding = self.info(HEAD), self.info(table)
        if head.shape != embedding.shape or not {head.dtype, embedding.dtype} <= STORED_FLOATS.keys():
            return False
        ours, theirs = self.stored(HEAD), self.stored(table)
        rows = range(0, config.vocab_size, COMPARED_ROWS)
        return any(
            not np.array_equal(np.asarray(ours[r : r + COMPARED_ROWS]), np.asarray(theirs[r : r + COMPARED_ROWS]))
            for r in rows
        )

    def _check(self, spec: WeightSpec) -> None:
        name, shape = spec.name, spec.shape
        if not self._has(name):
            raise UserError(f"{self.main_file}: tensor {name!r} is missing; config.json calls for it")
        info = self.info(name)
        if any(self._has(f"{name}{STATE}{kind}") for kind in ("nf4", "fp4")):
            weight = self._nf4(name)
            if not weight.is_finite:
                raise UserError(f"{info.file}: tensor {name!r} holds numbers that are not finite")
            stored = weight.shape
        elif info.dtype in STORED_FLOATS:
            stored = info.shape
        else:
            wanted = ", ".join(STORED_FLOATS)
            raise UserError(f"{info.file}: tensor {name!r} has dtype {info.dtype}; supported: {wanted}, NF4")
        if stored != shape:
            raise UserError(f"{info.file}: tensor {name!r} has shape {list(stored)}, config.json needs {list(shape)}")

    def _nf4(self, name: str) -> Nf4Weight:
        """Read and check the state that bitsandbytes stores beside a weight."""
        file = self.info(name).file

        def need(holds: bool, what: str) -> None:
            if not holds:
                raise UserError(f"{file}: tensor {name!r}: {what}")

        need(self._specs[name].kind == "projection", "quantised by bitsandbytes; only projections may be")
        need(self.is_nf4(name), "quantised by bitsandbytes to fp4; only nf4 is supported")
        state = self._quant_state(name)
        shape = tuple(state["shape"])
        count = math.prod(shape)
        blocks = ceil_div(count, BLOCK)
        codes = self.raw(name).reshape(-1).view(np.uint8)  # quant_storage may be another type than uint8
        need(codes.size == (count + 1) // 2, f"{codes.size} bytes do not hold the NF4 codes of shape {list(shape)}")
        table = self._part(name, "quant_map", "F32", len(CODEBOOK))
        need(np.array_equal(table, CODEBOOK), "its quant_map is not the NF4 codebook")
        if "nested_blocksize" not in state:
            absmax = self._part(name, "absmax", "F32", blocks)
            return Nf4Weight(shape, codes, absmax, dtype=cast(StateDtype, state["dtype"]))
        return Nf4Weight(
            shape,
            codes,
            absmax_codes=cast(Bytes, self._part(name, "absmax", "U8", blocks)),
            nested_absmax=self._part(name, "nested_absmax", "F32", ceil_div(blocks, SCALE_BLOCK)),
            nested_code=self._part(name, "nested_quant_map", "F32", 256),
            offset=float(state["nested_offset"]),
            dtype=cast(StateDtype, state["dtype"]),
        )

    def _part(self, name: str, suffix: str, dtype: str, length: int) -> NDArray[Any]:
        """A tensor of the quantisation state, checked."""
        part = f"{name}.{suffix}"
        if not self._has(part):
            raise UserError(f"{self.info(name).file}: tensor {part!r} is missing")
        info = self.info(part)
        if info.dtype != dtype or math.prod(info.shape) != length:
            found = f"{info.dtype} {list(info.shape)}"
            raise UserError(f"{info.file}: tensor {part!r} is {found}, must be {dtype} [{length}]")
        return self.raw(part).reshape(-1)

    def _quant_state(self, name: str) -> dict[str, Any]:
        """The JSON that bitsandbytes stores as the bytes of a tensor."""
        tensor = f"{name}{STATE}nf4"
        where = f"{self.info(tensor).file}: tensor {tensor!r}"
        try:
            state = json.loads(self.raw(tensor).tobytes())
        except (ValueError, RecursionError):
            raise UserError(f"{where} does not hold JSON") from None
        allowed: dict[str, tuple[Any, ...]] = {
            "quant_type": ("nf4",),
            "blocksize": (BLOCK,),
            "dtype": ("float32", "bfloat16", "float16"),
        }
        if isinstance(state, dict) and "nested_blocksize" in state:
            allowed |= {"nested_blocksize": (SCALE_BLOCK,), "nested_dtype": ("float32",)}
            offset = state.get("nested_offset")
            if not isinstance(offset, float) or not math.isfinite(offset):
                raise UserError(f"{where}: nested_offset must be a finite number, not {offset!r}")
        if not isinstance(state, dict) or not _is_shape(state.get("shape")):
            raise UserError(f"{where} holds no shape")
        for key, values in allowed.items():
            if state.get(key) not in values:
                raise UserError(f"{where}: {key} {state.get(key)!r} is not supported; {values[0]!r} is")
        return state


def _stored_names(config: ModelConfig, files: dict[str, SafetensorsFile]) -> dict[str, str]:
    """What the files call tensors, where it is not what the model calls them.

    Names without the prefix, as of models saved without their head; names by an older layout of models that also see;
    the head's, where a tied pair is stored as that.
    """
    names: dict[str, str] = {}
    table = config.embedding
    # Not by the embedding alone: of a tied pair the head may be what is stored.
    tails = [spec.name.removeprefix(config.prefix) for spec in config.weights if spec.name.startswith(config.prefix)]
    for prefix in ("", *OLDER_PREFIXES):
        if table not in files and any(prefix + tail in files for tail in tails):
            names |= {config.prefix + name.removeprefix(prefix): name for name in files if name.startswith(prefix)}
    older_head = f"language_model.{HEAD}"
    if HEAD not in files and older_head in files:
        names[HEAD] = older_head
    head = names.get(HEAD, HEAD)
    if config.tie_word_embeddings and head in files and names.get(table, table) not in files:
        names[table] = head
    return names


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is int and 0 < v < 2**40 for v in value)


def _open_files(folder: Path) -> dict[str, SafetensorsFile]:
    """The file that holds each tensor. As in transformers, a single file wins over an index."""
    if (folder / SINGLE_FILE).exists():
        file = SafetensorsFile(folder / SINGLE_FILE)
        return dict.fromkeys(file.tensors, file)
    index = folder / INDEX_FILE
    if not index.exists():
        raise UserError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    return _open_shards(index)


def _open_shards(index: Path) -> dict[str, SafetensorsFile]:
    """The shards that an index names: plain file names in its own folder.

    Such a file may be a link to elsewhere, as in the cache of the Hub: links are made by the owner of the folder, the
    names in an index by whoever wrote the checkpoint.
    """
    content = read_json_object(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: holds no weight_map")
    opened: dict[str, SafetensorsFile] = {}
    result = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise UserError(f"{index}: tensor {name!r}: {shard!r} is not the name of a file in the model folder")
        if shard not in opened:
            if not os.path.exists(index.parent / shard):  # a name too long for any file is one that is not there
                raise UserError(f"{index.parent / shard}: missing; {index.name} names it")
            opened[shard] = SafetensorsFile(index.parent / shard)
        if name not in opened[shard].tensors:
            raise UserError(f"{index.parent / shard}: tensor {name!r} is missing; {index.name} places it there")
        result[name] = opened[shard]
    return result
