"""Shapes of well-known models, for planning, benchmarks and training from scratch without their files.

`shapes/<name>.json` holds the keys of a published config.json that a family reads. Of models that also see (gemma3-4b
and -12b, ministral3) it is the language part. For llama2-124m nothing is published but that figure: it is a toy of that
size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from entrenar_gpu.errors import UserError

FOLDER = Path(__file__).parent / "shapes"
SHAPES: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))
}


def shape_file(name: str) -> Path:
    """Where a shape is described. Raises UserError naming the flag and the shapes there are."""
    if name not in SHAPES:
        raise UserError(f"--shape: {name!r} is not one of {', '.join(SHAPES)}")
    return FOLDER / f"{name}.json"
