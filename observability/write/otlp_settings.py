"""Which collector to export to, over which protocol: the `--otlp` flag and OpenTelemetry's environment variables.

Without the flag and without a variable nothing is sent: the run's file is the default. What a variable can say beyond
the choice (headers, certificates, compression, timeouts) the SDK's exporters read for themselves.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

from opentelemetry.sdk.metrics.export import MetricExporter
from opentelemetry.sdk.trace.export import SpanExporter

from observability.errors import TraceError

Signal = Literal["traces", "metrics"]
_Exporter = TypeVar("_Exporter")
_GRPC = {"grpc": "http", "grpcs": "https"}  # the scheme that the SDK's exporter takes: without and with TLS
_SCHEMES = ("http", "https", *_GRPC)


@dataclass(frozen=True)
class Target:
    """One signal's collector. `endpoint` is None where the SDK's exporter reads it from the environment."""

    signal: Signal
    protocol: Literal["http", "grpc"]
    endpoint: str | None
    name: str  # what messages call it


def sdk_disabled() -> bool:
    """Whether OTEL_SDK_DISABLED switches OpenTelemetry off: nothing is sent then, and the run's file is written."""
    return os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def target(signal: Signal, url: str | None) -> Target | None:
    """Where `signal` goes: to `url` if there is one, else where the environment says, else nowhere (None).

    Raises TraceError for an address or protocol that cannot be used.
    """
    if url is not None:
        return _from_url(signal, url)
    endpoint = _variable(signal, "ENDPOINT")
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    exporter = os.environ.get(variable, "").strip() or None
    if exporter not in (None, "otlp", "none"):
        raise TraceError(f"{variable}: expected otlp or none, not {exporter!r}")
    if exporter == "none" or (exporter != "otlp" and endpoint is None):
        return None
    protocol = _protocol(signal)
    if protocol == "http" and endpoint is not None and not endpoint.lower().startswith(("http://", "https://")):
        told = _shown(endpoint)
        raise TraceError(f"OTEL_EXPORTER_OTLP_ENDPOINT: expected http://HOST:4318 (https with TLS), not {told!r}")
    return Target(
        signal, protocol, None, _shown(endpoint) if endpoint else f"the collector on this machine ({protocol})"
    )


def _from_url(signal: Signal, url: str) -> Target:
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port  # raises where it is not a number
    except ValueError:  # whose text quotes what may be half of a password
        raise TraceError(f"--otlp: {_shown(url)!r} is no address: its host or port cannot be read") from None
    if parts.scheme not in _SCHEMES or not host:
        told = _shown(url)
        raise TraceError(f"--otlp: expected http://HOST:4318 or grpc://HOST:4317 (https, grpcs with TLS), not {told!r}")
    if parts.scheme in _GRPC:
        return Target(signal, "grpc", f"{_GRPC[parts.scheme]}://{parts.netloc}", _shown(url))
    if _protocol(signal) == "grpc":
        return Target(signal, "grpc", url, _shown(url))
    path = parts.path.rstrip("/").removesuffix("/v1/traces")
    address = urlunsplit((parts.scheme, parts.netloc, f"{path}/v1/{signal}", parts.query, ""))
    return Target(signal, "http", address, _shown(url))


def _variable(signal: Signal, name: str) -> str | None:
    """The signal's own variable, else the general one; an empty one counts as unset, as the specification has it."""
    own = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}")
    return own or os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") or None


def _protocol(signal: Signal) -> Literal["http", "grpc"]:
    protocol = _variable(signal, "PROTOCOL") or "http/protobuf"
    if protocol == "grpc":
        return "grpc"
    if protocol == "http/protobuf":
        return "http"
    raise TraceError(f"OTEL_EXPORTER_OTLP_PROTOCOL: expected http/protobuf or grpc, not {protocol!r}")


def environ_int(name: str, default: int) -> int:
    """The variable `name`, or `default` where it is not set or empty. Raises TraceError where it is no count."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) == 0:
        raise TraceError(f"{name}: expected a positive whole number, not {text!r}")
    return int(text)


class _LastWords(logging.Handler):
    """Keeps what an exporter last said, so that the one line about it can say why."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = " ".join(record.getMessage().split())[:200]


_LAST_WORDS = _LastWords()


def quiet_exporters() -> None:
    """Keep the SDK's exporters from logging each failed try: Sender warns once and the summary has the counts.

    A level that the program has chosen for them stands.
    """
    logger = logging.getLogger("opentelemetry.exporter")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.addHandler(_LAST_WORDS)


def last_words() -> str:
    """What an exporter last said of a failure, such as "Failed to export span batch code: 404, reason: Not Found"."""
    return without_secrets(_LAST_WORDS.text)


def without_secrets(text: str) -> str:
    """`text` with what may be a credential in its addresses left out, those that libraries tell without a host too."""
    text = re.sub(r"\w+://[^\s'\"]+", lambda found: _shown(found[0]), text)
    text = re.sub(r"(\s/[^\s'\"?]*\?)[^\s'\")]+", r"\1...", text)
    return re.sub(r"([?&][^=&\s#'\"]+)=[^&\s#'\"]*", r"\1=...", text)


def _shown(address: str) -> str:
    """What messages may show of an address: neither user and password, which may hold any sign, nor query or fragment.
    Of one that may be read in two ways, as where a ? stands before the @, the scheme alone."""
    scheme, separator, rest = address.partition("://")
    if not separator:  # a host and a port, as gRPC takes them
        return "..." if re.search("[@?#]", address) else address
    place, *query = re.split("[?#]", rest, maxsplit=1)
    if query and "@" in query[0]:
        return f"{scheme}://..."
    return f"{scheme}://{place.rpartition('@')[2]}{'?...' if query else ''}"


def span_exporter(to: Target) -> SpanExporter:
    """The SDK's span exporter for a target; the gRPC library is imported only where it is used.

    Raises TraceError where a variable that the exporter reads cannot be used.
    """
    if to.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return _made(GrpcExporter, to)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return _made(HttpExporter, to)


def metric_exporter(to: Target) -> MetricExporter:
    """The SDK's metric exporter for a target. Raises TraceError as `span_exporter` does."""
    if to.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcExporter

        return _made(GrpcExporter, to)
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpExporter

    return _made(HttpExporter, to)


def _made(exporter: Callable[..., _Exporter], to: Target) -> _Exporter:
    try:
        return exporter(endpoint=to.endpoint)
    except Exception as error:  # each variable has exceptions of its own
        raise TraceError(f"OTEL_EXPORTER_OTLP_*: {error}") from None
