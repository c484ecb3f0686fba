"""What tells one base model from another, for a run that goes on from a checkpoint.

The size and a checksum of every weight file, and what `config.json` says. The bytes are summed as they pass while the
weights are loaded; the sums are kept by path, size and times of last change, so that the next start need not make them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu.errors import UserError
from entrenar_gpu.files import SafetensorsFile, StreamedChecksum, cache_folder, new_folder, read_json_object, write_text
from entrenar_gpu.model import HFCheckpoint, ModelConfig

KEPT_FILES = 1000  # whose checksums are remembered; the ones that were added first go first
# Keys of config.json that say nothing of what a model computes.
_COSMETIC = {"transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}

# The tensors of a layer that the first release sampled, in the order in which it read them.
SAMPLED = (
    "input_layernorm.weight",
    *(f"self_attn.{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias")),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *("self_attn.q_norm.weight", "self_attn.k_norm.weight", "post_attention_layernorm.weight"),
)


class BaseIdentity:
    """The identity of one checkpoint. Made before its weights are loaded, so that it sees their bytes pass."""

    def __init__(self, checkpoint: HFCheckpoint, known: Mapping[str, str] | None = None) -> None:
        """`known` are the checksums of files by their places, by default those that are kept."""
        self._checkpoint = checkpoint
        self._known = _read_known() if known is None else known
        self._streams = {
            file.path: StreamedChecksum(file.open_file)
            for file in checkpoint.opened()
            if _place(file) not in self._known
        }
        self._made: dict[str, Any] | None = None

    def value(self) -> dict[str, Any]:
        """As checkpoints keep it. Raises UserError where a file has become shorter."""
        if self._made is None:  # every save asks, and the files may be gone by then
            sums = {file: self._checksum(file) for file in self._checkpoint.opened()}
            if self._streams:
                _keep({_place(file): checksum for file, checksum in sums.items()})
            self._made = {
                "bytes": sum(file.open_file.size for file in sums),
                "xxh3": hashlib.sha256("".join(sums.values()).encode()).hexdigest()[:32],
                "config": _config_hash(self._checkpoint.folder / "config.json"),
            }
        return self._made

    def is_that_of(self, saved: Mapping[str, Any]) -> bool:
        """Whether a checkpoint that keeps `saved` was made with this base; the first release kept less of it."""
        return saved == (release_identity(self._checkpoint) if "sha256" in saved else self.value())

    def _checksum(self, file: SafetensorsFile) -> str:
        stream = self._streams.get(file.path)
        return self._known[_place(file)] if stream is None else stream.hexdigest()


def release_identity(checkpoint: HFCheckpoint) -> dict[str, str]:
    """What checkpoints of the first release have: a hash of the configuration and of 64 values of each weight."""
    model, wanted = checkpoint.config, {spec.name for spec in checkpoint.config.weights}
    digest = hashlib.sha256(_release_repr(model).encode())
    layers = range(len(model.layers))
    names = [f"model.layers.{layer}.{name}" for layer in layers for name in SAMPLED] + ["model.norm.weight"]
    for name in names:
        if name in wanted:
            digest.update(checkpoint.stored(name).reshape(-1)[:64].read().view(np.uint8).tobytes())
    return {"sha256": digest.hexdigest()}


def _place(file: SafetensorsFile) -> str:
    """What a file's checksum is kept by. Its time of last change can be set to what it was, that of its inode not."""
    found = file.open_file
    return f"{file.path.resolve()} {found.size} {found.mtime_ns} {found.ctime_ns}"


def _kept_in() -> Path:
    return cache_folder() / "checksums.json"


def _read_known() -> dict[str, str]:
    try:
        return {str(place): str(checksum) for place, checksum in read_json_object(_kept_in()).items()}
    except UserError:  # none yet, or damaged: they are made again
        return {}


def _keep(sums: Mapping[str, str]) -> None:
    """Remember checksums, where a folder for that can be had."""
    known = {**_read_known(), **sums}
    with contextlib.suppress(UserError):
        new_folder(_kept_in().parent)
        write_text(_kept_in(), json.dumps(dict(list(known.items())[-KEPT_FILES:]), indent=1) + "\n")


def _config_hash(path: Path) -> str:
    values = {k: v for k, v in read_json_object(path).items() if k not in _COSMETIC and not k.startswith("_")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _release_repr(model: ModelConfig) -> str:
    """A configuration as `repr` wrote it in the first release, when it was flat and all layers were alike."""
    layer = model.layers[0]
    attention, mlp = layer.attention, layer.mlp
    rope = next(iter(model.rope_tables.values()), None)
    values = {
        "architecture": model.architecture,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": mlp.intermediate_size,
        "num_layers": len(model.layers),
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": model.norm.eps,
        "rope_theta": rope and rope.theta,
        "rope_scaling": rope and rope.scaling,
        "tie_word_embeddings": model.tie_word_embeddings,
        "qkv_bias": attention.qkv_bias,
        "qk_norm": attention.qk_norm is not None,
        "max_positions": model.max_positions,
    }
    return f"ModelConfig({', '.join(f'{key}={value!r}' for key, value in values.items())})"
