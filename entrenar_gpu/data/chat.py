"""Chat templates: a conversation becomes one text, and where in it the assistant speaks.

A model's template is code from a stranger. It runs in jinja2's immutable sandbox, with bounds on what it may compute,
and whatever goes wrong in it is a `UserError` naming its file. The environment offers what transformers offers:
`trim_blocks`, `lstrip_blocks`, loop controls, the `generation` tag, `tojson` without HTML escapes,
`raise_exception` and `strftime_now`.

What is trained is what the model itself would say when asked: from the end of the generation prompt up to and
including the token that ends the turn, in the one rendering of the whole conversation. So Qwen3's empty think block
in the last turn is trained (its generation prompt stops before it), and the newline after `<|im_end|>` is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from entrenar_gpu.errors import UserError

Message = Mapping[str, Any]
Span = tuple[int, int]

# Bounds on a template, far above what real ones need: characters written or repeated, and loop turns over `range`.
MAX_CHARACTERS = 2**26
MAX_RANGE_ITEMS = 10**6

# Noncharacters (Unicode 23.7: never in interchanged text) that mark places in a rendering.
_OPEN, _CLOSE, _ASKED, _SAID = _MARKS = "\ufdd0\ufdd1\ufdd2\ufdd3"


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: writes its body between two marks."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opening, closing = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_OPEN, _CLOSE))
        return [opening, *body, closing]


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which also refuses to multiply a text or a number into something enormous."""

    intercepted_binops = frozenset({"*", "**"})

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


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the character span [start, end) of each stretch that the assistant says."""

    text: str
    spans: list[Span]


class ChatTemplate:
    """One chat template, compiled. `path` names its file in errors.

    `variables` are the named special tokens that templates read (`bos_token`, ...), `special_tokens` all special
    tokens' texts (one of them ends a turn), `now` the clock that `strftime_now` shows.
    """

    def __init__(
        self, source: str, path: str, variables: Mapping[str, str], special_tokens: Iterable[str], now: datetime
    ) -> None:
        self.path = path
        self._variables = dict(variables)
        self._special_tokens = tuple(special_tokens)
        try:
            self._template = _environment(now).from_string(source)
        except (TemplateError, RecursionError, ValueError) as error:
            raise UserError(f"{path}: chat template is not valid: {_one_line(error)}") from None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        """The conversation as the model reads it; with the opening of the assistant's turn if asked.

        Raises UserError naming the template's file when the template refuses the conversation or fails.
        """
        return _unmarked(self._render(messages, tools, add_generation_prompt)).text

    def render_turns(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """The conversation, and what the assistant says in it: the template's `generation` tags, or every turn.

        Raises UserError as `render` does, and when the template gives no way to tell a turn's extent.
        """
        rendered = _unmarked(self._render(messages, tools))
        if rendered.spans:
            return rendered
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return Rendered(rendered.text, [self._turn(messages, i, rendered.text, tools) for i in turns])

    def _turn(self, messages: Sequence[Message], i: int, text: str, tools: Sequence[Any] | None) -> Span:
        """Where message `i`, of the assistant, stands in `text`, the rendering of all `messages`.

        Templates strip contents, repeat them, add think blocks to some turns only, or write tool calls, so neither
        searching for the content nor comparing with the rendering of a shorter conversation finds the turn. A mark
        in place of the content does; what two renderings have in common around it tells whose the text beside it is:

            before  = ... the question and the generation prompt, frame (Qwen3's last turn: an empty think block)
            after   = closing (the token that ends the turn), rest (a newline and the messages that follow)
        """
        said = {"role": "assistant", "content": _SAID}
        before, after = self._around(_SAID, [*messages[:i], said, *messages[i + 1 :]], tools)

        # The frame goes beyond the generation prompt. Both are read from the end of the question, which is marked too:
        # what comes earlier may render differently in the shorter conversation that ends with the prompt.
        context = messages[:i] or [{"role": "user"}]
        asked = [*context[:-1], _asking(context[-1])]
        prompt = self._around(_ASKED, asked, tools, add_generation_prompt=True)[1]
        answered = self._around(_ASKED, [*asked, said, *messages[i + 1 :]], tools)[1].partition(_SAID)[0]
        frame = answered[_common_length(prompt, answered) :]
        start = len(before) - len(frame)

        # The closing follows the content whether or not another message comes.
        alone = after if i == len(messages) - 1 else self._around(_SAID, [*messages[:i], said], tools)[1]
        rest = after[self._closing_length(after[: _common_length(after, alone)]) :]
        end = len(text) - len(rest)

        located = before.endswith(frame) and text.startswith(before[:start]) and text.endswith(rest) and start <= end
        if not located:
            raise self._untraceable(i)
        return start, end

    def _closing_length(self, closing: str) -> int:
        """Length of the part of `closing` that the model says: to the end of its first special token, if any."""
        ends = [(at, at + len(token)) for token in self._special_tokens if (at := closing.find(token)) >= 0]
        return min(ends)[1] if ends else len(closing.rstrip())

    def _around(
        self, mark: str, messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool = False
    ) -> tuple[str, str]:
        """The rendering before and after `mark`, which stands in place of one message's content."""
        before, found, after = self._render(messages, tools, add_generation_prompt, marked=True).partition(mark)
        if not found:
            raise self._untraceable(next(i for i, m in enumerate(messages) if mark in (m.get("content") or "")))
        return before, after

    def _untraceable(self, i: int) -> UserError:
        return UserError(
            f"{self.path}: cannot tell where the chat template puts message {i + 1}; loss on all tokens (--loss-on all)"
            " needs no such place"
        )

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool = False,
        marked: bool = False,
    ) -> str:
        """The rendering with its marks; messages may hold none but where `marked` says that we put them there."""
        if not marked and any(mark in json.dumps([*messages], ensure_ascii=False) for mark in _MARKS):
            raise UserError("a message holds a Unicode noncharacter (U+FDD0 to U+FDD3)")
        pieces, size = [], 0
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                range=_bounded_range(),
                **self._variables,
            ):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise SecurityError(f"the template writes more than {MAX_CHARACTERS} characters")
        except Exception as error:  # a template can raise anything, by accident or design
            raise UserError(f"{self.path}: chat template: {_one_line(error)}") from None
        return "".join(pieces)


def _asking(message: Message) -> Message:
    """`message` with a mark within its content: templates look at its ends (Qwen3 knows tool responses by them)."""
    content = message.get("content")
    if message["role"] == "assistant" or not isinstance(content, str):
        return {"role": message["role"], "content": _ASKED}
    middle = len(content) // 2
    return {**message, "content": content[:middle] + _ASKED + content[middle:]}


def _common_length(a: str, b: str) -> int:
    """How many characters `a` and `b` begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _unmarked(marked: str) -> Rendered:
    """The text without the marks of `generation` tags, and the spans they enclosed."""
    text = ""
    spans: list[Span] = []
    for i, piece in enumerate(marked.replace(_CLOSE, _OPEN).split(_OPEN)):
        if i % 2:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return Rendered(text, spans)


def _one_line(error: Exception) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."
