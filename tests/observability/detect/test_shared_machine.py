"""On a machine that other programs share all the time: what is told, and what is what is normal there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from observability.detect.detector import detect
from observability.detect.findings import INTERFERENCE, Finding
from observability.read import HOST_VALUES, Kind, StepTable

STEPS = 150


@pytest.fixture
def table() -> StepTable:
    """Steps of 100 ms whose threads wait as long again; every twelfth or so is held up half a second more."""
    rng = np.random.default_rng(0)
    seconds = 0.1 * (1 + 0.02 * np.abs(rng.standard_normal(STEPS)))
    waits = 0.1 + 0.02 * rng.random(STEPS)
    held_up = np.sort(rng.choice(np.setdiff1d(np.arange(STEPS), [100]), 13, replace=False))
    extra = 0.5 * (1 + 0.2 * rng.random(len(held_up)))
    seconds[held_up] += extra
    waits[held_up] += extra
    told = {key: np.zeros(STEPS) for key in HOST_VALUES} | {
        "run_delay_seconds": waits,
        "others_cpu_seconds": waits.copy(),
    }
    values = {key: np.full(STEPS, 1.0) for key in ("loss", "grad_norm", "tokens", "row_tokens", "allocated_bytes")}
    return StepTable(
        step=np.arange(1, STEPS + 1),
        start=np.cumsum(seconds) - seconds,
        seconds=seconds,
        wall_seconds=seconds.copy(),
        skipped=np.zeros(STEPS, dtype=bool),
        values=values | told,
        kinds=(Kind("phase", "data"), Kind("phase", "forward")),
        durations=np.stack([np.full(STEPS, 0.0004), seconds - 0.0004], axis=1),
        between=np.zeros(STEPS),
    )


def alarms(table: StepTable) -> list[Finding]:
    return [finding for finding in detect(table)[0] if finding.is_alarm]


def longer(table: StepTable, row: int, extra: float, host: str = "", kind: int | None = 1) -> StepTable:
    """One step longer, in one kind of span or in none, with what the host tells of it."""
    seconds, durations = table.seconds.copy(), table.durations.copy()
    seconds[row] += extra
    if kind is not None:
        durations[row, kind] += extra
    values = dict(table.values)
    if host:
        values[host] = values[host].copy()
        values[host][row] += extra
    return replace(table, seconds=seconds, wall_seconds=seconds, durations=durations, values=values)


def test_steps_that_others_hold_up_all_the_time_are_priced_and_not_told(table: StepTable) -> None:
    assert alarms(table) == []
    (priced,) = (finding for finding in detect(table)[0] if finding.cause == INTERFERENCE)
    assert priced.severity is None
    assert priced.cost == pytest.approx(13 * 0.55, rel=0.2)


def test_a_step_that_waited_far_longer_than_those_is_told(table: StepTable) -> None:
    waiting = longer(longer(table, 100, 4.0, "run_delay_seconds"), 100, 0.0)
    waiting.values["others_cpu_seconds"][100] += 4.0
    (finding,) = alarms(waiting)
    assert (finding.cause, finding.step) == (INTERFERENCE, 101)


def test_a_stopped_process_is_told_however_much_others_hold_up(table: StepTable) -> None:
    """Stopped, nobody waits for a processor: half a second is news here, though others take as much now and then."""
    (finding,) = alarms(longer(table, 100, 0.6, "held_seconds"))
    assert (finding.cause, finding.step) == (INTERFERENCE, 101)
    assert "the process did not run for 600 ms" in finding.evidence


def test_time_outside_the_phases_is_not_the_loaders(table: StepTable) -> None:
    """The loader took a millisecond more in the same step, which is not where the second went."""
    late = longer(longer(table, 100, 1.0, kind=None), 100, 0.001, kind=0)
    found = [finding for finding in alarms(late) if finding.step == 101]
    assert found
    assert all(finding.span == "step" for finding in found)
