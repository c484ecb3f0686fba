"""The plots of the HTML report, as plotly figures in plain dicts.

Long series are thinned to `POINTS` by keeping each bucket's least and greatest value, so no spike is lost; steps with
findings are marked from the full data.
"""

from __future__ import annotations

import html
from typing import Any, Final

import numpy as np

from observability import schema
from observability.detect import (
    HIGH,
    LOSS_SPIKE,
    LOW,
    MEDIUM,
    PERIODIC,
    SKIPPED_STEP,
    Analysis,
    Finding,
    duration,
    moving_median,
)
from observability.read import PAUSES, Floats, Ints, pause_seconds
from observability.report.compare import Comparison

Figure = dict[str, Any]
POINTS: Final = 2000
_MARKS: Final = 1500  # findings marked in one plot, the worst first
_BUCKETS: Final = 250
_BARS: Final = 12
# On a dark page page.js puts others in the place of these five.
PAPER: Final = "#ffffff"
INK: Final = "#1c2430"
GRID: Final = "#e8edf2"
PALE: Final = "#b9cdf3"
STRONG: Final = "#2450a4"
_SEVERITY_COLOURS: Final = {LOW: "#7b8794", MEDIUM: "#d98a1c", HIGH: "#c0312b"}
_PHASE_COLOURS: Final = {
    schema.DATA: "#e0a43a",
    schema.FORWARD: "#4f8ef0",
    schema.BACKWARD: STRONG,
    schema.OPTIMIZER: "#4aa889",
    schema.CHECKPOINT: "#b0524f",
    schema.EVAL: "#9a6fb8",
    schema.SAMPLE: "#c07fa5",
    "other": "#c3ccd6",
}
_CLUSTER_COLOURS: Final = ("#4f8ef0", "#4aa889", "#9a6fb8", "#e0a43a", "#5d6b7c")
_HIGH_LATENCY_COLOUR: Final = "#c0312b"
_LINE: Final = "#4f8ef0"
_GREY: Final = "#66717f"


