"""The report in a terminal. Text from spans goes in as `Text`, so none of it is read as markup."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from observability.detect import CONFIRMED, HIGH, MEDIUM, Analysis, duration, in_a_row, number_of_steps, verdict
from observability.report.compare import Comparison
from observability.report.facts import run_name, subtitle
from observability.report.kernels import kernel_report, of_ceiling, rate

_ROWS = 40
_KERNELS = 12
_STYLES = {HIGH: "bold red", MEDIUM: "yellow"}


def told_lines(analysis: Analysis) -> list[str]:
    """What was told while the run trained: how much of it stands, and why the rest does not."""
    judged = analysis.judged
    if not judged:
        return []
    confirmed = sum(item.status == CONFIRMED for item in judged)
    lines = [f"told while it ran: {len(judged)}, confirmed {confirmed}, withdrawn {len(judged) - confirmed}"]
    withdrawn = [item for item in judged if item.status != CONFIRMED][:_ROWS]
    return lines + [f"  withdrawn: {item.told.cause} at {item.place}: {item.reason}" for item in withdrawn]


def _print_kernels(analysis: Analysis, console: Console) -> None:
    """The kernels that take most, summed over layers, and how much of a step the GPU computes."""
    found = kernel_report(analysis.table)
    if found.busy_share is not None and found.idle_seconds is not None:
        text = f"the GPU computes {found.busy_share:.0%} of a step, {duration(found.idle_seconds)} of it are idle"
        console.print(Text(text + (f"; {found.launches:,.0f} kernels a step" if found.rows else "")))
    if not found.rows:
        return
    table = Table(box=None, pad_edge=False)
    for name in ("kernel", "shape", "a step", "time", "share", "rate", "memory"):
        table.add_column(name, justify="left" if name in ("kernel", "shape") else "right")
    for row in found.rows[:_KERNELS]:
        cells = (row.group.operation, row.group.shape, f"{row.group.launches:,.0f}", duration(row.seconds))
        flops = rate(row.flops_per_second, "FLOP") + of_ceiling(row.flops_per_second, found.ceilings.flops)
        moved = rate(row.bytes_per_second, "B") + of_ceiling(row.bytes_per_second, found.ceilings.bytes)
        table.add_row(*map(Text, (*cells, f"{row.share:.1%}", flops, moved)))
    console.print(table)
    if len(found.rows) > _KERNELS:
        console.print(Text(f"... the {_KERNELS} that take most of {len(found.rows)}; --html or --json has all"))


def print_report(analysis: Analysis, comparison: Comparison | None, console: Console) -> None:
    """Verdict, anomalies with their evidence (the worst where there are many), clusters, and what was left out."""
    console.print(Text(f"{run_name(analysis)}: {subtitle(analysis)}"))
    console.print(Text(verdict(analysis), style="bold"))
    anomalies = in_a_row(analysis.anomalies)
    worst = sorted(anomalies, key=lambda f: -f.z)[:_ROWS]
    if worst:
        table = Table(box=None, pad_edge=False)
        for name in ("step", "severity", "cause", "span", "time", "off by", "evidence"):
            table.add_column(name, justify="right" if name in ("step", "time", "off by") else "left")
        for f in sorted(worst, key=lambda f: f.first_step):
            steps = str(f.first_step) if f.first_step == f.last_step else f"{f.first_step}-{f.last_step}"
            off = f"{f.z:.1f}σ" if math.isfinite(f.z) else "-"
            cells = (steps, str(f.severity), f.cause, f.span, duration(f.seconds), off, f.evidence)
            table.add_row(*map(Text, cells), style=_STYLES.get(str(f.severity)))
        console.print(table)
        if len(anomalies) > _ROWS:
            console.print(Text(f"... the {_ROWS} worst of {len(anomalies)}; --html or --json has all"))
    for finding in analysis.explained:
        place = f"{finding.first_step}" + (f"-{finding.last_step}" if finding.last_step > finding.first_step else "")
        console.print(Text(f"explained: {finding.cause} at step {place}: {finding.evidence}"))
    _print_kernels(analysis, console)
    for line in told_lines(analysis):
        console.print(Text(line))
    clusters, high = analysis.clusters, analysis.clusters.high_latency
    if high is not None and clusters.silhouette is not None:
        text = f"{clusters.k} kinds of steps (silhouette {clusters.silhouette:.2f}: {clusters.meaning})"
        if clusters.separate:
            apart = f": {'; '.join(high.distinguished_by)}" if high.distinguished_by else ""
            slow = f"{number_of_steps(len(high.steps))} of {duration(high.mean_seconds)}"
            text += f"; the high-latency one has {slow}{apart}"
        console.print(Text(text))
    if comparison is not None:
        console.print(Text(comparison.verdict(), style="bold"))
        for difference in comparison.differs:
            console.print(Text(f"  not alike: {difference}", style="yellow"))
        for change in comparison.changes[:15]:
            console.print(Text(f"  {change.text}"))
        if comparison.gate_text():
            console.print(Text(comparison.gate_text(), style="bold red" if comparison.failed else "bold"))
    for note in analysis.table.notes:
        console.print(Text(f"note: {note}", style="dim"))
