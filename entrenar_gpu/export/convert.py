"""A model or an adapter in the layout that another program reads: `entrenar-gpu export`."""

from __future__ import annotations

from pathlib import Path

from entrenar_gpu.adapters import load_adapter, save_adapter, save_mlx_adapter, trained_base
from entrenar_gpu.config import path_text
from entrenar_gpu.errors import UserError
from entrenar_gpu.export.gguf_writer import write_gguf, write_gguf_adapter
from entrenar_gpu.export.merge import merged_weight
from entrenar_gpu.model import HFCheckpoint, resolve_model

LAYOUTS = ("gguf", "peft", "mlx")


def export_model(
    model: str | Path,
    output: str | Path,
    to: str = "gguf",
    adapter: str | Path | None = None,
    dtype: str = "F16",
    base: str = "stored",
    adapter_only: bool = False,
) -> str:
    """Write what `to` names, and return what was written, in words.

    gguf: the model, with `adapter` folded into its stored weights or their NF4 form (`base`), as `dtype`; with
    `adapter_only` the adapter alone. peft, mlx: the adapter alone, as PEFT's or mlx-lm's folder. An adapter may come
    from either. Raises UserError, with nothing written.
    """
    if to not in LAYOUTS:
        raise UserError(f"--to: {to!r} is not one of {', '.join(LAYOUTS)}")
    if base not in ("stored", "nf4"):
        raise UserError(f"--base: {base!r} is not one of stored, nf4")
    if not path_text(output, "--output"):
        raise UserError("--output: missing")
    if adapter is not None:
        path_text(adapter, "--adapter")
    alone = adapter_only or to != "gguf"
    if adapter is None and alone:
        raise UserError("--adapter: missing; name the folder of the adapter to write")
    checkpoint = HFCheckpoint.open(resolve_model(model))
    target = Path(output)
    if not alone:
        if adapter is None:
            write_gguf(checkpoint, target, dtype)
            return f"model: {target}, {dtype}"
        trained = trained_base(adapter)
        double_quant = None if base == "stored" else trained is None or trained.double_quant
        write_gguf(checkpoint, target, dtype, merged_weight(checkpoint, Path(adapter), double_quant))
        form = "stored weights" if base == "stored" else "NF4 form of the weights"
        return f"merged model: {target}, {dtype}, on the {form}"
    assert adapter is not None
    if to == "gguf":
        write_gguf_adapter(checkpoint, Path(adapter), target)
        return f"adapter: {target}; llama.cpp takes it with --lora beside a GGUF of the model"
    spec, values = load_adapter(adapter, checkpoint.config)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"--output: {target} is in use; choose another folder")
    if to == "peft":
        save_adapter(target, spec, values, str(model))
    else:
        save_mlx_adapter(target, spec, values)
    return f"adapter: {target}, in the layout of {'PEFT' if to == 'peft' else 'mlx-lm'}"
