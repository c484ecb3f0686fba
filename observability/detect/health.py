"""Is the training itself healthy: skipped steps, loss and gradient spikes, growing memory."""

from __future__ import annotations

from typing import Final

import numpy as np

from observability.detect.baseline import moving_median, noise_scale
from observability.detect.findings import HIGH, LOSS_SPIKE, MEMORY_PRESSURE, SKIPPED_STEP, Finding, severity, size
from observability.read import StepTable

_WINDOW: Final = 31  # steps: short, as losses fall fast at first
_LEAST_STEPS: Final = 20
_LEAST_LOSS_RISE: Final = 0.25  # of the loss around it
_LEAST_NORM_RISE: Final = np.log(3.0)
_LEAK: Final = 1.2  # growth of memory from the first tenth to the last that is worth a line


def findings(table: StepTable) -> list[Finding]:
    return _skipped(table) + _spikes(table) + _growth(table)


def _finding(table: StepTable, row: int, cause: str, z: float, grade: str | None, evidence: str) -> Finding:
    number, seconds = int(table.step[row]), float(table.seconds[row])
    return Finding(cause, number, number, number, "step", seconds, seconds, z, grade, evidence)


def _skipped(table: StepTable) -> list[Finding]:
    loss, norm = table.values["loss"], table.values["grad_norm"]
    result = []
    for row in np.flatnonzero(table.skipped):
        what = "loss" if not np.isfinite(loss[row]) else "gradient" if not np.isfinite(norm[row]) else "step"
        text = "the update was skipped" if what == "step" else f"the {what} was not finite, so the update was skipped"
        result.append(_finding(table, int(row), SKIPPED_STEP, float("inf"), HIGH, text))
    return result


def _spikes(table: StepTable) -> list[Finding]:
    """Loss or gradient norm far above its surroundings; one finding a step, for whichever is clearer."""
    loss, norm = table.values["loss"], table.values["grad_norm"]
    usable = ~table.skipped & np.isfinite(loss)
    rows = np.flatnonzero(usable)
    if len(rows) < _LEAST_STEPS:
        return []
    best: dict[int, tuple[float, str]] = {}
    around = moving_median(loss[rows], _WINDOW)
    excess = loss[rows] - around
    scale = noise_scale(excess, float(np.median(around)))
    for i in np.flatnonzero((excess >= 4 * scale) & (excess >= _LEAST_LOSS_RISE * np.abs(around))):
        best[int(rows[i])] = (float(excess[i] / scale), f"loss {loss[rows[i]]:.3g} where {around[i]:.3g} was usual")
    rows = np.flatnonzero(usable & np.isfinite(norm) & (norm > 0))
    if len(rows) >= _LEAST_STEPS:
        logs = np.log(norm[rows])
        excess = logs - moving_median(logs, _WINDOW)
        scale = noise_scale(excess, 1.0)
        for i in np.flatnonzero((excess >= 4 * scale) & (excess >= _LEAST_NORM_RISE)):
            z = float(excess[i] / scale)
            if z > best.get(int(rows[i]), (0.0, ""))[0]:
                best[int(rows[i])] = (z, f"gradient norm {norm[rows[i]]:.3g}, {np.exp(excess[i]):.1f}x the usual")
    return [_finding(table, row, LOSS_SPIKE, z, severity(z), text) for row, (z, text) in sorted(best.items())]


def _growth(table: StepTable) -> list[Finding]:
    """Memory that keeps growing over the run."""
    held = table.values["allocated_bytes"]
    tenth = len(held) // 10
    if tenth < 2 or not np.all(np.isfinite(held)):
        return []
    first, last = float(np.median(held[:tenth])), float(np.median(held[-tenth:]))
    grew = np.sum(np.diff(held) > 0)
    if first <= 0 or last < _LEAK * first or grew < 5:
        return []
    text = f"memory grew from {size(first)} to {size(last)} over the run, in {grew} steps of growth"
    begin, end = int(table.step[0]), int(table.step[-1])
    seconds = float(np.median(table.seconds))
    return [Finding(MEMORY_PRESSURE, begin, end, end, "step", seconds, seconds, 0.0, None, text)]
