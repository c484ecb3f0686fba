"""The commands under `entrenar-gpu bench`: what is measured, as lines or as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from entrenar_gpu.cli import options
from entrenar_gpu.cli.text import print_json
from entrenar_gpu.config import SHAPES
from entrenar_gpu.errors import UserError

bench = typer.Typer(help="Measure speed and memory on this machine.", no_args_is_help=True)


@bench.command("train")
@options.with_options(
    "method", "rank", "target", "modules_to_save", "trainable_token_indices", "batch", "seq", "accumulate",
    "precision", "trace_level", "double_quant", "memory_budget", "tune", "device", "engine",
)  # fmt: skip
def bench_train(
    given: Mapping[str, Any],
    shape: Annotated[str, typer.Option("--shape", help=f"one of {', '.join(SHAPES)}")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="optimizer steps measured")] = 10,
    labelled: Annotated[
        float,
        typer.Option(
            "--labelled", min=0.0, max=1.0, help="share of the tokens that have a label, of each row the last"
        ),
    ] = 1.0,
    as_json: options.Json = False,
) -> None:
    """Train a model's shape with random weights: tokens/s, seconds by phase, bytes."""
    from entrenar_gpu.cli.bench import train

    result = train.bench_train(shape, options.make_config(given, batch=1), steps, labelled)
    if as_json:
        print_json(result)
        return
    from entrenar_gpu.cli.display import show_bench

    show_bench(result)


@bench.command("gemm")
def bench_gemm(
    shape: Annotated[str, typer.Option("--shape", help="model whose matmuls are timed")] = "qwen3-4b",
    rows: Annotated[str, typer.Option("--rows", help="rows of the matmuls, comma-separated")] = "512,2048",
    rank: Annotated[int, typer.Option("--rank", min=1, help="adapter rank")] = 16,
    precision: Annotated[str, typer.Option("--precision", help="of f32, f16, int8; comma-separated")] = "f32,f16,int8",
    device: Annotated[str | None, typer.Option("--device", help="GPU by index or name")] = None,
    as_json: options.Json = False,
) -> None:
    """Time every matmul of a training step and check it against float64."""
    from entrenar_gpu.cli.bench import gemm
    from entrenar_gpu.gpu import TOLERANCES, open_device
    from entrenar_gpu.model import model_shape

    kinds = [k for k in TOLERANCES if k in precision.split(",")]
    if len(kinds) != len(precision.split(",")):
        raise UserError(f"--precision: {precision!r} is not a list of {', '.join(TOLERANCES)}")
    if not all(part.strip().isdecimal() and int(part) for part in rows.split(",")):
        raise UserError(f"--rows: {rows!r} is not a list of whole numbers")
    opened = open_device(device)
    if "f16" in kinds and not opened.caps.f16:
        print(f"{opened.caps.name} has no f16 arithmetic: its matmuls are left out", file=sys.stderr)
    wanted = list(gemm.cases(model_shape(shape), [int(n) for n in rows.split(",")], rank, kinds))
    _show_rows(gemm.bench_gemm(opened, wanted), as_json)


@bench.command("ops")
def bench_ops(
    shape: Annotated[str, typer.Option("--shape", help="model whose kernels are timed")] = "qwen3-4b",
    rows: Annotated[int, typer.Option("--rows", min=1, help="rows of a batch")] = 1,
    seq: Annotated[int, typer.Option("--seq", min=2, help="tokens per row")] = 512,
    device: Annotated[str | None, typer.Option("--device", help="GPU by index or name")] = None,
    as_json: options.Json = False,
) -> None:
    """Time every kernel of a training step other than matmuls."""
    from entrenar_gpu.cli.bench import ops
    from entrenar_gpu.gpu import open_device
    from entrenar_gpu.model import model_shape

    _show_rows(ops.bench_ops(open_device(device), model_shape(shape), rows, seq), as_json)


@bench.command("generate")
@options.with_options(
    "method", "precision", "trace_level", "double_quant", "memory_budget", "tune", "device", "engine",
)  # fmt: skip
def bench_generate(
    given: Mapping[str, Any],
    shape: Annotated[str, typer.Option("--shape", help=f"a folder with config.json, or {', '.join(SHAPES)}")],
    batches: Annotated[str, typer.Option("--batches", help="sequences at a time, comma-separated")] = "1,8",
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="tokens of each prompt")] = 512,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="tokens made after it")] = 64,
    context: Annotated[int, typer.Option("--context", help="tokens that a sequence has room for")] = 0,
    as_json: options.Json = False,
) -> None:
    """Read prompts and make tokens, with random weights: tokens/s, and the share of the floor that memory sets."""
    from entrenar_gpu.cli.bench import generate

    if not all(part.strip().isdecimal() and int(part) for part in batches.split(",")):
        raise UserError(f"--batches: {batches!r} is not a list of whole numbers")
    sizes = [int(n) for n in batches.split(",")]
    config = options.make_config(given, batch=max(sizes), seq=max(context, prompt + tokens))
    rows = generate.bench_generate(shape, config, sizes, prompt, tokens)
    if as_json:
        print_json(list(rows))
        return
    for row in rows:
        print(generate.line_of(row), flush=True)


def _show_rows(rows: Iterable[dict[str, Any]], as_json: bool) -> None:
    """Measurements as they come, a line each; or all of them as JSON."""
    if as_json:
        print_json(list(rows))
        return
    for row in rows:
        size = "x".join(map(str, row.get("sizes") or row["shape"]))
        wrong = "" if row.get("within", True) else f"  WRONG: relative error {row['error']:.1e}"
        print(
            f"{row['seconds'] * 1e6:10.1f} us {row['tflops']:8.2f} TFLOP/s {row['gbytes_per_second']:8.1f} GB/s"
            f"  {row['name']} {row.get('arithmetic') or row['kernel']} {size}{wrong}",
            flush=True,
        )
