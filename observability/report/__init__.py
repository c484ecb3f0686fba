"""The report of a run: terminal, HTML, JSON, Perfetto, and two runs compared."""

from observability.report.command import main, report

__all__ = ["main", "report"]