def thinned(values: Floats, points: int = POINTS) -> Ints:
    """Rows to draw: all, or the least and the greatest of each bucket."""
    count = len(values)
    if count <= points:
        return np.arange(count)
    rows: list[int] = []
    for part in np.array_split(np.arange(count), points // 2):
        finite = part[np.isfinite(values[part])]
        if len(finite):
            rows += {int(finite[np.argmin(values[finite])]), int(finite[np.argmax(values[finite])])}
    return np.array(sorted(rows), dtype=np.int64)


def numbers(values: Any) -> list[float | None]:
    """Numbers for JSON, five digits, None where not finite."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in np.asarray(values, dtype=float)]


def step_plot(analysis: Analysis) -> Figure:
    table = analysis.table
    wall = table.wall_seconds * 1e3
    rows = thinned(wall)
    expected = analysis.scored.step.expected * 1e3
    traces = [
        line(table.step[rows], wall[rows], "step", PALE, 1),
        line(table.step[rows], expected[rows], "expected (moving median)", STRONG, 2),
    ]
    marked = [f for f in analysis.anomalies if f.cause not in (LOSS_SPIKE, SKIPPED_STEP)]
    traces += marks(marked, dict(zip(table.step.tolist(), wall.tolist(), strict=True)))
    figure = make_figure(traces, "step", "step time (ms)")
    figure["layout"]["shapes"] = [
        {
            "type": "rect",
            "xref": "x",
            "yref": "paper",
            "x0": f.first_step,
            "x1": f.last_step,
            "y0": 0,
            "y1": 1,
            "fillcolor": _SEVERITY_COLOURS[str(f.severity)],
            "opacity": 0.09,
            "line": {"width": 0},
        }
        for f in analysis.alarms
        if f.last_step > f.first_step and f.cause != PERIODIC
    ][:50]
    figure["layout"]["shapes"] += [
        {
            "type": "line",
            "xref": "x",
            "yref": "paper",
            "x0": int(table.step[row]) - 0.5,
            "x1": int(table.step[row]) - 0.5,
            "y0": 0,
            "y1": 1,
            "line": {"width": 1, "dash": "dot", "color": _GREY},
            "label": {"text": "resumed", "textposition": "start", "textangle": 0, "font": {"size": 11, "color": _GREY}},
        }
        for row in table.restarts[:50]
    ]
    _show_from_zero(figure, wall[~analysis.scored.cold])
    return figure


def phase_plot(analysis: Analysis) -> Figure | None:
    """Each phase's share of the time, averaged over buckets of steps."""
    table = analysis.table
    columns = {k.name: table.durations[:, i] for i, k in enumerate(table.kinds) if k.level == "phase"}
    if not columns:
        return None
    columns["other"] = np.maximum(table.seconds - np.sum(list(columns.values()), axis=0), 0.0)
    paused = {name: pause_seconds(table.pauses, table.step, name) for name in PAUSES}
    columns |= {name: values for name, values in paused.items() if values.any()}
    parts = np.array_split(np.arange(len(table)), min(_BUCKETS, len(table)))
    middle = [int(table.step[part[len(part) // 2]]) for part in parts]
    whole = np.array([sum(float(np.sum(values[part])) for values in columns.values()) for part in parts])
    traces = []
    for name, values in columns.items():
        share = np.array([float(np.sum(values[part])) for part in parts]) / np.maximum(whole, 1e-12) * 100
        colour = _PHASE_COLOURS.get(name, "#8894a3")
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": safe(name, 24),
                "x": middle,
                "y": numbers(share),
                "stackgroup": "time",
                "line": {"width": 0.5, "color": colour},
                "fillcolor": colour,
                "hovertemplate": "%{y:.1f}%",
            }
        )
    figure = make_figure(traces, "step", "share of time (%)")
    figure["layout"]["yaxis"]["range"] = [0, 100]
    figure["layout"]["hovermode"] = "x unified"
    return figure


def cluster_plot(analysis: Analysis) -> Figure:
    """Steps by time and by the feature that sets the slowest cluster apart."""
    from observability.detect import step_features

    table, clusters = analysis.table, analysis.clusters
    high = clusters.high_latency
    features = {feature.name: feature for feature in step_features(table)}
    telling = features.get(high.feature) if high else None
    y = telling.values if telling is not None else np.zeros(len(table))
    if telling is not None and telling.unit == "share":
        y = y * 100
    elif telling is not None and telling.unit == "s":
        y = y * 1e3
    unit = {"share": " (%)", "s": " (ms)"}.get(telling.unit, "") if telling is not None else ""
    traces = []
    for cluster in range(clusters.k):
        rows = np.flatnonzero(clusters.labels == cluster)
        is_high = high is not None and cluster == high.cluster
        if len(rows) > POINTS // 2:
            rows = rows[np.linspace(0, len(rows) - 1, POINTS // 2).astype(int)]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "high-latency cluster" if is_high else f"cluster {cluster + 1}",
                "x": numbers(table.wall_seconds[rows] * 1e3),
                "y": numbers(y[rows]),
                "text": [f"step {step}" for step in table.step[rows].tolist()],
                "hovertemplate": "%{text}: %{x:.4g} ms, %{y:.3g}<extra></extra>",
                "marker": {
                    "size": 8 if is_high else 5,
                    "opacity": 0.75,
                    "color": _HIGH_LATENCY_COLOUR if is_high else _CLUSTER_COLOURS[cluster % len(_CLUSTER_COLOURS)],
                },
            }
        )
    return make_figure(traces, "step time (ms)", safe(high.feature if high else "", 40) + unit)


def slowest_plot(analysis: Analysis) -> Figure | None:
    """The kinds of span that take most of a typical step, at the deepest level that the trace has."""
    table = analysis.table
    levels = [level for level in ("kernel", "layer", "phase") if any(k.level == level for k in table.kinds)]
    if not levels:
        return None
    kinds = [(float(np.median(table.durations[:, i])), k) for i, k in enumerate(table.kinds) if k.level == levels[0]]
    kinds = sorted(kinds, key=lambda item: -item[0])[:_BARS][::-1]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": numbers([seconds * 1e3 for seconds, _ in kinds]),
        "y": [safe(kind.label, 48) for _, kind in kinds],
        "text": [duration(seconds) for seconds, _ in kinds],
        "marker": {"color": _LINE},
        "hovertemplate": "%{y}: %{text}<extra></extra>",
    }
    figure = make_figure([trace], "ms in a typical step", "")
    figure["layout"]["margin"]["l"] = 10
    figure["layout"]["yaxis"]["automargin"] = True
    return figure


def memory_plot(analysis: Analysis) -> Figure | None:
    table = analysis.table
    held = table.values["allocated_bytes"]
    if not np.any(np.isfinite(held)) or np.nanmax(held) <= 0:
        return None
    rows = thinned(held)
    trace = line(table.step[rows], held[rows] / 2**20, "held by the run", "#4aa889", 2)
    trace["line"]["shape"] = "hv"
    figure = make_figure([trace], "step", "GPU memory (MiB)")
    figure["layout"]["yaxis"]["rangemode"] = "tozero"
    return figure


def comparison_plot(comparison: Comparison) -> Figure:
    rows = thinned(np.maximum(comparison.seconds, comparison.other_seconds))
    traces = [
        line(comparison.steps[rows], comparison.other_seconds[rows] * 1e3, "the other run", "#e0a43a", 1),
        line(comparison.steps[rows], comparison.seconds[rows] * 1e3, "this run", "#2f6fde", 1),
    ]
    figure = make_figure(traces, "step", "step time (ms)")
    _show_from_zero(figure, np.maximum(comparison.seconds, comparison.other_seconds)[1:] * 1e3)
    return figure


def _show_from_zero(figure: Figure, values: Floats) -> None:
    """The axis at first shows zero to the greatest of `values`; a double click in the plot shows everything."""
    if len(values):
        figure["layout"]["yaxis"]["range"] = [0, 1.08 * float(np.max(values))]


def smooth(values: Floats) -> Floats:
    """Median over a fortieth of the run, at least nine steps, ignoring what is not finite."""
    finite = np.flatnonzero(np.isfinite(values))
    if not len(finite):
        return values
    filled = np.interp(np.arange(len(values)), finite, values[finite])
    return moving_median(filled, max(9, len(values) // 40))


def line(x: Ints, y: Floats, name: str, colour: str, width: float) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": x.tolist(),
        "y": numbers(y),
        "line": {"color": colour, "width": width},
        "hovertemplate": "step %{x}: %{y:.4g}",
    }


def marks(findings: list[Finding], height: dict[int, float]) -> list[Figure]:
    """One trace of markers for each severity, the text on hover being the evidence."""
    worst = sorted(findings, key=lambda f: -f.z)[:_MARKS]
    traces = []
    for grade in (LOW, MEDIUM, HIGH):
        marked = [f for f in worst if f.severity == grade and f.step in height]
        if marked:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": f"{grade} severity",
                    "x": [f.step for f in marked],
                    "y": numbers([height[f.step] for f in marked]),
                    "text": [safe(f"{f.cause}: {f.evidence}", 160) for f in marked],
                    "hovertemplate": "step %{x}: %{text}<extra></extra>",
                    "marker": {"size": 9, "color": _SEVERITY_COLOURS[grade], "line": {"width": 1, "color": PAPER}},
                }
            )
    return traces


def safe(text: str, most: int = 80) -> str:
    """Text for plotly, which reads some HTML in labels."""
    return html.escape(text if len(text) <= most else text[: most - 1] + "…")


def make_figure(traces: list[Figure], x_title: str, y_title: str) -> Figure:
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": "#c3ccd6"}
    return {
        "data": traces,
        "layout": {
            "margin": {"l": 64, "r": 16, "t": 8, "b": 48},
            "paper_bgcolor": PAPER,
            "plot_bgcolor": PAPER,
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
            "xaxis": {**axis, "title": {"text": x_title}},
            "yaxis": {**axis, "title": {"text": y_title}},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "hovermode": "closest",
        },
    }
