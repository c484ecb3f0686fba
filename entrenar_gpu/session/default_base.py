"""The base that `eval` and `generate` take where nobody says: what an adapter was trained on, else what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrenar_gpu.adapters import trained_base
from entrenar_gpu.model import HFCheckpoint, resolve_model

IN_WORDS = {"qlora": "NF4", "lora": "as stored", "full": "as stored"}


def default_base(model: str | Path, adapter: str | None, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(options of the run, what the base is and why, in words). `given` are the flags, which win.

    A checkpoint that is stored as NF4 is read as that.
    """
    checkpoint = HFCheckpoint.open(resolve_model(model))
    options, words = _base(checkpoint, adapter, given)
    return options, "; ".join([words, *checkpoint.notes])


def _base(checkpoint: HFCheckpoint, adapter: str | None, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if "method" in given:
        return {}, f"{IN_WORDS.get(given['method'], given['method'])}, by --method"
    trained = trained_base(adapter) if adapter else None
    if trained is not None:
        method = "qlora" if trained.method == "qlora" else "lora"
        options = {"method": method, "double_quant": trained.double_quant}
        return options, f"{IN_WORDS[trained.method]}, as {trained.source} says"
    if checkpoint.is_quantised:  # and what is dense in it stays so
        return {"method": "qlora"}, "NF4, as stored"
    return {"method": "lora"}, "as stored"
