"""The benchmark of tracing: which steps it traces, and the overhead that it computes from their times."""

from __future__ import annotations

import pytest

from benchmarks.tracing_cost import Switch, cost_by_part, overhead
from tests.helpers.step_records import run_info, run_summary, step_record


class Collect:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def run_started(self, info: object) -> None:
        pass

    def step_finished(self, record: object) -> None:
        self.steps.append(record.step)  # type: ignore[attr-defined]

    def run_finished(self, summary: object) -> None:
        pass


def test_every_second_block_is_traced() -> None:
    """A record's cost falls into the time to the next one, so block 1, times 3 to 5, is what records 4 to 6 cost."""
    collect = Collect()
    switch = Switch([collect], block=3)
    switch.run_started(run_info())
    for step in range(1, 14):
        switch.step_finished(step_record(step))
    switch.run_finished(run_summary(13))
    assert collect.steps == [4, 5, 6, 10, 11, 12]
    assert len(switch.seconds) == 12


def test_the_overhead_is_that_of_neighbouring_blocks() -> None:
    drift = [0.1 * (1 + place / 100) for place in range(10)]  # a machine that slows down by the pair
    seconds = [9.0] * 4 + [value for step in drift for value in (step, step, step * 1.02, step * 1.02)]
    found = overhead(seconds, block=2)
    assert found.pairs == 10
    assert found.relative == pytest.approx(0.02)
    assert found.low <= found.relative <= found.high


def test_parts_are_measured_at_the_level_asked_for() -> None:
    parts = cost_by_part("layer", 3)
    assert parts.spans == 1 + 4 + 2 * 36
    assert parts.work_ms > 0
    assert parts.kilobytes > 10
