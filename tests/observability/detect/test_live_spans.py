"""Live detection as a span processor: what the detector hears from spans is what the trainer's records tell it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from entrenar_gpu.events import CheckpointRecord, EvalRecord, HostStats, SampleRecord, Span, StepRecord
from observability import observe, schema
from observability.detect import live_spans
from observability.detect.live import LiveDetector
from observability.detect.live_spans import AnomalyProcessor
from observability.write.tracing import OwnSpans, SpanBuilder
from tests.helpers import made_traces as made
from tests.helpers.step_records import KERNELS, run_info, run_summary, step_record
from tests.observability.detect.test_live import records, scaled

METHODS = {StepRecord: "step_finished", CheckpointRecord: "checkpoint_saved", EvalRecord: "eval_finished"}
METHODS |= {SampleRecord: "samples_drawn"}


@pytest.fixture(autouse=True)
def no_otel_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


class Heard(LiveDetector):
    """A detector that judges nothing and keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(emit=lambda _: None)
        self.steps: list[Any] = []
        self.pauses: list[tuple[Any, ...]] = []
        self.order: list[str] = []
        self.ends = 0

    def step_finished(self, record: Any) -> None:
        self.steps.append(record)
        self.order.append(f"step {record.step}")

    def checkpoint_saved(self, record: Any) -> None:
        self.pauses.append(("checkpoint", record.step, record.bytes, record.start_ns, record.end_ns))
        self.order.append(f"checkpoint {record.step}")

    def eval_finished(self, record: Any) -> None:
        self.pauses.append(("eval", record.step, record.start_ns, record.end_ns))
        self.order.append(f"eval {record.step}")

    def run_finished(self, _summary: Any) -> None:
        self.ends += 1


def eventful_run() -> list[Any]:
    """Records of a run with some of everything: stalls, checkpoints inside and beside steps, spikes, a throttle."""
    steps = made.plain_steps(500)
    for step in steps[40:200:20]:
        step.checkpoint_beside = 30.0
    steps[79].phases["data"] += 60
    steps[99].attributes |= {schema.LOSS: float("nan"), schema.SKIPPED: True}
    steps[119].attributes[schema.LOSS] = 9.0
    made.slow_layer(steps[139], "backward 1", 50.0)
    steps[180].checkpoint_beside = 400.0
    steps[209].phases["checkpoint"] = 290.0
    for step in steps[250:]:
        scaled(step, 1.25)
    return [*_evaluation(0, made.START_NS), *(record for one in records(steps) for record in _as_trainer(one))]


def _as_trainer(record: Any) -> list[Any]:
    if not hasattr(record, "loss"):
        return [CheckpointRecord(**vars(record))]
    told = vars(record) | {"epoch": 0.0, "lr": 1e-3, "tokens_per_second": 1.0}
    seconds = max((record.end_ns - record.start_ns) / 1e9, 1e-9)
    step = StepRecord(**told | {"step_seconds": seconds, "spans": tuple(Span(**vars(span)) for span in record.spans)})
    return [step, *(_evaluation(record.step, record.end_ns) if record.step % 50 == 0 else [])]


def _evaluation(step: int, start: int) -> list[EvalRecord]:
    return [EvalRecord(step, 1.0, 2.7, 10, start, start + (900 if step == 400 else 20) * made.MS)]


def feed(observer: Any, told: Sequence[Any]) -> None:
    for record in told:
        getattr(observer, METHODS[type(record)])(record)
    observer.run_finished(run_summary(len(told)))


def detector(lines: list[str]) -> LiveDetector:
    return LiveDetector(emit=lines.append, lines_a_minute=2, clock=lambda: 0.0)


def through_observer(tmp_path: Path, told: Sequence[Any], processor: AnomalyProcessor, **options: Any) -> None:
    observer = observe(tmp_path, processors=[processor], **options)
    observer.run_started(run_info())
    feed(observer, told)


def through_provider(tmp_path: Path, told: Sequence[Any], processor: AnomalyProcessor, **options: Any) -> None:
    """As a program with a tracer provider of its own has it; the processor is even added twice."""
    provider = TracerProvider()
    provider.add_span_processor(processor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "get_tracer_provider", lambda: provider)
        through_observer(tmp_path, told, processor, **options)
    provider.shutdown()


@pytest.mark.parametrize("through", [through_observer, through_provider])
def test_spans_give_the_lines_and_counts_that_records_give(tmp_path: Path, through: Callable[..., None]) -> None:
    told = eventful_run()
    expected: list[str] = []
    direct = detector(expected)
    feed(direct, told)
    lines: list[str] = []
    behind = detector(lines)
    through(tmp_path, told, AnomalyProcessor(behind))
    assert lines == expected
    assert behind.counts == direct.counts
    assert behind.unsaid == direct.unsaid > 0
    assert {"data-stall", "checkpoint-stall", "slow-kernel", "skipped-step", "loss-spike", "throttle"} <= set(
        direct.counts
    )


