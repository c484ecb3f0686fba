"""Traces in: OTLP JSON-lines files, run folders that hold one, and Jaeger's HTTP API, all as one `SpanTable`.

The file format is the OpenTelemetry file exporter's (opentelemetry.io/docs/specs/otel/protocol/file-exporter): one
`{"resourceSpans": [...]}` a line. Lines are read one at a time, so memory holds the table and one line. Understood too
are a file that Jaeger's user interface saved, one object or list of them spread over many lines, and any of it packed
with gzip.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Final

from observability import schema
from observability.errors import TraceError
from observability.read import index, jaeger_reader
from observability.read.long_trace import PART_SPANS, NotInParts, in_parts
from observability.read.own_lines import OwnLines
from observability.read.span_table import SpanCollector, SpanTable, as_text, as_truth
from observability.read.step_table import StepTable, step_table

_GZIP: Final = b"\x1f\x8b"
_LONG: Final = 32 * 2**20  # bytes, unpacked: longer traces are read in parts
_PACKING: Final = 12  # times smaller, roughly
_MAX_LINE: Final = 256 * 2**20  # bytes; a longer line is no exporter's


def read_trace(source: str | Path) -> SpanTable:
    """The spans of a run folder, a trace file, or a Jaeger address (http://host:16686, or one trace's page there).

    Raises TraceError when there is nothing to read, or nothing in it is a span.
    """
    collector = SpanCollector()
    if is_address(source):
        jaeger_reader.read_address(str(source), collector)
    else:
        for path in trace_files(Path(source)):
            lines = _Lines(path)
            for line in lines:
                lines.take(line, collector)
            collector.skipped.update(lines.skipped)
    return _not_empty(collector.table(), source)


def read_steps(source: str | Path) -> tuple[StepTable, SpanTable | int]:
    """The steps of the newest run in a trace, and its spans; where those are too many for memory, how many they are.

    What was found out of a long trace is kept beside it (index.py). Raises TraceError as `read_trace`, and where there
    is no step.
    """
    if is_address(source) or not _is_long(files := trace_files(Path(source))):
        spans = read_trace(source)
        return step_table(spans, str(source)), spans
    known = index.load(files)
    if known is not None:
        return known
    try:
        trace = in_parts(_parts(files), str(source))
    except NotInParts:
        spans = read_trace(source)
        return step_table(spans, str(source)), spans
    if not trace.spans:
        raise TraceError(f"{source}: no spans in it")
    table = trace.table()
    index.save(files, table, trace.spans)
    return table, trace.spans


def _not_empty(table: SpanTable, source: str | Path) -> SpanTable:
    if not len(table):
        reasons = "; ".join(f"{count} {reason}" for reason, count in table.skipped.items())
        raise TraceError(f"{source}: no spans in it" + (f" ({reasons})" if reasons else ""))
    return table


def _is_long(files: Sequence[Path]) -> bool:
    return sum(path.stat().st_size * (_PACKING if path.suffix == ".gz" else 1) for path in files) >= _LONG


def _parts(files: Sequence[Path]) -> Iterator[SpanCollector]:
    """Collectors of consecutive lines of a trace, each of which ends where a step begins."""
    collector = SpanCollector()
    for path in files:
        lines = _Lines(path)
        for line in lines:
            if len(collector) >= PART_SPANS and lines.begins_step(line):
                yield collector
                collector = SpanCollector()
            lines.take(line, collector)
        collector.skipped.update(lines.skipped)
    yield collector


def is_address(source: str | Path) -> bool:
    """Whether `source` is Jaeger's, and no file."""
    return str(source).startswith(("http://", "https://"))


def trace_path(path: Path) -> Path:
    """The trace file that `path` means: itself, or the one in a run folder."""
    if not os.path.exists(path):  # as Path.exists, but a name too long for any file is no error of its own
        raise TraceError(f"{path}: no such file or folder")
    if path.is_dir():
        packed = path / f"{schema.TRACE_FILE}.gz"
        if not (path / schema.TRACE_FILE).is_file() and packed.is_file():
            return packed
        if not (path / schema.TRACE_FILE).is_file():
            raise TraceError(f"{path}: no {schema.TRACE_FILE} in this folder; was the run traced?")
        return path / schema.TRACE_FILE
    return path


def trace_files(path: Path) -> list[Path]:
    """The files that hold a trace, in order: of a run folder the parts that a long run packed, and its last lines."""
    if not os.path.isdir(path):
        return [trace_path(path)]
    parts: dict[str, Path] = {}
    for name in (schema.TRACE_PARTS, f"{schema.TRACE_PARTS}.gz"):
        for part in sorted(path.glob(name)):
            parts[part.name.removesuffix(".gz")] = part  # packed where both are there: the other is about to go
    last = [path / name for name in (schema.TRACE_FILE, f"{schema.TRACE_FILE}.gz") if (path / name).is_file()]
    files = [parts[name] for name in sorted(parts)] + last[:1]
    return files or [trace_path(path)]


def newest_run(folder: Path) -> Path:
    """The folder of the trace that was written to last, at or below `folder`."""
    if not folder.is_dir():
        raise TraceError(f"{folder}: no such folder; name a run folder or a trace file")
    found = (path for path in folder.rglob(schema.TRACE_FILE) if path.is_file())
    traces = sorted(found, key=lambda path: path.stat().st_mtime)
    if not traces:
        raise TraceError(f"{folder}: no {schema.TRACE_FILE} at or below it")
    return traces[-1].parent


class _Lines:
    """The lines of a trace file, packed or not; what is wrong with the file is counted in `skipped`."""

    def __init__(self, path: Path) -> None:
        self.skipped: Counter[str] = Counter()
        self._path = path
        self._own = OwnLines(_attributes)

    def __iter__(self) -> Iterator[bytes]:
        # Opening a pipe that lies in a folder waits for somebody to write; what the shell hands over has its writer.
        if self._path.is_fifo() and not os.path.abspath(self._path).startswith(("/dev/", "/proc/")):
            raise TraceError(f"{self._path}: cannot be read: it is no file")
        try:
            with self._path.open("rb") as file:
                packed = file.peek(2).startswith(_GZIP)
                yield from self._read(gzip.GzipFile(fileobj=file) if packed else file)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            self.skipped["end of the compressed file cut short or broken"] += 1
        except OSError as error:
            raise TraceError(f"{self._path}: cannot be read: {error.strerror}") from None

    def _read(self, stream: BufferedIOBase) -> Iterator[bytes]:
        number = 0
        while line := stream.readline(_MAX_LINE):
            number += 1
            if len(line) == _MAX_LINE:
                raise TraceError(f"{self._path}: line {number} is longer than {_MAX_LINE >> 20} MiB")
            if number == 1 and line.strip() in (b"{", b"["):  # one object over many lines, as people and browsers save
                line = line + stream.read(_MAX_LINE)
            if line.strip():
                yield line

    def begins_step(self, line: bytes) -> bool:
        return self._own.begins_step(line)

    def take(self, line: bytes, collector: SpanCollector) -> None:
        if not self._own.read(line, collector):
            _read_line(line, collector)


def _read_line(line: bytes, collector: SpanCollector) -> None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        reason = "lines that are not JSON" if line.endswith(b"\n") else "last line cut short"
        collector.skipped[reason] += 1
        return
    for request in value if isinstance(value, list) and value else [value]:
        if isinstance(request, dict) and isinstance(request.get("resourceSpans"), list):
            for resource, span in _spans(request, collector):
                _add_span(resource, span, collector)
        elif isinstance(request, dict) and isinstance(request.get("data"), list):
            jaeger_reader.add_traces(request["data"], collector)
        else:
            collector.skipped["lines without spans"] += 1


def _spans(request: Mapping[str, Any], collector: SpanCollector) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(resource attributes, span) of every span in one ExportTraceServiceRequest."""
    for group in _dicts(request.get("resourceSpans"), collector):
        resource_object = group.get("resource")
        resource = _attributes(resource_object.get("attributes")) if isinstance(resource_object, dict) else {}
        collector.describe(resource)
        for scope in _dicts(group.get("scopeSpans"), collector):
            for span in _dicts(scope.get("spans"), collector):
                yield resource, span


def _dicts(value: Any, collector: SpanCollector) -> Iterator[dict[str, Any]]:
    for item in value if isinstance(value, list) else ():
        if isinstance(item, dict):
            yield item
        else:
            collector.skipped["malformed spans"] += 1


def _add_span(resource: Mapping[str, Any], span: dict[str, Any], collector: SpanCollector) -> None:
    trace, identity, name = span.get("traceId"), span.get("spanId"), span.get("name")
    try:
        start, end = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
    except (KeyError, TypeError, ValueError, OverflowError):
        collector.skipped["spans without usable times"] += 1
        return
    if not (isinstance(trace, str) and isinstance(identity, str) and isinstance(name, str) and trace and identity):
        collector.skipped["malformed spans"] += 1
        return
    parent, attributes = str(span.get("parentSpanId") or ""), _attributes(span.get("attributes"))
    collector.add(trace, identity, parent, name, start, end, attributes, resource)


def _attributes(pairs: Any) -> dict[str, Any]:
    """OTLP key-value pairs as a dict; lists and maps are left out, as the schema has none."""
    result: dict[str, Any] = {}
    for pair in pairs if isinstance(pairs, list) else ():
        try:
            ((kind, value),) = pair["value"].items()
            result[pair["key"]] = _DECODERS[kind](value)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            continue
    return result


# 64-bit integers are strings in OTLP/JSON, doubles may be "NaN" or "Infinity"
_DECODERS: Final[dict[str, Callable[[Any], Any]]] = {
    "stringValue": as_text,
    "intValue": int,
    "doubleValue": float,
    "boolValue": as_truth,
}
