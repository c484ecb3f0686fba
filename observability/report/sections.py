"""The sections of the HTML report: what a run's findings, kernels and plots look like as elements.

Every text that comes from spans is escaped.
"""

from __future__ import annotations

import html
from typing import Final

import numpy as np

from observability.detect import (
    CAUSES,
    CONFIRMED,
    Analysis,
    Finding,
    by_cause,
    duration,
    in_a_row,
    lost_in,
    number_of_steps,
    time_lost,
)
from observability.report import figures
from observability.report.compare import Comparison
from observability.report.facts import run_facts
from observability.report.kernels import Ceilings, KernelRow, kernel_report, of_ceiling, rate

_ROWS: Final = 300  # rows of a table, the worst first
_GROUPS: Final = 12
_TEXTS: Final = {
    "loss": (
        "Loss",
        "How wrong the model still is, in training and on the evaluation data: it should fall and flatten. Evaluation"
        " that rises while training falls means overfitting. A single high point is one hard batch; a rise that"
        " stays means that training went wrong.",
    ),
    "steps": (
        "Step time",
        "How long each step took, with its checkpoint and without evaluations, beside what was expected of it."
        " Marked are steps that were slower than this run's own noise explains; shaded stretches stayed slow. First"
        " steps that compile may lie above the plot: double-click to see all, drag to zoom in. With the keyboard: Tab"
        " to a plot; + and − zoom, arrows move, 0 shows all.",
    ),
    "grad-norm": ("Gradient norm", "Before clipping. Rising for good, or far above the rest, it warns of divergence."),
    "learning-rate": ("Learning rate", "As the schedule set it."),
    "throughput": ("Throughput", "Tokens that went through the model, padding left out, per second of a step."),
    "phases": (
        "Where the time goes",
        "Each phase's share. Forward and backward should hold nearly all of it; a growing share of data or checkpoint"
        " is time in which the GPU waits.",
    ),
    "clusters": ("Kinds of steps", ""),
    "slowest": ("Slowest parts", "What a typical step spends most of its time in."),
    "memory": ("Memory", "GPU memory that the run holds. It should be flat."),
}