# What the detector does not look at.
UNHEARD = ("epoch", "lr", "positions", "tokens_per_second", "trained_tokens_per_second", "flops", "spans", "on_gpu")
FIELDS = [field.name for field in fields(StepRecord) if field.name not in UNHEARD]
SPAN_FIELDS = [field.name for field in fields(Span) if field.name not in UNHEARD]


@pytest.mark.parametrize("through", [through_observer, through_provider])
@pytest.mark.parametrize(("level", "kernels"), [("layer", ()), ("kernel", KERNELS)])
def test_a_step_is_put_together_as_it_was_told(
    tmp_path: Path, through: Callable[..., None], level: str, kernels: tuple[str, ...]
) -> None:
    told = [step_record(n, kernels=kernels) for n in (1, 2, 3)]
    heard = Heard()
    through(tmp_path, told, AnomalyProcessor(heard), level=level)
    assert [_fields(step, FIELDS) for step in heard.steps] == [_fields(step, FIELDS) for step in told]
    for step, record in zip(heard.steps, told, strict=True):
        assert [_fields(s, SPAN_FIELDS) for s in step.spans] == [_fields(s, SPAN_FIELDS) for s in record.spans]
    assert heard.ends == 1


def _fields(record: Any, names: list[str]) -> list[Any]:
    return [getattr(record, name) for name in names]


def test_pauses_come_after_the_step_that_they_follow(tmp_path: Path) -> None:
    end = step_record(1).end_ns
    # The step ends by the device's clock and the pause begins by the host's: they may overlap by microseconds.
    told = [
        EvalRecord(0, 1.0, 2.7, 10, 5, 9),
        step_record(1),
        EvalRecord(1, 1.0, 2.7, 10, end - 2000, end + 9),
        CheckpointRecord(1, "c", 77, end + 9, end + 20),
        SampleRecord(1, [{}], ["told to nobody"], end + 20, end + 30),
        step_record(2),
    ]
    heard = Heard()
    through_observer(tmp_path, told, AnomalyProcessor(heard))
    assert heard.pauses == [
        ("eval", 0, 5, 9),
        ("eval", 1, end - 2000, end + 9),
        ("checkpoint", 1, 77, end + 9, end + 20),
    ]
    assert heard.order == ["eval 0", "step 1", "eval 1", "checkpoint 1", "step 2"]
    assert [_phases(step) for step in heard.steps] == [["data", "forward", "backward", "optimizer"]] * 2


def test_pauses_inside_a_step_are_phases_of_it_and_told_first_where_they_have_a_record(tmp_path: Path) -> None:
    def saving(number: int) -> StepRecord:
        record = step_record(number)
        pause = Span("checkpoint", "phase", record.start_ns + 5, record.end_ns - 5)
        return replace(record, spans=(pause, *(replace(span, parent=None) for span in record.spans)))

    told = [CheckpointRecord(1, "c", 77, saving(1).start_ns + 5, saving(1).end_ns - 5), saving(1), saving(2)]
    heard = Heard()
    through_observer(tmp_path, told, AnomalyProcessor(heard))
    assert heard.order == ["checkpoint 1", "step 1", "step 2"]
    assert [_phases(step) for step in heard.steps] == [["checkpoint", "data", "forward", "backward", "optimizer"]] * 2


def _phases(step: Any) -> list[str]:
    return [span.name for span in step.spans if span.kind == "phase"]


def spans_of(*told: StepRecord, run: SpanBuilder | None = None) -> list[ReadableSpan]:
    builder = run or SpanBuilder(run_info(), "layer", None, OwnSpans())
    return [span for record in told for span in builder.step(record)]


def changed(span: ReadableSpan, **changes: Any) -> ReadableSpan:
    names = ("name", "context", "parent", "attributes", "start_time", "end_time", "instrumentation_scope")
    return ReadableSpan(**{name: getattr(span, name) for name in names} | changes)


def backwards(span: ReadableSpan) -> ReadableSpan:
    return changed(span, start_time=span.end_time, end_time=span.start_time)


UNUSABLE: dict[str, Callable[[ReadableSpan], ReadableSpan]] = {
    "another program's": lambda span: changed(span, instrumentation_scope=InstrumentationScope("other")),
    "without a scope": lambda span: changed(span, instrumentation_scope=None),
    "without a parent": lambda span: changed(span, parent=None),
    "of a clock that went back": backwards,
    "without an end": lambda span: changed(span, end_time=None),
    "without attributes": lambda span: changed(span, attributes=None),
    "without an identity": lambda span: changed(span, context=None),
}


