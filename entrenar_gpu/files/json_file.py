"""Text and JSON files, read in bounded memory and with the file's name in every error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from entrenar_gpu.errors import UserError
from entrenar_gpu.files.stored import OpenFile

# The index of a model of a million tensors has about as much; a configuration is some kilobytes.
MOST_BYTES = 64 << 20


def read_text(path: Path, most_bytes: int = MOST_BYTES, what: str = "text") -> str:
    """The UTF-8 text in a regular file. Raises UserError naming it, for one of more than `most_bytes` too."""
    file = OpenFile(path)
    if file.size > most_bytes:
        raise UserError(f"{path}: too large; at most {most_bytes >> 20} MiB of {what} are read")
    try:
        return file.read(0, file.size, "its text").decode("utf-8-sig")  # Windows editors begin with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text (byte {error.start + 1})") from None


def read_json(path: Path, most_bytes: int = MOST_BYTES, what: str = "JSON") -> Any:
    """The value in a JSON file. Raises UserError naming the file."""
    text = read_text(path, most_bytes, what)
    try:
        value = json.loads(text)
        if "\\u" in text:  # JSON may write half of a surrogate pair, which is no text for anybody else
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def read_json_object(path: Path, missing: str = "a model folder holds config.json and *.safetensors") -> dict[str, Any]:
    """The object in a JSON file. Raises UserError naming the file; `missing` says where one would be."""
    if not os.path.lexists(path):
        raise UserError(f"{path}: not found; {missing}")
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