def tiles(analysis: Analysis) -> str:
    table = analysis.table
    loss = table.values["loss"][np.isfinite(table.values["loss"])]
    tokens = table.values["tokens"]
    wall = table.total_seconds
    tiles = [
        ("steps", f"{len(table):,}"),
        ("typical step", duration(float(np.median(table.seconds)))),
        ("19 of 20 steps within", duration(float(np.quantile(table.wall_seconds, 0.95)))),
        ("in all", duration(wall)),
    ]
    if np.all(np.isfinite(tokens)) and wall > 0:
        tiles.append(("trained tokens a second", f"{np.sum(tokens) / wall:,.0f}"))
    if len(loss):
        tenth = max(1, len(loss) // 10)
        tiles.append(("loss, first and last tenth", f"{np.mean(loss[:tenth]):.3g} → {np.mean(loss[-tenth:]):.3g}"))
    tiles.append(("lost, explained or not", f"{time_lost(analysis) / max(wall, 1e-12):.1%}"))
    cells = (f'<div class="tile"><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>' for k, v in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def causes(analysis: Analysis) -> str:
    """One row a cause: how often, how much time, the worst case."""
    groups = by_cause([*analysis.alarms, *analysis.explained])
    if not groups:
        return ""
    rows = []
    for cause, findings in sorted(groups.items(), key=lambda g: -sum(lost_in(analysis, f) for f in g[1]))[:_GROUPS]:
        worst = max(findings, key=lambda f: (f.is_alarm, f.z))
        explained = not any(f.is_alarm for f in findings)
        badge = "explained" if explained else str(worst.severity)
        lost = sum(lost_in(analysis, f) for f in findings)
        cost = duration(lost) if lost else "–"
        rows.append(
            f'<tr><td><span class="badge {badge}">{badge}</span></td><td>{CAUSES[cause]}</td>'
            f'<td class="number">{len(findings):,}</td><td class="number">{cost}</td>'
            f"<td>{html.escape(_where(worst))}: {html.escape(worst.evidence)}</td></tr>"
        )
    head = '<th></th><th>Cause</th><th class="number">Times</th><th class="number">Time lost</th><th>Clearest case</th>'
    return section(
        "What happened", as_table(head, rows), "Causes that the trace gives evidence for, the dearest first."
    )


def _where(finding: Finding) -> str:
    if finding.first_step == finding.last_step:
        return f"step {finding.first_step:,}"
    return f"steps {finding.first_step:,} to {finding.last_step:,}"


def plot(name: str, plots: dict[str, figures.Figure], hint: str = "", tall: bool = False) -> str:
    if name not in plots:
        return ""
    heading, text = _TEXTS[name]
    return section(heading, _plot_element(name, heading, tall), hint or text)


def _plot_element(name: str, label: str, tall: bool = False) -> str:
    """Where page.js draws a plot: reachable with the keyboard, and named to who cannot see it."""
    shape = "plot tall" if tall else "plot"
    return f'<div id="{name}" class="{shape}" tabindex="0" role="img" aria-label="Plot: {html.escape(label)}"></div>'


def cluster_text(analysis: Analysis) -> str:
    clusters, high = analysis.clusters, analysis.clusters.high_latency
    if high is None or clusters.silhouette is None:
        return clusters.meaning.capitalize() + "."
    text = f"Sorted into {clusters.k} kinds; {clusters.meaning} (silhouette {clusters.silhouette:.2f})."
    if not clusters.separate:
        return text
    text += (
        f" The high-latency cluster holds {number_of_steps(len(high.steps))} of {duration(high.mean_seconds)} on"
        f" average, the others take {duration(high.others_mean_seconds)}."
    )
    return text + (f" What sets it apart: {'; '.join(high.distinguished_by)}." if high.distinguished_by else "")


def comparison_section(comparison: Comparison, plots: dict[str, figures.Figure]) -> str:
    parts = [f"<p>{html.escape(comparison.verdict())}.</p>"]
    if comparison.differs:
        unlike = "".join(f"<li>{html.escape(text)}</li>" for text in comparison.differs)
        parts.append(f"<p>Not alike, so that times say little of each other:</p><ul>{unlike}</ul>")
    if comparison.gate_text():
        parts.append(f"<p><strong>{html.escape(comparison.gate_text().capitalize())}.</strong></p>")
    parts += [
        _plot_element(name, label)
        for name, label in (("compared", "step time of both runs"), ("compared-loss", "loss of both runs"))
        if name in plots
    ]
    rows = [
        f'<tr><td>{html.escape(c.label)}</td><td class="number">{duration(c.before)}</td>'
        f'<td class="number">{duration(c.after)}</td>'
        f'<td class="number">{f"{c.after / c.before - 1:+.1%}" if c.before else "new"}</td></tr>'
        for c in [comparison.step_change, *comparison.changes[:40]]
    ]
    head = (
        '<th>Kind of span</th><th class="number">Other run</th><th class="number">This run</th>'
        '<th class="number">Change</th>'
    )
    if len(comparison.steps):
        parts.append(as_table(head, rows))
    return section("Against the other run", "".join(parts), "Kernels, layers and phases whose time really changed.")


def anomaly_table(analysis: Analysis) -> str:
    anomalies = in_a_row(analysis.anomalies)
    worst = sorted(anomalies, key=lambda f: -f.z)[:_ROWS]
    if not worst:
        return section("Anomalies", "<p>None.</p>", "")
    rows = [
        f'<tr><td class="number">{html.escape(_where(f).removeprefix("steps ").removeprefix("step "))}</td>'
        f'<td><span class="badge {f.severity}">{f.severity}</span></td><td>{f.cause}</td>'
        f'<td>{html.escape(f.span)}</td><td class="number">{duration(f.seconds)}</td>'
        f'<td class="number">{f"{f.z:.1f}σ" if np.isfinite(f.z) else "–"}</td><td>{html.escape(f.evidence)}</td></tr>'
        for f in sorted(worst, key=lambda f: f.first_step)
    ]
    head = (
        '<th class="number">Step</th><th>Severity</th><th>Cause</th><th>Span</th><th class="number">Time</th>'
        '<th class="number">Off by</th><th>Evidence</th>'
    )
    hint = "Severity: low from 3σ, medium from 4σ, high above 5σ, in units of this run's own noise."
    if len(anomalies) > _ROWS:
        hint += f" The {_ROWS} worst of {len(anomalies):,}."
    return section("Anomalies", f'<div class="scroll" tabindex="0">{as_table(head, rows)}</div>', hint)


def kernels_section(analysis: Analysis) -> str:
    """Kernels summed over layers, with their rates; or, without kernels in the trace, what the GPU has to do."""
    found = kernel_report(analysis.table)
    if found.busy_share is None or found.idle_seconds is None:
        return ""
    text = f"The GPU computes {found.busy_share:.0%} of a step; {duration(found.idle_seconds)} of a step it is idle."
    if not found.rows:
        return section("The GPU", f"<p>{text}</p>", "Kernel by kernel with --trace-level kernel.")
    text += f" {found.launches:,.0f} kernels a step, in {number_of_steps(found.steps)}."
    rows = [_kernel_row(row, found.ceilings) for row in found.rows[:_ROWS]]
    head = "<th>Kernel</th><th>Shape</th>" + "".join(
        f'<th class="number">{name}</th>' for name in ("Launches a step", "Time", "Share", "Computed", "Moved")
    )
    hint = "By operation and shape, summed over the layers of a typical step."
    if found.ceilings.flops or found.ceilings.bytes:
        hint += " In brackets: of the peak that the GPU's data sheet names; caches can move more than memory does."
    return section("Kernels", f'<p>{text}</p><div class="scroll" tabindex="0">{as_table(head, rows)}</div>', hint)


def _kernel_row(row: KernelRow, limits: Ceilings) -> str:
    group = row.group
    numbers = (
        f"{group.launches:,.0f}",
        duration(row.seconds),
        f"{row.share:.1%}",
        rate(row.flops_per_second, "FLOP") + of_ceiling(row.flops_per_second, limits.flops),
        rate(row.bytes_per_second, "B") + of_ceiling(row.bytes_per_second, limits.bytes),
    )
    cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
    return f"<tr><td>{html.escape(group.operation)}</td><td>{html.escape(group.shape)}</td>{cells}</tr>"


def told_section(analysis: Analysis) -> str:
    """What was told while the run trained, and what the whole run makes of it."""
    judged = analysis.judged
    if not judged:
        return ""
    withdrawn_first = sorted(judged, key=lambda item: item.status == CONFIRMED)[:_ROWS]
    rows = [
        f'<tr><td class="number">{html.escape(item.place.removeprefix("steps ").removeprefix("step "))}</td>'
        f"<td>{html.escape(item.told.cause)}</td><td>{html.escape(item.told.evidence)}</td><td>{item.status}</td>"
        f"<td>{html.escape(item.reason)}</td></tr>"
        for item in sorted(withdrawn_first, key=lambda item: item.told.first_step)
    ]
    head = '<th class="number">Step</th><th>Cause</th><th>Told</th><th>Now</th><th>Why</th>'
    hint = "Lines that were shown or counted while the run trained, when only earlier steps were known."
    return section("Told while it ran", f'<div class="scroll" tabindex="0">{as_table(head, rows)}</div>', hint)


def notes(analysis: Analysis) -> str:
    read = f"{analysis.span_count:,} spans read from {analysis.source}."
    left = f" Left out or odd: {'; '.join(analysis.table.notes)}." if analysis.table.notes else ""
    return f"<footer>{html.escape(read + left)}</footer>"


def section(heading: str, content: str, hint: str) -> str:
    note = f'<p class="hint">{html.escape(hint)}</p>' if hint else ""
    return f"<section><h2>{html.escape(heading)}</h2>{note}{content}</section>"


def as_table(head: str, rows: list[str]) -> str:
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def facts_section(analysis: Analysis) -> str:
    cells = [
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in run_facts(analysis)
    ]
    return section("What ran", f'<dl class="facts">{"".join(cells)}</dl>', "") if cells else ""
