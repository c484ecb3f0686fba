"""Steps on a machine that other programs share all the time: what is whose, and one change of level in much scatter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.detection import grid, grid_cases
from observability.detect.change import LEAST_STEPS, find_change, lasting_shifts
from observability.detect.detector import detect
from observability.detect.findings import INTERFERENCE, SPIKE, THROTTLE, Finding
from observability.detect.host import processors
from observability.read import StepTable


@pytest.fixture(scope="module")
def loaded() -> StepTable:
    """150 steps of a run that four programs beside it slowed fivefold."""
    return grid.windows("loaded", "tuning", 150)[5]


def alarms(table: StepTable) -> list[Finding]:
    return [finding for finding in detect(table)[0] if finding.is_alarm]


def test_a_step_is_what_it_cost_times_the_crowd_times_idleness(loaded: StepTable) -> None:
    parts = processors(loaded)
    assert parts is not None
    np.testing.assert_allclose(parts.cost * parts.crowd * parts.idle, loaded.seconds)
    assert np.median(parts.crowd) > 3


def test_what_all_steps_wait_is_priced_and_no_alarm(loaded: StepTable) -> None:
    findings, _ = detect(loaded)
    assert [finding for finding in findings if finding.is_alarm] == []
    (priced,) = [finding for finding in findings if finding.cost is not None and finding.cause == INTERFERENCE]
    assert priced.cost is not None
    assert priced.cost > 0.2 * loaded.seconds.sum()


@pytest.mark.parametrize(
    ("inject", "cause"),
    [
        (grid_cases.slower_gpu(0.5), THROTTLE),
        (grid_cases.busy_loops, INTERFERENCE),
        (grid_cases.single(2.0, None, (SPIKE,)), SPIKE),
        (grid_cases.single(5.0, None, (INTERFERENCE,), held=True), INTERFERENCE),
    ],
    ids=["slower GPU", "more programs", "a sleep", "held up"],
)
def test_each_part_tells_its_own_cause(loaded: StepTable, inject: grid_cases.Inject, cause: str) -> None:
    table, fault = inject(loaded, np.random.default_rng(4))
    assert fault is not None
    (finding,) = alarms(table)
    assert finding.cause == cause
    assert grid.shared(finding, fault) >= (fault.last - fault.first) / 3


def test_steps_that_are_computed_elsewhere_have_no_such_parts(loaded: StepTable) -> None:
    """One thread that only watches a device runs or waits all the time too, and says nothing of the device's time."""
    seconds = loaded.values["cpu_seconds"] + loaded.values["run_delay_seconds"]
    watching = {"cpu_seconds": 0.1 * loaded.seconds, "run_delay_seconds": 0.3 * loaded.seconds}
    unlike = {
        "cpu_seconds": np.roll(loaded.values["cpu_seconds"], 40),
        "run_delay_seconds": np.full(150, seconds.mean()),
    }
    for values in (watching, unlike, {"cpu_seconds": np.full(150, np.nan)}):
        assert processors(replace(loaded, values=loaded.values | values)) is None


def test_a_change_by_less_than_steps_scatter_by_is_found_where_it_is() -> None:
    rng = np.random.default_rng(0)
    times = np.exp(0.5 * rng.standard_t(3, 150))
    assert find_change(times, 0.2) is None
    times[90:] *= 1.6
    change = find_change(times, 0.2)
    assert change is not None
    assert abs(change.first - 90) <= 12
    assert change.last == 149
    assert change.level / change.healthy == pytest.approx(1.6, rel=0.25)


def test_a_level_that_wanders_by_itself_is_no_change() -> None:
    """The same scatter with a memory of tens of steps tells as little as a few independent steps would."""
    found = 0
    for seed in range(20):
        rng, walk = np.random.default_rng(seed), np.zeros(150)
        for step in range(1, 150):
            walk[step] = 0.95 * walk[step - 1] + 0.1 * rng.standard_normal()
        found += find_change(np.exp(walk), 0.1) is not None
    assert found <= 1


def test_what_began_with_the_run_or_was_short_is_none_of_the_changes() -> None:
    times = np.exp(0.02 * np.random.default_rng(0).standard_normal(150))
    early, short, late = times.copy(), times.copy(), times.copy()
    early[:60] *= 2
    short[80 : 80 + LEAST_STEPS - 8] *= 2
    late[100:] *= 2
    assert lasting_shifts(early, 0.2) == lasting_shifts(short, 0.2) == []
    (shift,) = lasting_shifts(late, 0.2)
    assert abs(shift.first - 100) <= 4
