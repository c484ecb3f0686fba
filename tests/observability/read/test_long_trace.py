"""Traces read in parts give what they give read whole, and so does the index that this leaves."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from observability import observe, schema
from observability.detect import Finding
from observability.read import StepTable, index, long_trace, read_steps, read_trace, step_table, trace_reader
from observability.read.own_lines import OwnLines
from observability.read.span_table import SpanCollector
from observability.report.command import main
from tests.helpers import made_traces as made
from tests.helpers.step_records import (
    KERNELS,
    checkpoint_record,
    eval_record,
    run_info,
    run_summary,
    skipped_step,
    step_record,
)


@pytest.fixture(autouse=True)
def everything_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_reader, "_LONG", 0)
    monkeypatch.setattr(trace_reader, "PART_SPANS", 40)


def traced(folder: Path, steps: range, run_id: str, resumes: str | None = None, kernels_every: int = 4) -> None:
    observer = observe(folder, level="kernel", kernels_every=kernels_every)
    observer.run_started(run_info(run_id=run_id, total_steps=steps[-1], first_step=steps[0], resumes=resumes))
    for step in steps:
        late = 40_000_000 if step % 6 == 0 else 0  # time in no span, before this step
        record = step_record(step, kernels=KERNELS) if step % 9 else skipped_step(step)
        observer.step_finished(record if not late else step_record(step, start_ns=record.start_ns + late))
        if step % 5 == 0:
            observer.checkpoint_saved(checkpoint_record(step))
        if step % 7 == 0:
            observer.eval_finished(eval_record(step))
            observer.told(Finding("spike", step, step, step, "step", 2.0, 1.0, 9.0, "high", "slow"))
    observer.run_finished(run_summary(steps[-1]))


def same(a: StepTable, b: StepTable) -> None:
    for field in fields(StepTable):
        mine, theirs = getattr(a, field.name), getattr(b, field.name)
        if field.name in ("kinds", "durations"):
            continue
        if field.name == "values":
            assert mine.keys() == theirs.keys()
            for key in mine:
                np.testing.assert_array_equal(mine[key], theirs[key], key)
        elif field.name == "kernels":
            for key in ("steps", "seconds"):
                np.testing.assert_allclose(getattr(mine, key), getattr(theirs, key), 0, 1e-12, err_msg=key)
            assert [g.label for g in mine.groups] == [g.label for g in theirs.groups]
            work = [[(g.launches, g.flops, g.bytes) for g in sums.groups] for sums in (mine, theirs)]
            np.testing.assert_allclose(*work)
        elif isinstance(mine, np.ndarray):
            np.testing.assert_allclose(mine, theirs, 0, 1e-12, err_msg=field.name) if mine.dtype.kind == "f" else (
                np.testing.assert_array_equal(mine, theirs, field.name)
            )
        elif field.name == "pauses":
            np.testing.assert_equal([vars(p) for p in mine], [vars(p) for p in theirs])  # NaN is as good as NaN
        else:
            assert mine == theirs, field.name
    assert set(a.kinds) == set(b.kinds)
    place = [a.kinds.index(kind) for kind in b.kinds]
    np.testing.assert_allclose(a.durations[:, place], b.durations, 0, 1e-12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that was interrupted after step 33 and went on from step 30; another run in the same file before it."""
    traced(tmp_path, range(1, 12), "other")
    traced(tmp_path, range(1, 34), "first")
    traced(tmp_path, range(31, 61), "second", resumes="first")
    return tmp_path


def test_a_trace_in_parts_is_the_trace(folder: Path) -> None:
    whole = step_table(read_trace(folder), "")
    assert whole.step.tolist() == list(range(1, 61))
    assert whole.between.max() > 0.03
    assert whole.told
    assert whole.kernels is not None
    table, spans = read_steps(folder)
    assert isinstance(spans, int)  # it was read in parts
    assert spans == len(read_trace(folder))
    same(table, whole)


def test_the_index_is_the_trace_and_is_made_anew_when_that_grows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, spans = read_steps(folder)
    assert (folder / "trace.index.npz").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(trace_reader, "in_parts", lambda *_: pytest.fail("the index was not used"))
        again, counted = read_steps(folder)
    assert counted == spans
    same(again, table)
    traced(folder, range(61, 70), "third", resumes="second")
    assert len(read_steps(folder)[0]) == 69
    assert main([str(folder), "--json", str(folder / "r.json")]) == 0
    assert json.loads((folder / "r.json").read_text())["steps"] == 69


