"""Finished spans to where they are kept: the run's OTLP JSON-lines file, and a sender to a collector.

Neither ever makes its caller wait. `TraceFile` is called from the tracing thread; `Sender` has a thread of its own
behind a bounded queue, so that a collector that is dead, slow or unwell costs spans (counted), never time.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import math
import os
import shutil
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from json.encoder import encode_basestring_ascii as quote  # in C
from pathlib import Path
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from observability import schema
from observability.errors import TraceError
from observability.write.otlp_settings import last_words

_log = logging.getLogger(__name__)

PART_BYTES = 64 * 2**20  # of lines: an hour or so of steps, packed to a tenth
_PART = "trace.{:05d}.jsonl"  # as schema.TRACE_PARTS matches
_PACK_LEVEL = 6
_PACK_SECONDS = 10.0

# SpanFlags of trace.proto: bit 8 says that bit 9, "the parent is in another process", is meaningful.
_HAS_IS_REMOTE = 0x100
_IS_REMOTE = 0x200
_KIND_INTERNAL = 1


def encode_line(spans: Sequence[ReadableSpan], head: str) -> bytes:
    """`spans`, all of one resource and scope, as one line of OTLP/JSON; `head` is what `line_head` made of those two.

    Written by hand, as a generic encoder takes five times as long: this is most of what tracing costs.
    """
    return (head + ",".join([_span(span) for span in spans]) + "]}]}]}\n").encode("ascii")


def line_head(resource: Resource, scope_name: str, scope_version: str) -> str:
    """The part of a line before its spans."""
    attributes = _attributes(resource.attributes)
    scope = f'{{"name":{quote(scope_name)},"version":{quote(scope_version)}}}'
    return f'{{"resourceSpans":[{{"resource":{{"attributes":{attributes}}},"scopeSpans":[{{"scope":{scope},"spans":['


def _span(span: ReadableSpan) -> str:
    context, parent = span.context, span.parent
    flags = _HAS_IS_REMOTE
    link = ""
    if parent is not None:
        link = f'"parentSpanId":"{parent.span_id:016x}",'
        flags |= _IS_REMOTE if parent.is_remote else 0
    status = ""
    if span.status.status_code.value:
        message = f'"message":{quote(span.status.description)},' if span.status.description else ""
        status = f'{message}"code":{span.status.status_code.value}'
    return (
        f'{{"traceId":"{context.trace_id:032x}","spanId":"{context.span_id:016x}",{link}"flags":{flags},'
        f'"name":{quote(span.name)},"kind":{_KIND_INTERNAL},'
        f'"startTimeUnixNano":"{span.start_time}","endTimeUnixNano":"{span.end_time}",'
        f'"attributes":{_attributes(span.attributes or {})},"status":{{{status}}}}}'
    )


def _attributes(values: Mapping[str, Any]) -> str:
    return "[" + ",".join([f'{{"key":{_key(key)},"value":{_value(value)}}}' for key, value in values.items()]) + "]"


_key = lru_cache(maxsize=1024)(quote)


def _value(value: str | bool | int | float) -> str:
    """An AnyValue in OTLP/JSON: integers as strings, and the three doubles that JSON lacks as protobuf names them."""
    if isinstance(value, str):
        return f'{{"stringValue":{quote(value)}}}'
    if isinstance(value, bool):
        return '{"boolValue":true}' if value else '{"boolValue":false}'
    if isinstance(value, int):
        return f'{{"intValue":"{value}"}}'
    if math.isfinite(value):
        return f'{{"doubleValue":{value!r}}}'
    name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return f'{{"doubleValue":"{name}"}}'


class TraceFile:
    """The run's trace file, appended to by the line. A failing disk loses spans, and ends no run.

    From PART_BYTES on its lines become a numbered part, which a thread packs, and the file begins anew.
    """

    def __init__(self, path: Path, head: str) -> None:
        """Raises TraceError where the file cannot be opened."""
        self.path = path
        self.written = 0  # spans
        self.lost = 0  # spans
        self._head = head
        self._packer: threading.Thread | None = None
        self._most: float = PART_BYTES
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_partial_line(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise TraceError(f"{path}: cannot be written: {error.strerror or error}") from None
        self._pack()  # what an earlier process left

    def write(self, spans: Sequence[ReadableSpan]) -> None:
        """Append `spans` as one line, handed to the operating system before this returns."""
        line = encode_line(spans, self._head)
        start = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk took a part of a line")
        except OSError as error:
            if not self.lost:
                _log.warning("%s: %s; spans are lost, training goes on", self.path, error)
            self.lost += len(spans)
            self._file.truncate(start)
        else:
            self.written += len(spans)
            if start + len(line) >= self._most:
                self._begin_anew()

    def _begin_anew(self) -> None:
        """Make a part of what the file holds; where that fails, the file just grows on."""
        self.sync()
        self._file.close()  # no open file has its name changed on Windows
        try:
            os.rename(self.path, self.path.with_name(_PART.format(_last_part(self.path.parent) + 1)))
        except OSError as error:
            _log.warning("%s: %s; it stays one file", self.path, error)
            self._most = math.inf
        self._file = self.path.open("ab", buffering=0)
        self._pack()

    def _pack(self) -> None:
        """Pack the parts that are not, behind the run's back; what is not done at its end, a later run does."""
        if self._packer is None or not self._packer.is_alive():
            self._packer = threading.Thread(
                target=_pack_parts, args=(self.path.parent,), name="trace-pack", daemon=True
            )
            self._packer.start()

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:  # a pipe, or a disk that fails: spans may be lost, the run goes on
            _log.debug("%s: %s", self.path, error)

    def close(self) -> None:
        """Close the file; parts still being packed get a little time."""
        self._file.close()
        if self._packer is not None:
            self._packer.join(_PACK_SECONDS)


