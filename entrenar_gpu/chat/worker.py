"""The process in which chat templates run: code of strangers, bounded in time and memory as a whole.

`python -c` starts it (process.py) with a pipe on either side. A request is a line of JSON that says what to do and
how many lines follow, one for each conversation; every line of them is answered by one line, in order. Where that says
`bytes`, so many of the text follow it: within JSON they would take as long again as to render. A conversation that
takes more processor time than its length allows ends the process, and so does the one that takes a template over what
all of its conversations together are allowed; one that takes too much memory fails. Where the platform has no such
limits the same `Service` runs in the asking process, with the bounds on operators alone (sandbox.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO

from entrenar_gpu.chat.sandbox import CompiledTemplate, TemplateFailure
from entrenar_gpu.chat.turns import Conversations

MEMORY_BYTES = 1 << 30
CPU_SECONDS, CPU_SECONDS_PER_MESSAGE = 2.0, 0.1
# Of all conversations that a template renders: some ten times what ordinary ones take, whose loops over all messages
# are run again for each turn that is looked for; and four conversations' limit beside that.
_ROW_SECONDS, _PAIR_SECONDS, _BYTE_SECONDS = 0.002, 0.0002, 1e-7
_ANYWAY = 4
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
        self._left: dict[str, float] = {}  # seconds that a template may still take
        self._cpu_seconds = cpu_seconds

    def answers(self, request: dict[str, Any], lines: Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
        """One answer for each row, which comes as a line of JSON: a result, or {"error", "at_fault"}."""
        key = json.dumps(request["template"], sort_keys=True)
        with self._time_limit(0, math.inf):
            conversations = self._compiled(key, request["template"])
        left = self._left.setdefault(key, _ANYWAY * (self._cpu_seconds or 0.0))
        for line in lines:
            row = json.loads(line)
            messages = len(row[0]) if request["ask"] != "closings" else 0
            left += messages * (_ROW_SECONDS + _PAIR_SECONDS * messages) + _BYTE_SECONDS * len(line)
            start = time.process_time()
            with self._time_limit(messages, left):
                yield _outcome(request["ask"], conversations, row)
            left -= time.process_time() - start
            self._left[key] = left

    @contextlib.contextmanager
    def _time_limit(self, messages: int, left: float) -> Iterator[None]:
        """Ends this process, as SIGPROF does by default, when the block takes too much of the processor's time, or more
        than is `left` of its template's."""
        if sys.platform != "win32" and self._cpu_seconds is not None:
            seconds = min(self._cpu_seconds + CPU_SECONDS_PER_MESSAGE * messages, left)
            signal.setitimer(signal.ITIMER_PROF, max(seconds, 1e-3))
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        else:
            yield

    def _compiled(self, key: str, template: dict[str, Any]) -> Conversations | dict[str, Any]:
        """The template of a request, compiled once; or the error that it makes."""
        if key not in self._templates:
            if len(self._templates) >= _TEMPLATES:
                self._templates.clear()
                self._left.clear()
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
        for answer in service.answers(request, rows):
            text = answer.pop("text", None)
            body = b"" if text is None else text.encode("utf-8", "surrogatepass")
            head = answer if text is None else {**answer, "bytes": len(body)}
            answers.write(json.dumps(head).encode() + b"\n" + body)
            answers.flush()  # a later one may end this process
