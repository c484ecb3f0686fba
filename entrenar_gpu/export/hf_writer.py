"""Checkpoints in Hugging Face layout, written: weights in shards, and the files beside them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from entrenar_gpu.data import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import TensorSource, new_file, new_folder, read_json_object, write_tensors, write_text
from entrenar_gpu.model import INDEX_FILE, SINGLE_FILE, HFCheckpoint

SHARD_BYTES = 4 << 30
_COPIED_AT_ONCE = 1 << 20
GENERATION_CONFIG = "generation_config.json"
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")  # what transformers takes from config.json without one
# What makes a folder usable beside its weights.
NAMED_TEMPLATES = "additional_chat_templates"
COMPANIONS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def save_checkpoint(
    folder: str | Path,
    sources: Sequence[TensorSource],
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write weights as one file, or as shards of at most `shard_bytes` (a tensor is never split) with an index.

    Each tensor is produced when its turn comes, so that memory stays at the largest one. All files appear together at
    the end, the index last. Returns them. Raises UserError when the disk is full, or when the folder holds a model in
    the other layout, which might be read instead.
    """
    folder = Path(folder)
    new_folder(folder)
    shards = _split(sources, shard_bytes)
    paths = [folder / f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        paths = [folder / SINGLE_FILE]
    other = folder / (INDEX_FILE if len(shards) == 1 else SINGLE_FILE)
    if other.exists():
        raise UserError(f"{other}: is in the way of the weights to be written; choose an empty folder")
    with contextlib.ExitStack() as files:  # left in reverse order: what is entered first appears last
        if len(shards) > 1:
            index = files.enter_context(new_file(folder / INDEX_FILE))
            index.write(_index(shards, paths).encode())
        for path, shard in zip(paths, shards, strict=True):
            # transformers asks for the format
            write_tensors(files.enter_context(new_file(path)), shard, {"format": "pt", **(metadata or {})})
    return paths if len(shards) == 1 else [*paths, folder / INDEX_FILE]


def carried_sources(checkpoint: HFCheckpoint) -> list[TensorSource]:
    """What the model has beside the part that is trained, as it is."""
    infos = {name: checkpoint.info(name) for name in checkpoint.carried()}
    return [TensorSource(name, i.shape, i.dtype, partial(checkpoint.raw, name)) for name, i in infos.items()]


def name_to_write(checkpoint: HFCheckpoint, name: str) -> str:
    """What to call a weight in a file that also holds `carried_sources`: as the file that those come from does."""
    return checkpoint.stored_name(name) if checkpoint.carried() else name


def _index(shards: list[list[TensorSource]], paths: list[Path]) -> str:
    weight_map = {source.name: path.name for path, shard in zip(paths, shards, strict=True) for source in shard}
    total = sum(source.nbytes for shard in shards for source in shard)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def _split(sources: Sequence[TensorSource], shard_bytes: int) -> list[list[TensorSource]]:
    shards: list[list[TensorSource]] = [[]]
    filled = 0
    for source in sources:
        if shards[-1] and filled + source.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(source)
        filled += source.nbytes
    return shards


def copy_model_files(
    source: str | Path,
    target: str | Path,
    dtype: str,
    tied: bool | None = None,
    quantization: dict[str, Any] | None = None,
) -> None:
    """Copy what a model folder holds beside its weights: configuration, tokenizer, chat templates.

    `config.json` is changed to say that the weights are `dtype` ("float32", "bfloat16", ...) and how they are quantised
    (`quantization`, None where they are not), and whether embedding and head are one (`tied`, where known);
    `generation_config.json` to stop at what closes a turn in the chat template, beside what it stops at already.
    """
    source, target = Path(source), Path(target)
    config = read_json_object(source / "config.json")
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    if tied is not None and bool(config.get("tie_word_embeddings", False)) != tied:
        config["tie_word_embeddings"] = tied
    config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"torch_dtype": dtype}
    new_folder(target)
    named = sorted((source / NAMED_TEMPLATES).glob("*.jinja"))
    if named:
        new_folder(target / NAMED_TEMPLATES)
    for path in [*(source / name for name in COMPANIONS), *named]:
        if path.exists() and path.name != "config.json":
            _copy(path, target / path.relative_to(source))
    _write_generation_config(source, target, config)
    write_text(target / "config.json", json.dumps(config, indent=2) + "\n")


def _copy(source: Path, target: Path) -> None:
    with new_file(target) as copy, open(source, "rb") as original:
        while part := original.read(_COPIED_AT_ONCE):
            copy.write(part)


def _write_generation_config(source: Path, target: Path, config: dict[str, Any]) -> None:
    """generation_config.json with everything that ends what the model says; as it is where that adds nothing."""
    path = source / GENERATION_CONFIG
    try:
        tokenizer = Tokenizer.load(source)
        values = read_json_object(path) if path.exists() else {k: config[k] for k in _TOKEN_KEYS if k in config}
        stops = values.get("eos_token_id")
        there = stops if isinstance(stops, list) else [] if stops is None else [stops]
        added = [i for i in dict.fromkeys(tokenizer.end_ids) if i not in there]
    except UserError:  # without a tokenizer, or with a broken one, nothing is known of what it would add
        added = []
    if not added:
        if path.exists():
            _copy(path, target / GENERATION_CONFIG)
        return
    ends = [*there, *added]
    values["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_text(target / GENERATION_CONFIG, json.dumps(values, indent=2) + "\n")
