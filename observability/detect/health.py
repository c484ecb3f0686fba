"""Is the training itself healthy: skipped steps, loss and gradient spikes, growing memory."""

from __future__ import annotations

from typing import Final

import numpy as np

from observability.detect.baseline import NEAR_TAIL, moving_median, noise_scale
from observability.detect.findings import (
    DIVERGENCE,
    HIGH,
    LOSS_SPIKE,
    MEMORY_PRESSURE,
    SKIPPED_STEP,
    Finding,
    severity,
    size,
)
from observability.read import StepTable

_WINDOW: Final = 31  # steps: short, as losses fall fast at first
_LEAST_STEPS: Final = 20
_LEAST_LOSS_RISE: Final = 0.25  # of the loss around it
_LEAST_NORM_RISE: Final = np.log(3.0)
_SKIPPED_IN_A_ROW: Final = 3
_MANY_SKIPPED: Final = 0.1  # of the steps
_LEAK: Final = 1.2  # growth of memory from the first tenth to the last that is worth a line


def findings(table: StepTable) -> list[Finding]:
    return _skipped(table) + _spikes(table) + _growth(table) + divergence(table)


def divergence(table: StepTable) -> list[Finding]:
    """Training that went wrong for good: updates that are skipped again and again, or a loss that rose and stayed."""
    skipped = table.skipped
    end = int(table.step[-1])
    runs = np.flatnonzero(np.diff(np.concatenate([[0], skipped.astype(int), [0]])))
    for begin, stop in zip(runs[::2].tolist(), runs[1::2].tolist(), strict=True):
        if stop - begin >= _SKIPPED_IN_A_ROW:
            text = f"loss or gradient was not finite in {stop - begin} steps in a row: no update was made"
            return [_diverged(table, begin, stop - 1, text)]
    if len(table) >= _LEAST_STEPS and np.sum(skipped) > _MANY_SKIPPED * len(table):
        first = int(np.flatnonzero(skipped)[0])
        return [
            _diverged(table, first, len(table) - 1, f"{int(np.sum(skipped))} updates were skipped up to step {end}")
        ]
    loss = table.values["loss"]
    rows = np.flatnonzero(~skipped & np.isfinite(loss))
    if len(rows) < 2 * _LEAST_STEPS:
        return []
    smooth = moving_median(loss[rows], _WINDOW)
    last = float(np.median(loss[rows][-max(len(rows) // 10, 10) :]))
    best = int(np.argmin(smooth[: -max(len(rows) // 10, 10)]))
    noise = noise_scale(loss[rows] - smooth, abs(last), NEAR_TAIL)
    low = float(smooth[best])
    if last - low >= max(_LEAST_LOSS_RISE * abs(low), 2 * noise):
        over = np.flatnonzero(smooth[best:] >= low + 0.5 * (last - low))
        first = int(rows[best + int(over[0])]) if len(over) else int(rows[best])
        text = f"the loss rose from {low:.3g} at step {table.step[rows[best]]:,} to {last:.3g} and stayed there"
        return [_diverged(table, first, len(table) - 1, text)]
    return []


def _diverged(table: StepTable, first: int, last: int, text: str) -> Finding:
    """A finding on rows `first` to `last`; no time is lost."""
    seconds = float(np.median(table.seconds))
    begin, end = int(table.step[first]), int(table.step[last])
    return Finding(DIVERGENCE, begin, end, begin, "step", seconds, seconds, float("inf"), HIGH, text)


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
