"""Real OTLP receivers, HTTP and gRPC, on a free port of this machine: they decode what arrives and keep it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from gzip import decompress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue


@dataclass
class Received:
    """What a receiver got, and how it is to behave: `delay` seconds before each answer, `failures` 503s first."""

    url: str = ""
    delay: float = 0.0
    failures: int = 0
    requests: int = 0
    headers: list[dict[str, str]] = field(default_factory=list)
    spans: list[Any] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)

    def traces(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        for resource_spans in request.resource_spans:
            self.resources.append(values(resource_spans.resource.attributes))
            for scope_spans in resource_spans.scope_spans:
                self.spans += scope_spans.spans

    def measurements(self, request: metrics_service_pb2.ExportMetricsServiceRequest) -> None:
        for resource_metrics in request.resource_metrics:
            for scope_metrics in resource_metrics.scope_metrics:
                self.metrics |= {metric.name: metric for metric in scope_metrics.metrics}


def values(attributes: Any) -> dict[str, Any]:
    """Decoded attributes as plain values."""
    pairs: list[KeyValue] = list(attributes)
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@contextmanager
def http_receiver(**behaviour: Any) -> Iterator[Received]:
    received = Received(**behaviour)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.requests += 1
            received.headers.append({key.lower(): value for key, value in self.headers.items()})
            time.sleep(received.delay)
            if received.failures > 0:
                received.failures -= 1
                self.answer(503)
                return
            if self.headers.get("Content-Encoding") == "gzip":
                body = decompress(body)
            path = self.path.partition("?")[0]
            if path == "/v1/traces":
                received.traces(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
            elif path == "/v1/metrics":
                received.measurements(metrics_service_pb2.ExportMetricsServiceRequest.FromString(body))
            else:
                self.answer(404)
                return
            self.answer(200)

        def answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that gave up waiting

    server = Server(("127.0.0.1", 0), Handler)
    received.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def grpc_receiver(**behaviour: Any) -> Iterator[Received]:
    received = Received(**behaviour)

    class Traces(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
            received.requests += 1
            received.headers.append(dict(context.invocation_metadata()))
            time.sleep(received.delay)
            if received.failures > 0:
                received.failures -= 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "try again")
            received.traces(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    class Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
        def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
            received.measurements(request)
            return metrics_service_pb2.ExportMetricsServiceResponse()

    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Traces(), server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Metrics(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    received.url = f"grpc://127.0.0.1:{port}"
    try:
        yield received
    finally:
        server.stop(None)
