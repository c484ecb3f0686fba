"""`entrenar-gpu export`: a model or an adapter for another program."""

from __future__ import annotations

from typing import Annotated

import typer

from entrenar_gpu.cli.text import printable


def export(
    model: Annotated[str, typer.Option("--model", help="model folder or Hub id")],
    output: Annotated[str, typer.Option("--output", help="file to write; for peft and mlx a folder")],
    to: Annotated[str, typer.Option("--to", help="gguf, peft or mlx")] = "gguf",
    adapter: Annotated[str | None, typer.Option("--adapter", help="folder of a PEFT or mlx-lm adapter")] = None,
    dtype: Annotated[
        str, typer.Option("--type", help="of a GGUF's weights: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1")
    ] = "F16",
    base: Annotated[str, typer.Option("--base", help="fold the adapter into the stored weights or their nf4 form")] = (
        "stored"
    ),
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="gguf: the adapter alone, for llama.cpp's --lora")
    ] = False,
) -> None:
    """Write a model with its adapter as GGUF, or an adapter alone as GGUF, PEFT or mlx-lm read it."""
    from entrenar_gpu.export import export_model

    print(printable(export_model(model, output, to, adapter, dtype, base, adapter_only)))
