"""Lines as this project's tracing writes them, read in a fifth of the time that any OTLP/JSON takes.

A run of 100,000 steps has eight million spans. Their lines all have one shape (write/export.py), the same resource
again and again, and attributes that most spans share with thousands of others; so one expression takes a line apart,
and what was understood of a resource or of attributes is kept. A line that does not have this shape to the last
character is left to the general reader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from observability import schema
from observability.read.span_table import SpanCollector, SpanFacts

_SPAN: Final = re.compile(
    r'\{"traceId":"([0-9a-f]{32})","spanId":"([0-9a-f]{16})",("parentSpanId":"[0-9a-f]{16}",|)"flags":([0-9]{1,10}),'
    r'"name":"([^"\\]*)","kind":1,"startTimeUnixNano":"([0-9]{1,20})","endTimeUnixNano":"([0-9]{1,20})",'
    r'"attributes":(\[[^\]]*\]),"status":(\{[^{}]*\})\}'
)
# What the expression takes of a span beside its groups, and the comma after it.
_FIXED: Final = len(
    '{"traceId":"","spanId":"","flags":,"name":"","kind":1,"startTimeUnixNano":"","endTimeUnixNano":"","attributes":,'
    '"status":},'
)
_BEGIN: Final = '"spans":[{"traceId":"'
_TAIL: Final = "]}]}]}\n"
_PARENT_AT: Final = len('"parentSpanId":"')
_SHARED: Final = 400  # characters: longer attributes are a step's own
_MOST_KEPT: Final = 20_000
_STEP: Final = f'"name":"{schema.STEP}"'


class OwnLines:
    """Reads lines of one file; `decode` makes a mapping of attributes of OTLP's list of them."""

    def __init__(self, decode: Callable[[Any], dict[str, Any]]) -> None:
        self._decode = decode
        self._head = ""
        self._resource: Mapping[str, Any] = {}
        self._kept: dict[tuple[str, str], SpanFacts] = {}

    def begins_step(self, line: bytes) -> bool:
        """Whether the first span of a line is a step's, so that the spans before it need not be known for it."""
        return _STEP.encode() in line[: line.find(b'"kind"') + 1 or None][-200:]

    def read(self, line: bytes, collector: SpanCollector) -> bool:
        """Adds the spans of a line; False, and nothing added, where it is not of this shape."""
        try:
            text = line.decode("ascii")
        except UnicodeDecodeError:
            return False
        if not text.endswith(_TAIL) or not self._understood(text):
            return False
        found = _SPAN.findall(text, len(self._head), len(text) - len(_TAIL))
        body = len(text) - len(self._head) - len(_TAIL)
        if not found or sum(len("".join(span)) for span in found) + _FIXED * len(found) - 1 != body:
            return False
        try:
            rows = [(*span, self._facts(span[4], span[7])) for span in found]
        except (ValueError, RecursionError):
            return False
        collector.describe(self._resource)
        run = self._resource.get(schema.RUN_ID)
        for trace, identity, parent, _, name, start, end, _, _, facts in rows:
            above = trace + parent[_PARENT_AT : _PARENT_AT + 16] if parent else ""
            collector.put(trace, identity, above, name, int(start), int(end), facts, run, self._resource)
        return True

    def _understood(self, text: str) -> bool:
        """Whether the part before the spans is known, or can be."""
        if self._head and text.startswith(self._head):
            return True
        at = text.find(_BEGIN)
        head = text[: at + len('"spans":[')]
        try:
            groups = json.loads(f"{head}{_TAIL}")["resourceSpans"]
            ((group,), (scopes,)) = groups, groups[0]["scopeSpans"]
            attributes = self._decode(group["resource"]["attributes"])
            if at < 0 or scopes["spans"]:
                return False
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            return False
        self._head, self._resource = head, attributes
        return True

    def _facts(self, name: str, attributes: str) -> SpanFacts:
        if len(attributes) > _SHARED:
            return SpanFacts.of(name, self._decode(json.loads(attributes)))
        facts = self._kept.get((name, attributes))
        if facts is None:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            facts = self._kept[name, attributes] = SpanFacts.of(name, self._decode(json.loads(attributes)))
        return facts
