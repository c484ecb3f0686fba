"""Model names: a folder on this machine, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from entrenar_gpu.config import path_text
from entrenar_gpu.errors import UserError
from entrenar_gpu.model.gguf_model import gguf_folder
from entrenar_gpu.model.registry import load_model_config

# Weights at the top of the repository, configuration and tokenizer; never pickles or code.
PATTERNS = ["model*.safetensors", "*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab*"]


def resolve_model(name: str | os.PathLike[str], flag: str = "--model", weights: bool = True) -> Path:
    """The folder of a model: `name` itself where that is one, a GGUF file's, unpacked once, otherwise the Hub's
    repository `name`, downloaded once, on request without its weights.

    Raises UserError naming the flag when there is neither, or when the Hub cannot be reached and holds no copy here,
    and for a model that cannot be trained before its weights are downloaded.
    """
    name = path_text(name, flag)
    if not name:
        raise UserError(f"{flag}: missing; give a model folder or a Hub id")
    if Path(name).is_dir():
        if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
            raise UserError(f"{flag}: {name} holds an adapter; name the model it belongs to, and it with --adapter")
        return Path(name)
    if name.lower().endswith(".gguf") and Path(name).is_file():
        return gguf_folder(Path(name))
    if Path(name).is_file():
        raise UserError(f"{flag}: {name}: a file, not the folder of a model; of files only .gguf is read")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise UserError(f"{flag}: {name}: no such folder, and no Hub id such as Qwen/Qwen3-4B")
    if weights:  # what cannot be trained is refused before it is downloaded
        load_model_config(_downloaded(name, flag, ["config.json"]))
    return _downloaded(name, flag, PATTERNS if weights else PATTERNS[1:])


def _downloaded(name: str, flag: str, patterns: list[str]) -> Path:
    """The folder that holds the files of a repository whose names match."""
    import huggingface_hub  # slow to import, and most runs name a folder

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # whatever a network, proxy or disk can raise, under several libraries' names
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{flag}: {name}: no such folder, and not to be had from the Hub: {reason}") from error
