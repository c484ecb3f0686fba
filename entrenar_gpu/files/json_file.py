"""JSON files, read with the file's name in every error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from entrenar_gpu.errors import UserError


def read_json_object(path: Path, missing: str = "a model folder holds config.json and *.safetensors") -> dict[str, Any]:
    """The object in a JSON file. Raises UserError naming the file; `missing` says where one would be."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {missing}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object")
    return raw
