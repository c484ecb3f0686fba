"""The report of a run: `python -m observability.report RUN|TRACE|JAEGER`, with or without the trainer installed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from observability.detect import Analysis, analyse
from observability.errors import TraceError
from observability.files import write_whole
from observability.read import is_address, newest_run, one_line, printable, read_steps, trace_files
from observability.report.compare import Comparison, compare
from observability.report.kernels import kernel_report
from observability.streams import print_any_text

_PLAIN_WIDTH = 160  # characters a line where the output is no terminal
SLOWER = 3  # exit status where --fail-above found this run slower than the other


@dataclass(frozen=True)
class Report:
    """What was found out about a run, and how it compares with another where one was named."""

    analysis: Analysis
    comparison: Comparison | None

    def to_json(self) -> dict[str, Any]:
        """As report.schema.json describes it."""
        told = self.analysis.to_json()
        notes = told.pop("notes")
        return told | {
            "kernels": kernel_report(self.analysis.table).to_json(),
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "notes": notes,
        }


def report(
    source: str,
    html: str | None = None,
    json_out: str | None = None,
    perfetto: str | None = None,
    against: str | None = None,
    clusters: int | None = None,
    console: Console | None = None,
) -> Analysis:
    """What `make_report` makes, for who asks of one run alone."""
    return make_report(source, html, json_out, perfetto, against, clusters, console).analysis


def make_report(
    source: str,
    html: str | None = None,
    json_out: str | None = None,
    perfetto: str | None = None,
    against: str | None = None,
    clusters: int | None = None,
    console: Console | None = None,
    fail_above: float | None = None,
) -> Report:
    """Analyses `source` (run folder, trace file or Jaeger address), prints the report and writes the files asked for.

    `json_out` "-" writes JSON to standard output instead of the table. `fail_above` is the change in percent from which
    the comparison with the run `against` fails. Raises TraceError on input that cannot be used.
    """
    if fail_above is not None and not 0 <= fail_above < 1e6:
        raise TraceError(f"--fail-above: {fail_above} is no change in percent, 0 and more")
    if fail_above is not None and against is None:
        raise TraceError("--fail-above: --against names no run to compare with")
    if clusters is not None and not 1 <= clusters <= 50:
        raise TraceError(f"--clusters: {clusters} is not between 1 and 50")
    _refuse_overwriting((source, against), {"--html": html, "--json": json_out, "--perfetto": perfetto})
    analysis = analyse(source, clusters)
    comparison = None
    if against is not None:
        other, _ = read_steps(against)
        comparison = compare(analysis.table, other, printable(against), fail_above)
    made = Report(analysis, comparison)
    if json_out != "-":
        # Imported here, as the plain JSON answer needs neither tables nor pages.
        from observability.report.terminal import print_report

        print_report(analysis, comparison, console or Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH))
    if json_out == "-":
        print(_json(made))
    elif json_out:
        text = _json(made) + "\n"
        write_whole(Path(json_out), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    if html:
        from observability.report.html import write_html

        write_html(analysis, Path(html), comparison)
    if perfetto:
        from observability.report.perfetto import write_perfetto

        write_perfetto(analysis, Path(perfetto))
    return made


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise TraceError(message)  # argparse itself would print the usage too


def main(arguments: Sequence[str] | None = None, prog: str = "python -m observability.report") -> int:
    """The command line, `prog` as its help calls it; 2 on input that cannot be used, 3 where --fail-above fails."""
    parser = _Parser(prog=prog, description="Explain a run from its trace.")
    parser.add_argument("source", metavar="RUN|TRACE", help="run folder, OTLP JSON-lines file, or Jaeger address")
    parser.add_argument("--newest", action="store_true", help="RUN is a folder of runs: report the last one below it")
    parser.add_argument("--html", metavar="OUT", help="write a self-contained HTML report")
    parser.add_argument("--json", metavar="OUT", dest="json_out", help="write the findings as JSON (- for stdout)")
    parser.add_argument("--perfetto", metavar="OUT", help="write a trace for ui.perfetto.dev (.gz compresses)")
    parser.add_argument("--against", metavar="RUN", help="compare with another run, step by step")
    parser.add_argument(
        "--fail-above",
        metavar="PERCENT",
        type=float,
        help=f"with --against: exit status {SLOWER} where the step, or kernels that take 5%% of it, are so much slower",
    )
    parser.add_argument("--clusters", metavar="K", type=int, help="number of clusters (default: by silhouette)")
    print_any_text()
    try:
        options = vars(parser.parse_args(arguments))
        if options.pop("newest") and not Path(options["source"]).is_file():
            options["source"] = str(newest_run(Path(options["source"])))
        comparison = make_report(**options).comparison
    except TraceError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    return SLOWER if comparison is not None and comparison.failed else 0


def _refuse_overwriting(sources: Sequence[str | None], outputs: Mapping[str, str | None]) -> None:
    """Raises TraceError for an output, by its flag, that would replace a trace that is read or another output."""
    files = [source for source in sources if source is not None and not is_address(source)]
    read = [str(path) for file in files for path in trace_files(Path(file))]
    taken = [(path, "is the trace that is read") for path in read]
    for flag, path in outputs.items():
        if not path or (flag, path) == ("--json", "-"):
            continue
        for other, what in taken:
            if _same_file(path, other):
                raise TraceError(f"{flag}: {path} {what}")
        taken.append((path, f"is what {flag} writes"))


def _same_file(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:  # one is not there yet
        return os.path.realpath(path) == os.path.realpath(other)


def _json(made: Report) -> str:
    return json.dumps(made.to_json(), indent=2, allow_nan=False)
