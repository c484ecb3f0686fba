"""The trainer's records as OpenTelemetry spans; schema.py has the tree they form.

Spans are built from the times that a record holds, after the fact, as finished `ReadableSpan`s: at the default level a
step of a 36-layer model has some 80 of them, and `Tracer.start_span` (attribute checks, locks, samplers, processors)
costs several times what building the object does. The caller's own tracer provider, if there is one, goes through its
public interface all the same; it gives the ids then, so that the run's file and the caller's backend name the same
spans.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from opentelemetry import trace
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

from observability import schema
from observability.write.otlp_settings import without_secrets

_UNSET = Status(StatusCode.UNSET)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_DEPTH = {kind: depth for depth, kind in enumerate(schema.LEVELS)}
_INT64 = 2**63


class SpanSource(Protocol):
    """Who gives a span its identity, and is told of it."""

    def begin(self, name: str, start_ns: int, parent: SpanContext | None) -> SpanContext:
        """Name a span that starts; `parent` is None for a root."""

    def finish(self, context: SpanContext, end_ns: int, attributes: Mapping[str, Any], status: Status) -> None:
        """Complete the span `context`, which `begin` gave."""


class OwnSpans:
    """Identities from the SDK's generator, in the trace of the parent or in a new one."""

    def __init__(self) -> None:
        self._ids = RandomIdGenerator()

    def begin(self, name: str, start_ns: int, parent: SpanContext | None) -> SpanContext:
        trace_id = parent.trace_id if parent is not None else self._ids.generate_trace_id()
        return SpanContext(trace_id, self._ids.generate_span_id(), is_remote=False, trace_flags=_SAMPLED)

    def finish(self, context: SpanContext, end_ns: int, attributes: Mapping[str, Any], status: Status) -> None:
        """Nothing: there is no one else to tell."""


class CallerSpans:
    """Spans of the tracer provider that the calling program has set, with its sampler, ids and processors."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer
        self._open: dict[int, trace.Span] = {}
        self._own = OwnSpans()

    def begin(self, name: str, start_ns: int, parent: SpanContext | None) -> SpanContext:
        # The step's span has ended when its children start, so the parent is passed as a context, not as a live span.
        around = trace.set_span_in_context(trace.NonRecordingSpan(parent or trace.INVALID_SPAN_CONTEXT))
        span = self._tracer.start_span(name, context=around, start_time=start_ns)
        context = span.get_span_context()
        if not context.is_valid or context == parent:  # a provider that is switched off gives the parent back
            context = self._own.begin(name, start_ns, parent)
        self._open[context.span_id] = span
        return context

    def finish(self, context: SpanContext, end_ns: int, attributes: Mapping[str, Any], status: Status) -> None:
        span = self._open.pop(context.span_id)
        span.set_attributes(finite(attributes))
        if status is not _UNSET:
            span.set_status(status)
        span.end(end_ns)


def finite(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """`attributes` without NaN and infinities, which backends answer with errors, and with how many those were."""
    kept = {key: value for key, value in attributes.items() if not isinstance(value, float) or math.isfinite(value)}
    if len(kept) < len(attributes):
        kept[schema.NON_FINITE] = len(attributes) - len(kept)
    return kept


def copied(span: ReadableSpan, attributes: Mapping[str, Any], parent: SpanContext | None = None) -> ReadableSpan:
    """`span` with other attributes, and below `parent` where one is given."""
    return ReadableSpan(
        span.name,
        span.context,
        parent or span.parent,
        span.resource,
        attributes,
        status=span.status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def span_source() -> SpanSource:
    """The caller's tracer provider where one is set, else our own identities."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return OwnSpans()
    return CallerSpans(provider.get_tracer(schema.SCOPE_NAME))


def run_attributes(info: Any) -> dict[str, Any]:
    """What describes a run (`RunInfo`), for its resource and its `train` span."""
    resumes = {} if info.resumes is None else {schema.RUN_RESUMES: clean(info.resumes)}
    return resumes | {
        schema.RUN_ID: info.run_id,
        schema.RUN_MODEL: clean(info.model),
        schema.RUN_METHOD: info.method,
        schema.RUN_PRECISION: info.precision,
        schema.RUN_OUTPUT: clean(info.output),
        schema.RUN_PARAMETERS: info.parameters,
        schema.RUN_TRAINABLE: info.trainable_parameters,
        schema.RUN_PLANNED_BYTES: info.planned_bytes,
        schema.RUN_FIRST_STEP: info.first_step,
        schema.RUN_TOTAL_STEPS: info.total_steps,
        schema.GPU_ADAPTER: clean(info.adapter),
        schema.GPU_BACKEND: info.backend,
        schema.GPU_DRIVER: clean(info.driver),
    }


