"""Steps on a machine that other programs share all the time: what is whose, and one change of level in much scatter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.detection import grid, grid_cases
from observability.detect.change import ENOUGH_STEPS, LEAST_STEPS, find_change, lasting_shifts
from observability.detect.detector import detect
from observability.detect.findings import DRIFT, INTERFERENCE, SPIKE, THROTTLE, Finding
from observability.detect.host import processors
from observability.detect.sustained import find_shifts
from observability.read import StepTable
from tests.helpers import made_traces as made


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
        level = made.wandering(np.random.default_rng(seed), 150, 0.95, 0.1)
        found += find_change(np.exp(level), 0.1) is not None
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


def test_steps_that_scatter_most_have_the_smallest_votes() -> None:
    """Half of the steps tell next to nothing: with equal votes they hide a change that the others show."""
    found = {True: 0, False: 0}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scatter = rng.permutation(np.repeat([0.3, 3.0], 75))
        times = np.exp(scatter * rng.standard_normal(150))
        assert find_change(times, 0.1, scatter) is None
        times[75:] *= 1.6
        for told in found:
            found[told] += find_change(times, 0.1, scatter if told else None) is not None
    assert found[True] >= 19
    assert found[False] <= 10


def test_a_layer_half_again_as_slow_where_its_times_scatter_by_as_much() -> None:
    """Its like tell by how much each step scatters."""
    found = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        table, fault = grid_cases.slow_layer(0.5)(grid.window("loaded", "tuning", 150, rng), rng)
        assert fault is not None
        found += any(alarm.span == fault.span for alarm in alarms(table))
    assert found >= 18


def test_a_loader_that_grows_slower_over_most_of_the_run(loaded: StepTable) -> None:
    """Half of its slow steps are hardly slower than the first ones."""
    rows, data = np.arange(20, 150), grid_cases.kind_index(loaded, "data")
    late = 1.5 * grid_cases.typical(loaded) * np.linspace(0, 1, len(rows))
    (finding,) = alarms(grid_cases.added(loaded, rows, [data], late))
    assert (finding.cause, finding.span) == (DRIFT, "data")
    assert finding.first_step <= 50


def test_few_steps_tell_nothing_of_levels_that_others_make_come_and_go() -> None:
    """The first half of a run of 60 steps on its own, then with others beside it."""
    times = np.repeat([1.0, 3.0], 30) * np.exp(0.02 * np.random.default_rng(0).standard_normal(60))
    assert find_shifts(times) != []
    assert lasting_shifts(times, 0.2) == []
    assert lasting_shifts(np.repeat(times, 2), 0.2) != []
    assert len(times) < ENOUGH_STEPS
