"""How a run went, for people: its summary, and its curves from metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entrenar_gpu.events import RunSummary
from entrenar_gpu.train.metrics_file import read_metrics


class FinishedRun(RunSummary):
    """A run's summary that can show its curves."""

    def plot(self) -> Any:
        """Loss, evaluation loss and learning rate by step, as a plotly figure, which a notebook shows."""
        return plot_run(self.output)


def plot_run(folder: str | Path) -> Any:
    """The curves of a run folder as a plotly figure. Raises UserError where it holds no metrics."""
    import plotly.graph_objects as go

    rows = read_metrics(folder)
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    figure = go.Figure()
    figure.add_scatter(x=[r["step"] for r in steps], y=[r["loss"] for r in steps], name="loss", mode="lines")
    if evaluations:
        at, losses = [r["step"] for r in evaluations], [r["eval_loss"] for r in evaluations]
        figure.add_scatter(x=at, y=losses, name="evaluation loss", mode="lines+markers")
    rates = [r["lr"] for r in steps]
    figure.add_scatter(x=[r["step"] for r in steps], y=rates, name="learning rate", yaxis="y2", line={"dash": "dot"})
    figure.update_layout(
        title=Path(folder).name,
        xaxis_title="step",
        yaxis_title="loss",
        yaxis2={"title": "learning rate", "overlaying": "y", "side": "right", "showgrid": False},
    )
    return figure
