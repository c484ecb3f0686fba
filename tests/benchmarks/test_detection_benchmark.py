"""The benchmark of detection in small: its goals hold on the recorded steps, and its scoring counts right."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.detection import bench, faults, recording, scoring
from benchmarks.detection.record import record_run
from benchmarks.detection.scoring import Event, Tally
from tests.helpers import made_traces as made


def test_large_faults_are_found_and_named_and_clean_runs_are_left_alone() -> None:
    clean = bench.clean_runs("reported", bench.ours)
    assert clean.false_per_thousand <= 1
    total = Tally()
    for kind in faults.KINDS:
        total.add(bench.faulty_runs("reported", kind, faults.large_size, 2, bench.ours))
    assert total.f1 >= 0.95
    assert total.cause_rate >= 0.9
    assert total.decoys > 0
    assert total.decoys_flagged == 0


def test_tuning_and_reported_draws_share_neither_steps_nor_seeds() -> None:
    tuning, reported = (
        {float(second) for run in bench.segments(which) for second in run.seconds} for which in bench.SEEDS
    )
    assert len(tuning & reported) < 0.01 * len(tuning)  # equal times by chance, as the file keeps float32
    assert bench.SEEDS["tuning"] != bench.SEEDS["reported"]


def test_a_fault_adds_what_it_says() -> None:
    table, _ = recording.load()
    base = recording.rows(table, np.arange(bench.SEGMENT))
    one = faults.sigma(base)
    changed, (first, *_) = faults.data_stall(base, one, 7.0, np.random.default_rng(0))
    rows = slice(first.first, first.last + 1)
    np.testing.assert_allclose(changed.seconds[rows] - base.seconds[rows], 7 * one)
    data = [kind.name for kind in base.kinds].index("data")
    np.testing.assert_allclose(changed.durations[rows, data] - base.durations[rows, data], 7 * one)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cp short.jsonl run/trace.jsonl", "record: run: 30 steps; the benchmark needs 2020 and more"),
        ("true", "record: run: no trace.jsonl in this folder; was the run traced?"),
        ("no-such-trainer", "record: no-such-trainer: No such file or directory"),
    ],
)
def test_a_recording_that_is_none_leaves_the_one_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    made.write(Path("short.jsonl"), made.plain_steps(30))
    Path("recorded.npz").write_text("a long one")
    with pytest.raises(SystemExit, match=f"^{re.escape(message)}$"):
        record_run(Path("run"), command.split(), Path("recorded.npz"))
    assert Path("recorded.npz").read_text() == "a long one"


def test_scoring_by_event() -> None:
    fault = faults.Fault("spike", 100, 100)
    decoy = faults.Fault("longer-batch", 300, 305)
    events = [Event(101, 101, {"spike": 1}), Event(200, 204, {"throttle": 5}), Event(303, 303, {"spike": 1})]
    result = scoring.tally(events, [fault, decoy], 1000)
    assert (result.found, result.cause_right, result.false_alarms, result.decoys_flagged) == (1, 1, 1, 1)
    assert result.f1 == 2 * 1 / (1 + 2 + 1)
    missed = scoring.tally([], [fault], 1000)
    assert (missed.found, missed.f1) == (0, 0)


def test_alarms_close_together_are_one_event() -> None:
    events = scoring.merged([(10, 10, "spike"), (12, 14, "data-stall"), (40, 40, "spike")])
    assert [(e.first, e.last) for e in events] == [(10, 14), (40, 40)]
    assert events[0].causes == {"spike": 1, "data-stall": 3}
