"""`generate`: one prompt, its answer as it comes; or a file of them, answered in batches."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entrenar_gpu.cli import options
from entrenar_gpu.cli.text import print_json, printable
from entrenar_gpu.errors import UserError

if TYPE_CHECKING:
    from entrenar_gpu.infer import Completion, LanguageModel, Request

Context = Annotated[
    int | None, typer.Option("--context", min=2, help="longest prompt and answer together, in tokens (default 2048)")
]
Slots = Annotated[int, typer.Option("--slots", min=1, max=1024, help="sequences answered at the same time")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="text that ends the answer; may be given again")]
Bias = Annotated[list[str] | None, typer.Option("--logit-bias", metavar="ID=NUMBER", help="added to a token's logit")]
Speculate = Annotated[
    bool, typer.Option("--speculate/--no-speculate", help="try drafts from the text where that is faster")
]


@options.with_options(*options.RUNTIME, "seq", "completions", sampling=True)
def generate(
    given: Mapping[str, Any],
    prompt: Annotated[str | None, typer.Option("--prompt", help="what to say to the model")] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help='JSONL file of {"prompt": ...} or {"messages": [...]}')
    ] = None,
    system: options.System = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="a prompt is a turn of the user (default: where there is a template)"),
    ] = None,
    adapter: options.Adapter = None,
    context: Context = None,
    slots: Slots = 8,
    n: Annotated[int, typer.Option("--n", min=1, max=1024, help="answers to each prompt")] = 1,
    stop: Stop = None,
    logit_bias: Bias = None,
    speculate: Speculate = True,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt, or a file of prompts, with a model and its adapter."""
    if (prompt is None) == (prompts is None):
        raise UserError("--prompt: give it, or --prompts with a file; not both")
    run, sampling = options.split(given)
    from entrenar_gpu.config import SamplingOptions
    from entrenar_gpu.infer import encode_row, read_prompts

    rows = [{"prompt": prompt}] if prompts is None else read_prompts(prompts, "--prompts")
    as_chat = False if run.pop("completions", None) == "raw" else chat
    drawn = SamplingOptions(**sampling, stop=tuple(stop or ()), logit_bias=options.biases(logit_bias))
    context = context if context is not None else _number(run.pop("seq", None))
    wanted = min(slots, n * len(rows))
    with options.open_model(run, [adapter] if adapter else [], context, wanted, speculate) as model:
        ids = (encode_row(model.tokenizer, row, as_chat, system) for row in rows)
        requests = (model.request(prompt_ids, drawn, n) for prompt_ids in ids)
        if prompts is None and n == 1 and not as_json:
            _show(model, next(requests))
            return
        for row, completions in zip(rows, model.answer(requests), strict=True):
            for completion in completions:
                _print(model, row, completion, as_json, whole=prompts is None)


def _show(model: LanguageModel, request: Request) -> None:
    """The answer as it comes."""
    for delta in model.deltas(request):
        print(printable(delta.text, sys.maxsize, keep="\n\t"), end="", flush=True)
    print()


def _print(model: LanguageModel, row: Mapping[str, Any], answer: Completion, as_json: bool, whole: bool) -> None:
    """An answer as an object: indented where it is the only one, else a line of its own."""
    if not as_json and whole:
        print(printable(answer.text, sys.maxsize, keep="\n\t"))
        return
    said = {key: row[key] for key in ("id", "prompt", "messages") if key in row}
    told: dict[str, Any] = {
        **said,
        "text": answer.text,
        "finish_reason": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
    }
    if answer.tokens and answer.tokens[0].logprob == answer.tokens[0].logprob:
        told["logprobs"] = [
            {"id": t.id, "token": model.tokenizer.decode([t.id]), "logprob": t.logprob, "top": dict(t.top)}
            for t in answer.tokens
        ]
    if whole:
        print_json(told)
    else:
        print(json.dumps(told, ensure_ascii=False), flush=True)


def _number(text: str | None) -> int | None:
    if text is not None and not text.isdecimal():
        raise UserError(f"--seq: {text!r} is not a whole number")
    return None if text is None else int(text)
