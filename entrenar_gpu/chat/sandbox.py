"""A chat template compiled and rendered: jinja2's immutable sandbox with what transformers offers in it.

`trim_blocks`, `lstrip_blocks`, loop controls, the `generation` tag, `tojson` without HTML escapes, `raise_exception`
and `strftime_now`. Operators are bounded here, so that the common accidents get a message of their own; what a
template may take as a whole is bounded by the process it runs in (worker.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
Span = tuple[int, int]

# Bounds on a template, far above what real ones need: characters repeated, and loop turns over `range`; characters
# written, for each that the conversation has and beside them.
MAX_CHARACTERS = 2**26
MAX_RANGE_ITEMS = 10**6
WRITTEN_PER_CHARACTER, WRITTEN_ANYWAY = 16, 2**20

# Noncharacters (Unicode 23.7: never in interchanged text) that mark places in a rendering.
OPEN, CLOSE, ASKED, SAID, SLOT, SLOT_END = MARKS = "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4\ufdd5"

_OF_DICTIONARIES = frozenset(dir(dict))

# Names that a row may not set for its template: what the call itself passes.
RESERVED = frozenset({"self", "messages", "tools", "add_generation_prompt", "range", "raise_exception", "strftime_now"})


class TemplateFailure(Exception):
    """A template that failed, or a conversation that it cannot take; `at_fault` tells whether the template's file is
    to be named."""

    def __init__(self, message: str, at_fault: bool = True) -> None:
        super().__init__(message)
        self.at_fault = at_fault


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: writes its body between two marks."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opening, closing = (nodes.Output([nodes.TemplateData(mark)]) for mark in (OPEN, CLOSE))
        return [opening, *body, closing]


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which also refuses to multiply a text or a number into something enormous."""

    intercepted_binops = frozenset({"*", "**"})

    def getattr(self, obj: Any, attribute: str) -> Any:
        # the same value by the short way: jinja2 takes every key for an attribute first, and catches the exception
        if type(obj) is dict and attribute in obj and attribute not in _OF_DICTIONARIES:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, bytes, list, tuple)) and isinstance(times, int):
                if len(value) * times > MAX_CHARACTERS:
                    raise SecurityError("the template repeats a value too often")
            elif isinstance(value, int) and abs(value) >= 2**63:
                raise SecurityError("the template computes with too large a number")
        if operator == "**" and isinstance(right, (int, float)) and abs(right) > 64:
            raise SecurityError("the template computes too large a power")
        return super().call_binop(context, operator, left, right)


def _environment(now: datetime) -> _Sandbox:
    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now.strftime
    return environment


def _bounded_range() -> Callable[..., range]:
    """A `range` for one rendering, which stops loops over ranges inside loops over ranges."""
    left = MAX_RANGE_ITEMS

    def bounded(*bounds: int) -> range:
        nonlocal left
        result = range(*bounds)
        left -= len(result)
        if left < 0:
            raise SecurityError(f"the template loops over more than {MAX_RANGE_ITEMS} range items")
        return result

    return bounded


class CompiledTemplate:
    """A template that can be rendered. Raises TemplateFailure when its source is not valid.

    `variables` are the named special tokens that templates read (`bos_token`, ...), `special_tokens` all special
    tokens' texts (one of them ends a turn), `now` the clock that `strftime_now` shows.
    """

    def __init__(self, source: str, variables: Mapping[str, str], special_tokens: Iterable[str], now: datetime) -> None:
        self.source = source
        self.special_tokens = tuple(special_tokens)
        self._variables = dict(variables)
        try:
            self._template = _environment(now).from_string(source)
        except Exception as error:  # constants are computed while compiling: that can raise anything as well
            raise TemplateFailure(f"chat template is not valid: {one_line(error)}") from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The rendering with its marks. Raises TemplateFailure when the template refuses or fails."""
        pieces, size, most = [], 0, WRITTEN_ANYWAY
        try:
            given = {**self._variables, "documents": None, **(variables or {})}
            for piece in self._template.generate(
                **given,
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                range=_bounded_range(),
            ):
                pieces.append(piece)
                size += len(piece)
                if size > most == WRITTEN_ANYWAY:  # only now: to count what was given costs as much as to render it
                    most = min(WRITTEN_PER_CHARACTER * _size([messages, tools]) + WRITTEN_ANYWAY, MAX_CHARACTERS)
                if size > most:
                    raise SecurityError(f"the template writes more than {most} characters")
        except Exception as error:  # a template can raise anything, by accident or design
            raise TemplateFailure(f"chat template: {one_line(error)}") from None
        return "".join(pieces)


def _size(value: Any) -> int:
    """Characters in a JSON value's texts, and one for each value in it."""
    if isinstance(value, str):
        return len(value) + 1
    if isinstance(value, Mapping):
        return sum(_size(key) + _size(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return 1 + sum(map(_size, value))
    return 1


def holds_marks(value: Any) -> bool:
    """Whether a text anywhere in a JSON value holds one of the characters that mark places."""
    return re.search(f"[{MARKS}]", json.dumps(value, ensure_ascii=False)) is not None


def one_line(error: Exception) -> str:
    """What an error says, in a line of at most 200 characters."""
    if isinstance(error, MemoryError):
        return "needs too much memory"
    line = " ".join(str(error)[:1000].split()) or type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."
