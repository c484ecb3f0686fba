"""`eval`: the loss of a data set, in windows if asked, or answers to multiple choice by likelihood."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from entrenar_gpu.cli import options
from entrenar_gpu.cli.generate import Context
from entrenar_gpu.cli.text import print_json, printable
from entrenar_gpu.errors import UserError


@options.with_options(*options.RUNTIME, "data", "split", "map", "batch", "seq", "loss_on", "completions", "pack")
def evaluate(
    given: Mapping[str, Any],
    questions: Annotated[str | None, typer.Argument(metavar="[FILE]", help="JSONL file of --task choices")] = None,
    task: Annotated[
        str,
        typer.Option("--task", help='loss, or choices: lines of {"question", "choices", "answer"}, by likelihood'),
    ] = "loss",
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="score long samples in windows that slide on by this much")
    ] = None,
    adapter: options.Adapter = None,
    context: Context = None,
    as_json: options.Json = False,
) -> None:
    """Mean loss over all unmasked tokens of a data set, and its perplexity; or accuracy on multiple choice."""
    if task not in ("loss", "choices"):
        raise UserError(f"--task: {task!r} is not one of loss, choices")
    if (task == "choices") != (questions is not None):
        raise UserError("--task choices: give it with a FILE of questions, and the FILE with it")
    result = _loss(given, adapter, window) if questions is None else _choices(given, adapter, context, questions)
    if as_json:
        print_json(result)
    elif questions is None:
        print(f"loss {result['loss']:.6f}   perplexity {result['perplexity']:.4f}   tokens {result['tokens']}")
    else:
        shares = (f"{name} {result[name]:.4f} ± {result[f'{name}_stderr']:.4f}" for name in ("acc", "acc_norm"))
        print("   ".join([*shares, f"questions {result['samples']}"]))


def _loss(given: Mapping[str, Any], adapter: str | None, window: int | None) -> dict[str, Any]:
    from entrenar_gpu.session import default_base
    from entrenar_gpu.train import evaluate_data

    defaults, base = default_base(given.get("model", ""), adapter, given)
    config = options.make_config(given, **defaults, adapter_init=adapter)
    print(printable(f"base: {base}"), file=sys.stderr)
    return evaluate_data(config, adapter is not None, window=window)


def _choices(given: Mapping[str, Any], adapter: str | None, context: int | None, path: str) -> dict[str, Any]:
    from entrenar_gpu.infer import evaluate_choices, read_questions

    others = given.keys() - set(options.RUNTIME)
    if others:
        raise UserError(f"--{min(others).replace('_', '-')}: not used by --task choices")
    questions = read_questions(path)
    with options.open_model(given, [adapter] if adapter else [], context, 8, False) as model:
        return evaluate_choices(model, questions)