def _last_part(folder: Path) -> int:
    """The number of the newest part in `folder`, packed or not; 0 where there is none."""
    names = [part.name for part in folder.glob(f"{schema.TRACE_PARTS}*")]
    return max((int(name.split(".")[1]) for name in names), default=0)


def _pack_parts(folder: Path) -> None:
    """Pack each part in `folder`, which is there either as it was or packed whole; the first is the oldest."""
    for part in sorted(folder.glob(schema.TRACE_PARTS)):
        packed, temporary = part.with_name(f"{part.name}.gz"), part.with_name(f".{part.name}.gz.tmp")
        try:
            if not packed.exists():
                with part.open("rb") as source, gzip.open(temporary, "wb", compresslevel=_PACK_LEVEL) as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                os.replace(temporary, packed)
            part.unlink()
        except OSError as error:  # a full disk: the part stays as it is, and can be read
            _log.debug("%s: cannot be packed: %s", part, error)
            with contextlib.suppress(OSError):
                temporary.unlink()
            return


def _drop_partial_line(path: Path) -> None:
    """Cut off what a kill or a power failure left of a last line, so that what is appended starts a line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        position = end = file.seek(0, os.SEEK_END)
        while position:
            block = min(position, 65536)
            file.seek(position - block)
            newline = file.read(block).rfind(b"\n")
            if newline >= 0:
                position += newline + 1 - block
                break
            position -= block
        if position != end:
            file.truncate(position)


class Sender:
    """A thread that exports spans in batches from a bounded queue, and counts what became of each."""

    def __init__(self, exporter: SpanExporter, target: str, limit: int, batch: int, period_seconds: float) -> None:
        self.sent = 0
        self._failed = 0
        self._refused = 0  # the queue was full
        self._offered = 0
        self._exporter = exporter
        self._target = target
        self._limit = limit
        self._batch = batch
        self._period = period_seconds
        self._queue: deque[ReadableSpan] = deque()
        self._stop = threading.Event()
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="otlp-sender", daemon=True)
        self._thread.start()

    def put(self, spans: Sequence[ReadableSpan]) -> None:
        """Queue `spans`, or as many as there is room for. From one thread only."""
        room = max(self._limit - len(self._queue), 0)
        self._offered += len(spans)
        self._refused += max(len(spans) - room, 0)
        self._queue.extend(spans[:room])

    @property
    def dropped(self) -> int:
        """Spans that did not arrive: refused, failed, or (after `close`) not sent in time."""
        if self._stop.is_set():
            return self._offered - self.sent
        return self._refused + self._failed

    def close(self, timeout_seconds: float) -> None:
        """Send what is queued, within the timeout; what is not sent by then is dropped."""
        self._stop.set()
        self._thread.join(timeout_seconds)
        self._abandoned = True
        self._exporter.shutdown()

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self._drain()
        self._drain()

    def _drain(self) -> None:
        while self._queue and not self._abandoned:
            batch = [self._queue.popleft() for _ in range(min(self._batch, len(self._queue)))]
            try:
                result = self._exporter.export(batch)
            except Exception as error:
                # Whatever is wrong with one batch (or with the exporter), the next gets its chance.
                _log.debug("exporting to %s: %s", self._target, error)
                result = SpanExportResult.FAILURE
            if result is SpanExportResult.SUCCESS:
                self.sent += len(batch)
                continue
            if not self._failed:
                why = last_words()
                said = f" ({why})" if why else ""
                _log.warning("%s does not take spans%s; they are dropped, training goes on", self._target, said)
            self._failed += len(batch)