def _cut(stored: dict[str, Any]) -> None:
    stored["seconds"] = stored["seconds"][:-1]


def _kind(stored: dict[str, Any]) -> None:
    stored["durations"] = stored["durations"][:, :-1]


def _about(stored: dict[str, Any]) -> None:
    stored["about"] = np.array("[" * 100_000)


def _object(stored: dict[str, Any]) -> None:
    stored["step"] = np.array([{}], dtype=object)


@pytest.mark.parametrize("damage", [_cut, _kind, _about, _object, None])
def test_a_damaged_index_is_as_good_as_none(folder: Path, damage: Any) -> None:
    table, _ = read_steps(folder)
    path = folder / "trace.index.npz"
    if damage is None:
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        with np.load(path) as stored:
            arrays = dict(stored)
        damage(arrays)
        np.savez_compressed(path, **arrays)
    same(read_steps(folder)[0], table)


def test_text_in_an_index_steers_no_terminal(folder: Path) -> None:
    read_steps(folder)
    path = folder / "trace.index.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["about"] = np.array(str(arrays["about"]).replace("models/tiny", "\\u001b[2Jx"))
    np.savez_compressed(path, **arrays)
    table, _ = read_steps(folder)
    assert table.facts[schema.RUN_MODEL] == "\ufffd[2Jx"


def test_spans_whose_step_is_told_elsewhere_are_read_whole(tmp_path: Path) -> None:
    """As a collector's file exporter may write them: children long after their step."""
    lines = list(made.lines(made.plain_steps(30), "run-1"))
    spans = [line["resourceSpans"][0]["scopeSpans"][0]["spans"] for line in lines]
    mixed = [made.request(own[:1] + late[1:]) for own, late in zip(spans, spans[-9:] + spans[:-9], strict=True)]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in mixed))
    table, found = read_steps(path)
    assert not isinstance(found, int)
    same_kinds = step_table(read_trace(made.write(tmp_path / "plain.jsonl", made.plain_steps(30))), "")
    np.testing.assert_allclose(table.durations, same_kinds.durations)


def test_own_lines_are_read_as_any_others_are(folder: Path) -> None:
    reader, own, general = OwnLines(trace_reader._attributes), SpanCollector(), SpanCollector()
    for line in (folder / "trace.jsonl").read_bytes().splitlines(keepends=True):
        assert reader.read(line, own)
        trace_reader._read_line(line, general)
    a, b = own.table(), general.table()
    assert (a.labels, a.runs, a.resumes) == (b.labels, b.runs, b.resumes)
    for name in ("name", "shape", "start", "end", "parent", "level", "step", "run", "on_gpu", "flops", "bytes"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
    np.testing.assert_equal(a.attributes, b.attributes)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"kind":1', '"kind":2'),
        ('"flags":256', '"flags": 256'),
        ('"name":"forward"', '"name":"for\\"ward"'),
        ('"status":{}', '"status":{},"links":[]'),
        ("]}]}]}\n", "]}]}]} \n"),
        ('"stringValue":"phase"', '"stringValue":"[phase]"'),
    ],
)
def test_a_line_that_is_a_little_different_is_left_to_the_general_reader(folder: Path, old: str, new: str) -> None:
    line = (folder / "trace.jsonl").read_bytes().splitlines(keepends=True)[3].decode()
    assert old in line
    collector = SpanCollector()
    assert not OwnLines(trace_reader._attributes).read(line.replace(old, new, 1).encode(), collector)
    assert len(collector) == 0


def test_many_rare_kinds_are_left_out_of_a_long_trace_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_trace, "MOST_KINDS", 5)
    traced(tmp_path, range(1, 40), "run")
    table, _ = read_steps(tmp_path)
    assert len(table.kinds) == 5
    assert any("rarer kinds of span" in note for note in table.notes)


def test_an_index_that_cannot_be_written_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index.np, "savez_compressed", fails)
    assert len(read_steps(folder)[0]) == 60
    assert not (folder / "trace.index.npz").exists()
