"""The process in which chat templates run: code of strangers, bounded in time and memory as a whole.

`python -c` starts it (process.py) with a pipe on either side. A request is a line of JSON that says what to do and
how many lines follow, one for each conversation; every line of them is answered by one line, in order. A conversation
that takes more processor time than its length allows ends the process, one that takes too much memory fails. Where
the platform has no such limits the same `Service` runs in the asking process, with the bounds on operators alone
(sandbox.py).
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO

from entrenar_gpu.chat.sandbox import CompiledTemplate, TemplateFailure
from entrenar_gpu.chat.turns import Conversations

MEMORY_BYTES = 1 << 30
CPU_SECONDS, CPU_SECONDS_PER_MESSAGE = 2.0, 0.1
_TEMPLATES = 32  # kept compiled


@dataclass(frozen=True)
class TemplateSource:
    """All that a template is compiled from; `now` is ISO 8601. See CompiledTemplate."""

    source: str
    variables: tuple[tuple[str, str], ...]
    special_tokens: tuple[str, ...]
    now: str


class Service:
    """Answers requests about templates, with JSON values for JSON values."""

    def __init__(self, cpu_seconds: float | None = None) -> None:
        """`cpu_seconds` for a conversation, and some for each of its messages; None: no limit."""
        self._templates: dict[str, Conversations] = {}
        self._cpu_seconds = cpu_seconds

    def answers(self, request: dict[str, Any], rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """One answer for each row: a result, or {"error", "at_fault"}."""
        with self._time_limit(0):
            conversations = self._compiled(request["template"])
        for row in rows:
            with self._time_limit(len(row[0]) if request["ask"] != "closings" else 0):
                yield _outcome(request["ask"], conversations, row)

    @contextlib.contextmanager
    def _time_limit(self, messages: int) -> Iterator[None]:
        """Ends this process, as SIGPROF does by default, when the block takes too much of the processor's time."""
        if sys.platform != "win32" and self._cpu_seconds is not None:
            signal.setitimer(signal.ITIMER_PROF, self._cpu_seconds + CPU_SECONDS_PER_MESSAGE * messages)
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        else:
            yield

    def _compiled(self, template: dict[str, Any]) -> Conversations | dict[str, Any]:
        """The template of a request, compiled once; or the error that it makes."""
        key = json.dumps(template, sort_keys=True)
        if key not in self._templates:
            if len(self._templates) >= _TEMPLATES:
                self._templates.clear()
            try:
                compiled = CompiledTemplate(
                    template["source"],
                    dict(template["variables"]),
                    template["special_tokens"],
                    datetime.fromisoformat(template["now"]),
                )
            except TemplateFailure as error:
                return _error(error)
            self._templates[key] = Conversations(compiled)
        return self._templates[key]


def _outcome(ask: str, conversations: Conversations | dict[str, Any], row: Any) -> dict[str, Any]:
    if isinstance(conversations, dict):
        return conversations
    try:
        if ask == "closings":
            return {"closings": conversations.closings(row)}
        messages, tools, variables = row
        if ask == "turns":
            rendered = conversations.render_turns(messages, tools, variables)
        else:
            rendered = conversations.render(messages, tools, variables, ask == "prompt")
        return {"text": rendered.text, "spans": rendered.spans}
    except TemplateFailure as error:
        return _error(error)
    except (MemoryError, RecursionError) as error:
        return {"error": f"chat template: needs too much memory ({type(error).__name__})", "at_fault": True}


def _error(error: TemplateFailure) -> dict[str, Any]:
    return {"error": str(error), "at_fault": error.at_fault}


def main(cpu_seconds: float) -> None:
    """Limit this process, then serve requests until the pipe closes."""
    if sys.platform != "win32":
        import resource

        for what, most in (
            (resource.RLIMIT_AS, MEMORY_BYTES),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_FSIZE, 0),
        ):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(what, (most, most))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asked decides what an interrupt means
    _serve(Service(cpu_seconds), sys.stdin.buffer, sys.stdout.buffer)


def _serve(service: Service, requests: BinaryIO, answers: BinaryIO) -> None:
    while line := requests.readline():
        request = json.loads(line)
        rows = [requests.readline() for _ in range(request["rows"])]
        for answer in service.answers(request, map(json.loads, rows)):
            answers.write(json.dumps(answer).encode() + b"\n")
            answers.flush()
