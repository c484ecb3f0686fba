"""Command-line flags derived from the fields of TrainConfig, so that each option is declared once."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entrenar_gpu.cli.other_names import ALIASES
from entrenar_gpu.cli.text import printable
from entrenar_gpu.config import SEVERAL, SamplingOptions, TrainConfig, flag, is_union, known_keys, load_yaml
from entrenar_gpu.errors import UserError

if TYPE_CHECKING:
    from entrenar_gpu.infer import LanguageModel

Field = dataclasses.Field[Any]

FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
SAMPLING = {f.name: f for f in dataclasses.fields(SamplingOptions) if f.metadata}
_HINTS = typing.get_type_hints(SamplingOptions) | typing.get_type_hints(TrainConfig)

Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Adapter = Annotated[str | None, typer.Option("--adapter", help="PEFT adapter folder")]
System = Annotated[str | None, typer.Option("--system", help="the system's message of a chat")]

# What a command that only runs a model, and trains nothing, needs to know.
RUNTIME = ("model", "method", "double_quant", "precision", "cache", "cache_dir", "memory_budget", "device", "engine")
_WITHOUT_TRAINING = {"method": "what the adapter was trained on, else as stored"}  # its defaults that differ


def kind_of(name: str) -> tuple[type, tuple[str, ...]]:
    """(type that the command line parses, choices) of a field."""
    hint = _HINTS[name]
    if is_union(hint):
        hint = next(o for o in typing.get_args(hint) if o not in (type(None), SEVERAL))
    if typing.get_origin(hint) is typing.Literal:
        return str, typing.get_args(hint)
    return hint, ()


def _is_several(name: str) -> bool:
    """Whether the flag may be given again."""
    return SEVERAL in typing.get_args(_HINTS[name])


def help_of(f: Field, default: str | None = None) -> str:
    """The help text of a field: what it does, its choices, its unit and its default, or another in words."""
    _, choices = kind_of(f.name)
    text = f.metadata["help"]
    if choices:
        text += f" ({', '.join(choices)})"
    if f.metadata["unit"]:
        text += f" [{f.metadata['unit']}]"
    if default is not None:
        text += f" (default: {default})"
    elif f.default not in (None, "") and not isinstance(f.default, bool):
        text += f" (default {f.default})"
    return text


def with_options(*names: str, sampling: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of these fields of TrainConfig, and all of SamplingOptions if asked, before its own.

    The command gets a mapping `given` with the flags that stood on the command line, and nothing for the others.
    """
    fields = {name: FIELDS[name] for name in names} | (SAMPLING if sampling else {})

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "given"]
        parameters = []
        for name, f in fields.items():
            kind, _ = kind_of(name)
            declared = f"{flag(name)}/--no-{name.replace('_', '-')}" if kind is bool else flag(name)
            # None tells a flag that was not given; numbers are text here, so that config.py alone judges them
            described = help_of(f, None if "rank" in fields else _WITHOUT_TRAINING.get(name))
            described = described.replace("[", "\\[")  # what typer prints with is rich, to which [rows] is a style
            shown = None if kind is bool else f"<{kind.__name__}>"
            option = typer.Option(None, declared, help=described, show_default=False, metavar=shown)
            annotation = bool | None if kind is bool else list[str] | None if _is_several(name) else str | None
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)
            )

        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in fields}
            command(given={n: v for n, v in given.items() if v is not None}, **values)

        hints = typing.get_type_hints(command, include_extras=True)
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints.get(p.name, p.annotation)) for p in own]
        run.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*parameters, *own]}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def refuse_other_adapter(given: Mapping[str, Any], config: TrainConfig, config_file: str | None) -> None:
    """Raise UserError where flags or the YAML file ask for another adapter than that of --adapter-init."""
    from entrenar_gpu import adapters
    from entrenar_gpu.model import load_model_config, resolve_model

    said = {*given, *(known_keys(TrainConfig, load_yaml(config_file), config_file) if config_file else ())}
    if config.adapter_init is not None:
        adapters.refuse_other_adapter(config, load_model_config(resolve_model(config.model, weights=False)), said)


def split(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the run, options of sampling) among the flags of a command that takes both."""
    sampling = {name: value for name, value in given.items() if name in SAMPLING}
    return {name: value for name, value in given.items() if name not in SAMPLING}, sampling


def biases(given: Sequence[str] | None) -> dict[Any, float]:
    """`--logit-bias ID=NUMBER`, as often as it was given."""
    found: dict[Any, float] = {}
    for text in given or ():
        token, _, number = text.partition("=")
        try:
            found[token.strip()] = float(number)
        except ValueError:
            raise UserError(f"--logit-bias: {text!r} is not a token id and a number, as in 13=-5") from None
    return found


def open_model(
    given: Mapping[str, Any], adapters: Sequence[str], context: int | None, slots: int, speculate: bool
) -> LanguageModel:
    """The model of a command that talks; what base it takes goes to standard error.

    `adapters` are folders, or NAME=FOLDER; the first answers to begin with.
    """
    from entrenar_gpu.infer import load
    from entrenar_gpu.session import default_base

    named: dict[str, str] = {}
    for text in adapters:
        whole = "=" not in text or os.path.isdir(text)
        name, folder = (os.path.basename(os.path.abspath(text)), text) if whole else text.split("=", 1)
        if not name or not folder:
            raise UserError(f"--adapter: {text!r} is neither a folder nor NAME=FOLDER")
        if name == "base":
            raise UserError(f"--adapter: base is the model without an adapter; give another name, as in mine={folder}")
        if named.setdefault(name, folder) != folder:
            raise UserError(f"--adapter: two are called {name!r}")
    if not given.get("model"):
        raise UserError("--model: missing")
    defaults, base = default_base(given["model"], next(iter(named.values()), None), given)
    config = make_config(given, **defaults)  # says what is wrong with the flags
    options = {name: getattr(config, name) for name in RUNTIME if name != "model"}
    model = load(config.model, adapters=named, context=context, slots=slots, speculate=speculate, **options)
    print(printable(f"base: {base}"), file=sys.stderr)
    model.adapter = next(iter(named), None)
    return model


def make_config(given: Mapping[str, Any], config_file: str | None = None, **defaults: Any) -> TrainConfig:
    """Defaults, then the YAML file, then the flags: the later wins. Raises UserError naming the file or flag."""
    values = dict(defaults)
    if config_file is not None:
        values |= known_keys(TrainConfig, load_yaml(config_file), config_file, ALIASES)
    return TrainConfig.from_mapping(values | dict(given), "flags")
