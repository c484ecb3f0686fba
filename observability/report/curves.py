"""The plots of how the training went, step by step: loss, gradient norm, learning rate, throughput."""

from __future__ import annotations

from typing import Final

import numpy as np

from observability import schema
from observability.detect import LOSS_SPIKE, SKIPPED_STEP, Analysis
from observability.read import Floats
from observability.report.compare import Comparison
from observability.report.figures import PALE, STRONG, Figure, line, make_figure, marks, smooth, thinned

_EVALUATION: Final = "#d98a1c"


def loss_plot(analysis: Analysis) -> Figure | None:
    table = analysis.table
    loss = table.values["loss"]
    if not np.any(np.isfinite(loss)):
        return None
    rows = thinned(loss)
    traces = [
        line(table.step[rows], loss[rows], "training, each step", PALE, 1),
        line(table.step[rows], smooth(loss)[rows], "training, smoothed", STRONG, 2.2),
    ]
    evaluated = [pause for pause in table.pauses if pause.name == schema.EVAL and np.isfinite(pause.loss)]
    if evaluated:
        steps, losses = np.array([p.step for p in evaluated]), np.array([p.loss for p in evaluated])
        traces.append(line(steps, losses, "evaluation", _EVALUATION, 2) | {"mode": "lines+markers"})
    marked = [f for f in analysis.anomalies if f.cause in (LOSS_SPIKE, SKIPPED_STEP)]
    ceiling = float(np.nanmax(np.where(np.isfinite(loss), loss, np.nan)))
    at = {int(step): float(value) for step, value in zip(table.step, loss, strict=True)}
    traces += marks(marked, {step: value if np.isfinite(value) else ceiling for step, value in at.items()})
    return make_figure(traces, "step", "loss (nats a token)")


def grad_norm_plot(analysis: Analysis) -> Figure | None:
    return _curve(analysis, "grad_norm", "gradient norm", smoothed=True)


def learning_rate_plot(analysis: Analysis) -> Figure | None:
    return _curve(analysis, "learning_rate", "learning rate", smoothed=False)


def throughput_plot(analysis: Analysis) -> Figure | None:
    plot = _curve(analysis, "tokens_per_second", "tokens a second", smoothed=True)
    if plot is not None:
        plot["layout"]["yaxis"]["rangemode"] = "tozero"
    return plot


def _curve(analysis: Analysis, key: str, title: str, smoothed: bool) -> Figure | None:
    """One value of every step, and its median over neighbouring steps where it is noisy."""
    table = analysis.table
    values: Floats = table.values.get(key, np.zeros(0))
    if not np.any(np.isfinite(values)):
        return None
    rows = thinned(values)
    if not smoothed:
        return make_figure([line(table.step[rows], values[rows], title, STRONG, 2)], "step", title)
    traces = [
        line(table.step[rows], values[rows], "each step", PALE, 1),
        line(table.step[rows], smooth(values)[rows], "smoothed", STRONG, 2.2),
    ]
    return make_figure(traces, "step", title)


def comparison_loss_plot(comparison: Comparison) -> Figure | None:
    if not (np.any(np.isfinite(comparison.loss)) and np.any(np.isfinite(comparison.other_loss))):
        return None
    rows = thinned(comparison.loss)
    traces = [
        line(comparison.steps[rows], smooth(comparison.other_loss)[rows], "the other run", "#e0a43a", 1.5),
        line(comparison.steps[rows], smooth(comparison.loss)[rows], "this run", "#2f6fde", 1.5),
    ]
    return make_figure(traces, "step", "loss, smoothed (nats a token)")