@pytest.mark.parametrize("spoil", UNUSABLE.values(), ids=UNUSABLE)
def test_spans_that_cannot_be_used_are_ignored(
    spoil: Callable[[ReadableSpan], ReadableSpan], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = spans_of(step_record(1)), spans_of(step_record(9))
    heard = Heard()
    processor = AnomalyProcessor(heard)
    step, data, *below = first
    for span in [*map(spoil, second), step, spoil(data), *below, *map(spoil, second)]:
        processor.on_end(span)
    processor.shutdown()
    assert [record.step for record in heard.steps] == [1]
    assert [span.name for span in heard.steps[0].spans] == [span.name for span in below]
    assert not caplog.records


def test_hostile_attributes_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    class Judges(Heard):
        def step_finished(self, record: Any) -> None:
            super().step_finished(record)
            LiveDetector.step_finished(self, record)

    lines: list[str] = []
    heard = Judges()
    heard.emit = lines.append
    processor = AnomalyProcessor(heard)
    builder = SpanBuilder(run_info(), "layer", None, OwnSpans())
    for number in range(1, 40):
        step, *below = spans_of(step_record(number, loss=1.0), run=builder)
        strings = dict.fromkeys(step.attributes or {}, "\x1b[31m")
        processor.on_end(changed(step, attributes=strings | {schema.SPAN_LEVEL: "step"}))
        processor.on_end(changed(step, attributes=strings | {schema.SPAN_LEVEL: "step", schema.STEP_NUMBER: number}))
        for span in below:
            processor.on_end(changed(span, attributes=(span.attributes or {}) | {schema.KERNEL_SHAPE: ["a"]}))
    processor.shutdown()
    assert not caplog.records
    assert [step.step for step in heard.steps] == list(range(1, 40))
    assert not [line for line in lines if "\x1b" in line]


def test_another_run_of_the_same_process_is_not_mixed_in() -> None:
    heard = Heard()
    processor = AnomalyProcessor(heard)
    for one, other in zip(
        spans_of(step_record(1), step_record(2)), spans_of(step_record(7), step_record(8)), strict=True
    ):
        processor.on_end(one)
        processor.on_end(other)
    processor.shutdown()
    assert [(step.step, len(step.spans)) for step in heard.steps] == [(1, 8), (2, 8)]


def test_a_flush_judges_the_step_at_once_and_the_end_comes_once() -> None:
    heard = Heard()
    processor = AnomalyProcessor(heard)
    for span in spans_of(step_record(1)):
        processor.on_end(span)
    assert heard.steps == []
    assert processor.force_flush()
    assert len(heard.steps[0].spans) == 8
    processor.shutdown()
    processor.shutdown()
    assert (len(heard.steps), heard.ends) == (1, 1)


def test_the_end_of_the_run_is_told_when_its_span_ends() -> None:
    heard = Heard()
    processor = AnomalyProcessor(heard)
    builder = SpanBuilder(run_info(), "layer", None, OwnSpans())
    for span in [*spans_of(step_record(1), run=builder), *builder.finish(run_summary(1))]:
        processor.on_end(span)
    assert (len(heard.steps), heard.ends) == (1, 1)


def test_a_step_of_endless_spans_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_spans, "_MOST_SPANS", 30)
    heard = Heard()
    processor = AnomalyProcessor(heard)
    for span in spans_of(*(step_record(n, layers=100) for n in (1, 2))):
        processor.on_end(span)
    processor.shutdown()
    assert [len(step.spans) for step in heard.steps] == [30, 30]
    assert len(processor._places) == 31


def test_a_detector_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Fails(Heard):
        def step_finished(self, record: Any) -> None:
            super().step_finished(record)
            raise RuntimeError("detector broke")

    heard = Fails()
    processor = AnomalyProcessor(heard)
    for span in spans_of(*(step_record(n) for n in (1, 2, 3))):
        processor.on_end(span)
    processor.force_flush()
    assert [(step.step, len(step.spans)) for step in heard.steps] == [(1, 8), (2, 8), (3, 8)]
    assert caplog.text.count("RuntimeError: detector broke") == 3


def test_what_the_host_did_comes_through(tmp_path: Path) -> None:
    stats = HostStats(0.5, 0.1, 0.0, 0.2, 3, 40, 5, 1 << 20, math.nan, 61.0, 120.0, "power cap")
    heard = Heard()
    through_observer(tmp_path, [step_record(1, host=stats)], AnomalyProcessor(heard))
    host = heard.steps[0].host
    assert (host.cpu_seconds, host.major_faults, host.gpu_throttle) == (0.5, 3, "power cap")
    assert not hasattr(host, "gpu_clock_mhz")  # unknown: no attribute, rather than a NaN that backends stumble over


def test_addresses_of_earlier_versions_still_lead_there() -> None:
    from observability import AnomalyProcessor as handed_on
    from observability.live import LiveDetector as detector
    from observability.live_spans import AnomalyProcessor as processor

    assert handed_on is processor is AnomalyProcessor
    assert detector is LiveDetector
