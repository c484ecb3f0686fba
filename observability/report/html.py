"""One self-contained HTML file that tells what happened in a run, for someone who did not run it.

Everything that comes from spans is escaped: text by `html.escape`, data as JSON in a script element in which "<" and
its like cannot stand. A Content-Security-Policy lets only the three scripts run that this file itself puts in, by
their hashes, and nothing be loaded from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib import resources
from pathlib import Path
from typing import Any

from observability.detect import HIGH, Analysis, verdict
from observability.files import write_whole
from observability.report import curves, figures, sections
from observability.report.compare import Comparison
from observability.report.facts import run_name, subtitle


def write_html(analysis: Analysis, path: Path, comparison: Comparison | None = None) -> None:
    """Writes the report; the file appears whole or not at all."""
    text = page(analysis, comparison)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def page(analysis: Analysis, comparison: Comparison | None = None) -> str:
    """The whole document as text."""
    from plotly.offline import get_plotlyjs

    plots = _plots(analysis, comparison)
    scripts = {"library": get_plotlyjs(), "data": script_json(plots), "drawing": _asset("page.js")}
    hashes = " ".join(_hash(scripts[name]) for name in ("library", "drawing"))
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
    title = f"Training run {run_name(analysis)}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{_asset('page.css')}</style></head><body><main>",
            *_body(analysis, comparison, plots, title),
            "</main>",
            f'<script type="application/json" id="plots">{scripts["data"]}</script>',
            f"<script>{scripts['library']}</script>",
            f"<script>{scripts['drawing']}</script>",
            "</body></html>",
        ]
    )


def script_json(value: Any) -> str:
    """JSON that may stand in a script element: no character in it can end the element or start a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return resources.files("observability.report").joinpath("page", name).read_text(encoding="utf-8")


def _plots(analysis: Analysis, comparison: Comparison | None) -> dict[str, figures.Figure]:
    plots = {
        "loss": curves.loss_plot(analysis),
        "grad-norm": curves.grad_norm_plot(analysis),
        "learning-rate": curves.learning_rate_plot(analysis),
        "throughput": curves.throughput_plot(analysis),
        "steps": figures.step_plot(analysis),
        "phases": figures.phase_plot(analysis),
        "clusters": figures.cluster_plot(analysis),
        "slowest": figures.slowest_plot(analysis),
        "memory": figures.memory_plot(analysis),
    }
    if comparison is not None and len(comparison.steps):
        plots["compared"] = figures.comparison_plot(comparison)
        plots["compared-loss"] = curves.comparison_loss_plot(comparison)
    return {name: plot for name, plot in plots.items() if plot is not None}


def _body(analysis: Analysis, comparison: Comparison | None, plots: dict[str, figures.Figure], title: str) -> list[str]:
    grade = "bad" if any(f.severity == HIGH for f in analysis.alarms) else "warn" if analysis.alarms else ""
    return [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="subtitle">{html.escape(subtitle(analysis))}</p>',
        f'<div class="verdict {grade}">{html.escape(verdict(analysis))}</div>',
        sections.tiles(analysis),
        sections.causes(analysis),
        *([sections.comparison_section(comparison, plots)] if comparison is not None else []),
        sections.plot("loss", plots),
        *_pair(sections.plot("grad-norm", plots), sections.plot("learning-rate", plots)),
        sections.plot("steps", plots, tall=True),
        *_pair(sections.plot("phases", plots), sections.plot("slowest", plots)),
        sections.kernels_section(analysis),
        *_pair(sections.plot("throughput", plots), sections.plot("memory", plots)),
        sections.plot("clusters", plots, sections.cluster_text(analysis)),
        sections.anomaly_table(analysis),
        sections.told_section(analysis),
        sections.facts_section(analysis),
        sections.notes(analysis),
    ]


def _pair(first: str, second: str) -> list[str]:
    """Two sections beside each other, or what there is of them."""
    there = [text for text in (first, second) if text]
    return ['<div class="pair">', *there, "</div>"] if len(there) == 2 else there
