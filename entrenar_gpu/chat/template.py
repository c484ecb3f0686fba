"""A chat template as others use it: conversations in, texts and what the assistant says out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from entrenar_gpu.chat.process import TEMPLATES
from entrenar_gpu.chat.sandbox import RESERVED, Message
from entrenar_gpu.chat.turns import Rendered
from entrenar_gpu.chat.worker import TemplateSource
from entrenar_gpu.errors import UserError

_TOOL = {"type": "function", "function": {"name": "a", "description": "a", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class Conversation:
    """What a template renders; `variables` are a row's `chat_template_kwargs`."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := sorted(RESERVED & self.variables.keys()):
            raise UserError(f"chat_template_kwargs: {taken[0]} cannot be set by a row")


class ChatTemplate:
    """One chat template, compiled. `path` names its file in errors.

    `variables` are the named special tokens that templates read (`bos_token`, ...), `special_tokens` all special
    tokens' texts (one of them ends a turn), `now` the clock that `strftime_now` shows. `closings` are the texts that
    close the assistant's turn: a special token, or words; none where the template does not tell. Raises UserError when
    the source is not a template.
    """

    def __init__(
        self, source: str, path: str, variables: Mapping[str, str], special_tokens: Iterable[str], now: datetime
    ) -> None:
        self.path = path
        self._source = TemplateSource(
            source, tuple(sorted(variables.items())), tuple(sorted(special_tokens)), now.isoformat()
        )
        answers = self._ask("closings", [None, [_TOOL]])
        self.closings = tuple(dict.fromkeys(text for answer in answers for text in answer["closings"]))

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        """The conversation as the model reads it; with the opening of the assistant's turn if asked.

        Raises UserError naming the template's file when the template refuses the conversation or fails.
        """
        (rendered,) = self.render_all([Conversation(messages, tools)], "prompt" if add_generation_prompt else "text")
        return rendered.text

    def render_turns(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """The conversation, and what the assistant says in it: the template's `generation` tags, or every turn.

        Raises UserError as `render` does, and when the template gives no way to tell a turn's extent.
        """
        (rendered,) = self.render_all([Conversation(messages, tools)], "turns")
        return rendered

    def render_all(self, conversations: Sequence[Conversation], ask: str) -> list[Rendered]:
        """Each conversation as `ask` says: "text", "prompt" (with the opening of an answer), or "turns".

        Raises FailedRow, a UserError, at the first that fails.
        """
        rows = [[c.messages, c.tools, c.variables] for c in conversations]
        return [Rendered(answer["text"], [(a, b) for a, b in answer["spans"]]) for answer in self._ask(ask, rows)]

    def _ask(self, ask: str, rows: Sequence[Any]) -> list[dict[str, Any]]:
        answers = TEMPLATES.ask(ask, self._source, rows)
        for row, answer in enumerate(answers):
            if "error" in answer:
                raise FailedRow(f"{self.path}: " * answer["at_fault"] + answer["error"], row)
        return answers


class FailedRow(UserError):
    """What is wrong with the conversation at index `row` of those that were rendered together."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row
