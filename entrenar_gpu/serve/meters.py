"""Prometheus metrics of a server; the names follow vLLM's where there is one, with our prefix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from entrenar_gpu.events import RequestRecord
from entrenar_gpu.serve.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
ROUTES = ("/v1/chat/completions", "/v1/completions")


class Meters:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("entrenar_requests", "requests by HTTP status", ["status"], registry=registry)
        self._prompt = Counter("entrenar_prompt_tokens", "tokens of prompts", registry=registry)
        self._cached = Counter("entrenar_cached_tokens", "of these, read from the key/value cache", registry=registry)
        self._drawn = Counter("entrenar_generation_tokens", "tokens of answers", registry=registry)
        first, whole = "seconds to the first token", "seconds to the end of the answer"
        self._first = Histogram("entrenar_time_to_first_token_seconds", first, buckets=_SECONDS, registry=registry)
        self._whole = Histogram("entrenar_request_seconds", whole, buckets=_SECONDS, registry=registry)
        scheduler = engine.scheduler
        for name, meaning, value in (
            ("entrenar_requests_running", "answers that have a slot", lambda: scheduler.running),
            ("entrenar_requests_waiting", "answers that wait for one", lambda: scheduler.waiting),
            ("entrenar_requests_reserved", "answers asked for and not ended", lambda: engine.reserved),
            ("entrenar_slots", "slots of the key/value cache", lambda: scheduler.decoder.slots),
            ("entrenar_draft_tokens", "tokens tried as drafts", lambda: scheduler.speculation.drafted),
            ("entrenar_draft_tokens_accepted", "of these, right", lambda: scheduler.speculation.accepted),
        ):
            Gauge(name, meaning, registry=registry).set_function(value)

    def count(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self._requests.labels(status=str(record.status)).inc()
        self._prompt.inc(record.prompt_tokens)
        self._cached.inc(record.cached_tokens)
        self._drawn.inc(record.completion_tokens)
        if record.first_token_ns:
            self._first.observe((record.first_token_ns - record.start_ns) / 1e9)
            self._whole.observe((record.end_ns - record.start_ns) / 1e9)

    def text(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self._registry)