def run_resource(info: Any) -> Resource:
    """The resource of a run's spans and metrics; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over ours."""
    ours = {
        schema.SERVICE_NAME: schema.SERVICE_NAME_DEFAULT,
        schema.SERVICE_VERSION: info.project_version,
        schema.SERVICE_INSTANCE: info.run_id,
        **run_attributes(info),
    }
    return Resource.create(ours).merge(OTELResourceDetector().detect())


def clean(value: Any) -> str | bool | int | float:
    """`value` as a type that OTLP carries: NumPy scalars unwrapped, no lone surrogates, no integer beyond 64 bits."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if -_INT64 <= value < _INT64 else float(value)
    return clean(str(value))


@dataclass(frozen=True)
class _Late:
    """A phase that came as a record of its own."""

    step: int
    name: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]


class SpanBuilder:
    """Builds a run's finished spans, in the order in which the file holds them. Not thread-safe."""

    def __init__(
        self, info: Any, level: schema.Level, parent: SpanContext | None, source: SpanSource, kernels_every: int = 1
    ) -> None:
        """At level kernel every `kernels_every`th step has them, the others their layers."""
        self.resource = run_resource(info)
        self.train = source.begin(schema.TRAIN, info.start_ns, parent)
        self.source = source
        self._info = info
        self._parent = parent
        self._depth = _DEPTH[level]
        self._kernels_every = kernels_every
        self._scope = InstrumentationScope(schema.SCOPE_NAME, info.project_version)
        self._last_step = info.first_step - 1
        self._last_context = self.train
        self._last_phases: set[str] = set()
        self._last_end_ns = info.start_ns
        self._waiting: list[_Late] = []

    def step(self, record: Any, context: SpanContext | None = None) -> list[ReadableSpan]:
        """The spans of a `StepRecord`, the step's first; `context` is the step's identity where one was promised."""
        attributes = _step_attributes(record) | {schema.RUN_ID: self._info.run_id}
        step = self._emit(schema.STEP, record.start_ns, record.end_ns, self.train, attributes, context=context)
        self._last_step, self._last_context = record.step, step.context
        self._last_end_ns = max(self._last_end_ns, record.end_ns)
        self._last_phases = {span.name for span in record.spans if span.kind == "phase"}
        due = [late for late in self._waiting if late.step <= record.step]
        self._waiting = [late for late in self._waiting if late.step > record.step]
        below = self._below(record, step.context, {late.name: late.attributes for late in due})
        return [step, *below, *(self._phase(late) for late in due if late.name not in self._last_phases)]

    def evaluation(self, record: Any) -> list[ReadableSpan]:
        """The `eval` span of an `EvalRecord`, or nothing where it waits for its step or is a phase of it."""
        attributes = {
            schema.EVAL_LOSS: record.loss,
            schema.EVAL_PERPLEXITY: record.perplexity,
            schema.EVAL_TOKENS: record.tokens,
        }
        return self._record(record, schema.EVAL, attributes)

    def checkpoint(self, record: Any) -> list[ReadableSpan]:
        """The `checkpoint` span of a `CheckpointRecord`, or nothing, as `evaluation`."""
        attributes = {schema.CHECKPOINT_PATH: clean(record.path), schema.CHECKPOINT_BYTES: record.bytes}
        return self._record(record, schema.CHECKPOINT, attributes)

    def samples(self, record: Any) -> list[ReadableSpan]:
        """The `sample` span of a `SampleRecord`, or nothing, as `evaluation`; without prompts and answers."""
        return self._record(record, schema.SAMPLE, {schema.SAMPLE_PROMPTS: len(record.texts)})

    def anomaly(self, finding: Any, at_ns: int) -> list[ReadableSpan]:
        """The span of an anomaly that was told at the time `at_ns`."""
        attributes = {
            schema.SPAN_LEVEL: schema.ANOMALY,
            schema.STEP_NUMBER: finding.step,
            schema.ANOMALY_CAUSE: finding.cause,
            schema.ANOMALY_SEVERITY: finding.severity or "noticed",
            schema.ANOMALY_FIRST_STEP: finding.first_step,
            schema.ANOMALY_LAST_STEP: finding.last_step,
            schema.ANOMALY_SPAN: clean(finding.span),
            schema.ANOMALY_EVIDENCE: clean(finding.evidence),
        }
        return [self._emit(schema.ANOMALY, at_ns, at_ns, self.train, attributes)]

    def finish(self, summary: Any | None) -> list[ReadableSpan]:
        """What still waits, then the `train` span; `summary` is None where the run ended without a word."""
        spans = [self._phase(late) for late in self._waiting]
        status = "interrupted" if summary is None else clean(summary.status)
        attributes = run_attributes(self._info) | {
            schema.SPAN_LEVEL: "run",
            schema.RUN_CONFIG: clean(without_secrets(json.dumps(dict(self._info.config), default=str, sort_keys=True))),
            schema.RUN_STATUS: status,
            schema.PYTHON_VERSION: platform.python_version(),
            schema.OS_DESCRIPTION: clean(platform.platform()),
        }
        end_ns = self._last_end_ns
        if summary is not None:
            attributes[schema.RUN_STEPS] = summary.steps
            attributes[schema.RUN_SKIPPED_STEPS] = summary.skipped_steps
            attributes[schema.RUN_FINAL_LOSS] = float(summary.final_loss)
            end_ns = summary.end_ns
        outcome = Status(StatusCode.OK) if status == "finished" else Status(StatusCode.ERROR, str(status))
        train = self._emit(schema.TRAIN, self._info.start_ns, end_ns, self._parent, attributes, self.train, outcome)
        return [*spans, train]

    def _below(self, record: Any, step: SpanContext, extra: dict[str, dict[str, Any]]) -> Iterator[ReadableSpan]:
        """The step's phases, layers and kernels down to the level; what is left out passes its parent on."""
        contexts: list[SpanContext] = []
        has_kernels = (record.step - self._info.first_step) % self._kernels_every == 0
        deepest = self._depth if has_kernels else min(self._depth, _DEPTH["layer"])
        for span in record.spans:
            parent = step if span.parent is None else contexts[span.parent]
            depth = _DEPTH[span.kind]
            if depth > deepest:
                contexts.append(parent)
                continue
            attributes: dict[str, Any] = {schema.SPAN_LEVEL: span.kind}
            if span.on_gpu:
                attributes[schema.CLOCK] = "gpu"
            for key, value in span.attributes.items():
                attributes[schema.SPAN_KEYS.get(key) or f"entrenar.span.{key}"] = clean(value)
            if depth == _DEPTH["phase"]:
                attributes[schema.STEP_NUMBER] = record.step
                attributes |= extra.get(span.name, {})
            emitted = self._emit(str(clean(span.name)), span.start_ns, span.end_ns, parent, attributes)
            contexts.append(emitted.context)
            yield emitted

    def _record(self, record: Any, name: str, attributes: dict[str, Any]) -> list[ReadableSpan]:
        """A phase with a record of its own, which may come before its step's record or after it."""
        late = _Late(record.step, name, record.start_ns, record.end_ns, attributes)
        if self._depth < _DEPTH["phase"]:
            return []
        if late.step > self._last_step:
            self._waiting.append(late)
            return []
        if late.step == self._last_step and name in self._last_phases:
            return []
        return [self._phase(late)]

    def _phase(self, late: _Late) -> ReadableSpan:
        parent = self._last_context if late.step == self._last_step else self.train
        attributes = {schema.SPAN_LEVEL: "phase", schema.STEP_NUMBER: late.step} | late.attributes
        return self._emit(late.name, late.start_ns, late.end_ns, parent, attributes)

    def _emit(
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        parent: SpanContext | None,
        attributes: dict[str, Any],
        context: SpanContext | None = None,
        status: Status = _UNSET,
    ) -> ReadableSpan:
        end_ns = max(start_ns, end_ns)  # two clocks are involved, and OTLP has no negative durations
        if context is None:
            context = self.source.begin(name, start_ns, parent)
        self.source.finish(context, end_ns, attributes, status)
        return ReadableSpan(
            name,
            context,
            parent,
            self.resource,
            attributes,
            status=status,
            start_time=start_ns,
            end_time=end_ns,
            instrumentation_scope=self._scope,
        )


def _step_attributes(record: Any) -> dict[str, Any]:
    return {
        schema.SPAN_LEVEL: "step",
        schema.STEP_NUMBER: record.step,
        schema.EPOCH: float(record.epoch),
        schema.LOSS: float(record.loss),
        schema.LEARNING_RATE: float(record.lr),
        schema.GRAD_NORM: float(record.grad_norm),
        schema.TOKENS: record.tokens,
        schema.ROW_TOKENS: record.row_tokens,
        schema.TOKENS_PER_SECOND: float(record.tokens_per_second),
        schema.SKIPPED: bool(record.skipped),
        schema.ALLOCATED_BYTES: record.allocated_bytes,
        schema.STEP_FLOPS: record.flops,
    } | _host_attributes(getattr(record, "host", None))


def _host_attributes(stats: Any | None) -> dict[str, Any]:
    """What the host did in a step (`HostStats`); what the system does not tell (NaN, "") has no attribute."""
    told = {name: getattr(stats, key, "") for key, name in schema.HOST_KEYS.items()}
    return {name: value for name, value in told.items() if value != "" and value == value}
