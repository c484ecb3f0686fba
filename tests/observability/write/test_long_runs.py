"""Long runs: files that are packed away in parts, kernels and backends that get a sample of steps."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan

from observability import observe, schema
from observability.read import read_steps, read_trace, step_table, trace_files
from observability.write import export
from observability.write.sampling import MOST_SPANS, StepSample
from observability.write.tracing import OwnSpans, SpanBuilder
from tests.helpers.otlp_server import http_receiver
from tests.helpers.step_records import (
    KERNELS,
    checkpoint_record,
    eval_record,
    run_info,
    run_summary,
    step_record,
)


def run(folder: Path, steps: int, first: int = 1, run_id: str = "run-1", **options: object) -> None:
    observer = observe(folder, **options)  # type: ignore[arg-type]
    resumes = None if first == 1 else "run-1"
    observer.run_started(run_info(run_id=run_id, total_steps=steps, first_step=first, resumes=resumes))
    for step in range(first, steps + 1):
        observer.step_finished(step_record(step, kernels=KERNELS))
        if step % 7 == 0:
            observer.checkpoint_saved(checkpoint_record(step))
    observer.run_finished(run_summary(steps))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "PART_BYTES", 40_000)


@pytest.mark.usefixtures("small_parts")
def test_a_long_file_is_packed_in_parts_and_reads_as_one(tmp_path: Path) -> None:
    run(tmp_path / "parts", 60)
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert names[:2] == ["trace.00001.jsonl.gz", "trace.00002.jsonl.gz"]
    assert names[-1] == "trace.jsonl"
    assert not any(name.endswith((".tmp", "1.jsonl")) for name in names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "PART_BYTES", 1 << 40)
        run(tmp_path / "whole", 60)
    parts, whole = (read_trace(tmp_path / name) for name in ("parts", "whole"))
    assert len(parts) == len(whole) == 60 * (1 + 4 + 4) + 8 + 1
    assert parts.start.tolist() == whole.start.tolist()
    assert step_table(parts, "").durations.tolist() == step_table(whole, "").durations.tolist()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("packed", ["nothing", "a part of it", "all, and the original is there still"])
def test_a_kill_while_a_part_is_packed_loses_and_doubles_nothing(tmp_path: Path, packed: str) -> None:
    run(tmp_path, 30)
    before = step_table(read_trace(tmp_path), "")
    part = tmp_path / "trace.00001.jsonl.gz"
    lines = gzip.decompress(part.read_bytes())
    part.with_suffix("").write_bytes(lines)
    if packed != "all, and the original is there still":
        part.unlink()
    if packed == "a part of it":
        (tmp_path / ".trace.00001.jsonl.gz.tmp").write_bytes(gzip.compress(lines)[:100])
    assert step_table(read_trace(tmp_path), "").step.tolist() == before.step.tolist()
    assert not read_trace(tmp_path).skipped
    run(tmp_path, 60, first=31, run_id="run-2")  # the next process packs what is left
    assert part.is_file()
    assert not part.with_suffix("").exists()
    assert step_table(read_trace(tmp_path), "").step.tolist() == list(range(1, 61))


def test_a_trace_that_somebody_packed_by_hand_is_read(tmp_path: Path) -> None:
    run(tmp_path, 10)
    lines = (tmp_path / "trace.jsonl").read_bytes()
    (tmp_path / "trace.jsonl").unlink()
    (tmp_path / "trace.jsonl.gz").write_bytes(gzip.compress(lines))
    assert [path.name for path in trace_files(tmp_path)] == ["trace.jsonl.gz"]
    assert len(read_steps(tmp_path)[0]) == 10


@pytest.mark.parametrize(("every", "total", "kept"), [(None, 12, 12), (4, 12, 3), (None, 5000, 3)])
def test_kernels_are_kept_of_every_nth_step(tmp_path: Path, every: int | None, total: int, kept: int) -> None:
    observer = observe(tmp_path, level="kernel", kernels_every=every)
    observer.run_started(run_info(total_steps=total))
    for step in range(1, 13):
        observer.step_finished(step_record(step, kernels=KERNELS))
    observer.close()
    table = step_table(read_trace(tmp_path), "")
    assert table.kernels is not None
    assert len(table.kernels.steps) == kept
    layers = [i for i, kind in enumerate(table.kinds) if kind.level == "layer"]
    assert (table.durations[:, layers] > 0).all()


def sample(every: int | None, steps: int) -> tuple[StepSample, list[list[ReadableSpan]], SpanBuilder]:
    builder = SpanBuilder(run_info(total_steps=steps), "layer", None, OwnSpans())
    chosen = StepSample(every, steps, builder.train)
    return chosen, [builder.step(step_record(step)) for step in range(1, min(steps, 40) + 1)], builder


def sent_steps(chosen: StepSample, built: Sequence[list[ReadableSpan]]) -> list[int]:
    sent = [chosen.of_step(number, spans) for number, spans in enumerate(built, 1)]
    return [number for number, spans in enumerate(sent, 1) if spans]


def test_a_short_run_is_sent_whole_and_unchanged() -> None:
    chosen, built, _ = sample(None, 40)
    assert [chosen.of_step(number, spans) for number, spans in enumerate(built, 1)] == built
    assert chosen.left_out == 0


def test_a_long_run_sends_a_bounded_number_of_spans_and_says_one_in_how_many() -> None:
    chosen, built, _ = sample(None, 100_000)
    each = len(built[0])
    every = -(-100_000 * each // MOST_SPANS)
    assert sent_steps(chosen, built) == list(range(1, 41, every))
    assert chosen.left_out == each * (40 - len(range(1, 41, every)))
    first = StepSample(None, 100_000, built[0][0].context).of_step(1, built[0])[0]
    assert (first.attributes or {})[schema.STEP_SAMPLE] == every


def test_steps_that_somebody_will_ask_for_are_sent_too() -> None:
    chosen, built, builder = sample(10, 40)
    chosen.expect(4, 4)
    chosen.expect(20, 30)
    assert sent_steps(chosen, built) == [1, 4, 11, *range(20, 31), 31]
    late = builder.checkpoint(checkpoint_record(40))
    (sent,) = chosen.others(late)
    assert late[0].parent != sent.parent == builder.train  # its step is not there to hang on


def test_a_collector_gets_the_sample_and_the_file_everything(tmp_path: Path) -> None:
    with http_receiver() as received:
        run(tmp_path, 20, otlp=received.url, otlp_sample=5)
    names = [span.name for span in received.spans]
    assert names.count("step") == 4
    assert (names.count("checkpoint"), names.count("train")) == (2, 1)
    assert step_table(read_trace(tmp_path), "").step.tolist() == list(range(1, 21))


def test_an_evaluation_beside_a_step_that_was_left_out_hangs_on_the_run() -> None:
    chosen, built, builder = sample(10, 5)
    assert sent_steps(chosen, built) == [1]
    (sent,) = chosen.others(builder.evaluation(eval_record(5)))
    assert sent.parent == builder.train
