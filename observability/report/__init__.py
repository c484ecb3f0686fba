"""The report of a run: terminal, HTML, JSON, Perfetto, and two runs compared."""

from observability.report.command import Report, main, make_report, report

__all__ = ["Report", "main", "make_report", "report"]
