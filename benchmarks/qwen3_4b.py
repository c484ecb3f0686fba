"""QLoRA of Qwen3-4B's shape, ours beside its peers on one card: `python -m benchmarks.qwen3_4b --output FILE`.

Runs `entrenar-gpu bench train` with memory free and at a budget, transformers + PEFT + bitsandbytes at the same sizes
(benchmarks/peer.py: recomputing and keeping activations, each with and without Liger's kernels), the card's ceilings,
and single products, each in a process of its own with a time limit, one after the other. Prints markdown: tables
beside the project's bars. What fails is one line, and the rest goes on. About eight minutes on an H200 with
one precision, eleven with two.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from entrenar_gpu.files import write_text

RANK = 16
PRODUCT, FEW_ROWS, MANY_ROWS = "forward 9728x2560", 512, 2048


@dataclass(frozen=True)
class Row:
    """A size to measure at: steps to time, and the tokens/s asked of it through an engine that reaches matrix units."""

    batch: int
    seq: int
    steps: int
    free: float  # with memory free
    budget_gib: float
    within: float  # within the budget

    @property
    def size(self) -> str:
        return f"{self.batch}x{self.seq}"


ROWS = (Row(1, 512, 20, 6000, 3.6, 4200), Row(4, 512, 10, 9000, 4.5, 6000), Row(4, 2048, 4, 10000, 7.0, 7000))
PEERS = {
    "PEFT": (),
    "PEFT, keeping": ("--keep",),
    "PEFT + Liger": ("--liger",),
    "PEFT + Liger, keeping": ("--liger", "--keep"),
}
# What single products are asked for: multiples of cuBLAS in f32 at 2,048 rows in plain WGSL; on matrix units, with x
# narrowed and the weight's copy kept, of cuBLAS in bfloat16; and of themselves at 512 rows.
PRODUCT_BARS = {"f32": 0.8, "f16": 1.15, "int8": 1.8}
MATRIX_BARS = {"f16": 0.38, "int8_rows": 0.6}
FEW_ROWS_BAR, FEW_ROWS_MATRIX_BAR = 0.8, 0.7
PEER_SECONDS = 300  # for all sizes of one peer, making its model included


class Failed(Exception):
    """A measurement that could not be taken, and why, in one line."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="f16", help="of our products, comma-separated (default f16)")
    parser.add_argument("--rows", default=",".join(row.size for row in ROWS), help="sizes, as 1x512,4x512")
    parser.add_argument("--commit", default=os.environ.get("ENTRENAR_COMMIT"), help="where there is no .git to ask")
    parser.add_argument("--tune", action="store_true", help="measure our tiles first (entrenar-gpu bench train --tune)")
    parser.add_argument("--peers", default="all", help=f"comma-separated numbers of 1 to {len(PEERS)}: {_numbered()}")
    parser.add_argument("--peer-keeps", action="store_true", help="the same as --peers 2")
    parser.add_argument("--output", type=Path, help="write the markdown there too")
    args = parser.parse_args(arguments)
    report = Report([row for row in ROWS if row.size in args.rows.split(",")], args.precision.split(","))
    commit = args.commit or _commit()
    for _ in report.measure(_peers("2" if args.peer_keeps else args.peers), args.tune):
        if args.output:  # as it grows: whatever ends the process leaves what was measured
            write_text(args.output, report.markdown(commit))
    print(report.markdown(commit), end="")


def _numbered() -> str:
    return "; ".join(f"{number} {name}" for number, name in enumerate(PEERS, 1))


def _peers(numbers: str) -> list[str]:
    """The peers of these numbers. Exits with a line where one has none."""
    every = list(PEERS)
    if numbers == "all":
        return every
    wanted = numbers.split(",")
    if not set(wanted) <= {str(number) for number in range(1, len(every) + 1)}:
        sys.exit(f"--peers: {numbers} is neither all nor numbers of 1 to {len(every)}")
    return [every[int(number) - 1] for number in wanted]


class Report:
    """What was measured: training and single products, ours and the peers', and what could not be."""

    def __init__(self, rows: Sequence[Row], precisions: Sequence[str]) -> None:
        self._rows, self._precisions = rows, precisions
        self._peers: dict[str, dict[str, dict[str, Any]]] = {}  # by name and size
        self._ceilings: dict[str, float] = {}
        self._ours: list[tuple[Row, float | None, dict[str, Any]]] = []
        self._products: list[dict[str, Any]] = []
        self._failures: list[str] = []

    def measure(self, peers: Sequence[str] = tuple(PEERS), tune: bool = False) -> Iterator[None]:
        """Everything, one process after the other, with a step of the iterator behind each."""
        yield self._try("ceilings", lambda: self._ceilings.update(_json_of(_module("benchmarks.peer", "ceilings"), 60)))
        yield self._try("products", lambda: self._products.extend(_products()))
        for peer in peers:
            yield self._try(peer, partial(self._measure_peer, peer))
        for precision in self._precisions:
            for row in self._rows:
                for budget in (None, row.budget_gib):
                    name = f"{row.size} {precision}, budget {budget}"
                    yield self._try(name, partial(self._train, row, precision, budget, tune))

    def _try(self, name: str, measurement: Callable[[], object]) -> None:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        try:
            measurement()
        except Failed as failure:
            self._failures.append(f"Not measured: {name}: {failure}")

    def _measure_peer(self, peer: str) -> None:
        command = _module("benchmarks.peer", "train", *(row.size for row in self._rows), *PEERS[peer])
        lines, failure = _lines_of(command, PEER_SECONDS)
        self._peers[peer] = {f"{found['batch']}x{found['seq']}": found for found in map(json.loads, lines)}
        if failure is not None:
            raise Failed(failure)

    def _train(self, row: Row, precision: str, budget: float | None, tune: bool) -> None:
        command = _module("entrenar_gpu.cli", "bench", "train", "--shape", "qwen3-4b", "--rank", str(RANK), "--json")
        command += ["--batch", str(row.batch), "--seq", str(row.seq), "--precision", precision]
        command += ["--steps", str(row.steps), "--trace-level", "phase"]
        command += ["--memory-budget", str(budget)] if budget is not None else []
        command += ["--tune"] if tune else []
        self._ours.append((row, budget, _json_of(command, 240 if tune else 120)))

    def markdown(self, commit: str) -> str:
        """Tables, and a line for each measurement that failed."""
        cards = {f"{result['adapter']}, driver {result['driver']}" for _, _, result in self._ours}
        lines = [f"{datetime.date.today().isoformat()}, {', '.join(cards) or 'no adapter'}, commit {commit}.", ""]
        lines += self._training_table() + self._peer_table() + self._product_table()
        lines += ["", *self._failures] if self._failures else []
        return "\n".join(lines) + "\n"

    def _training_table(self) -> list[str]:
        lines = [
            "| batch x seq | engine | precision | budget, GiB | tok/s (bar) | fastest peer, tok/s | ratio | GiB"
            " | peer's | share of ceiling | encode, ms |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        unknown = {"tokens_per_second": math.nan, "peak_gib": math.nan}
        for row, budget, ours in self._ours:
            measured = [peer[row.size] for peer in self._peers.values() if row.size in peer]
            peer = max(measured, key=lambda p: p["tokens_per_second"], default=unknown)
            cells = [
                row.size,
                ours["engine"],
                ours["precision"],
                "none" if budget is None else f"{budget:g}",
                f"{ours['tokens_per_second']:,.0f} ({row.free if budget is None else row.within:,})",
                f"{peer['tokens_per_second']:,.0f}",
                f"{ours['tokens_per_second'] / peer['tokens_per_second']:.2f}",
                f"{ours['allocated_bytes'] / 2**30:.2f}",
                f"{peer['peak_gib']:.2f}",
                f"{ours['ceiling_share']:.0%}",
                f"{ours['seconds']['encode'] * 1e3:.1f} of {ours['step_seconds'] * 1e3:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    def _peer_table(self) -> list[str]:
        sizes = [row.size for row in self._rows]
        lines = ["", f"| tokens/s (GiB) | {' | '.join(sizes)} |", f"|---|{'---|' * len(sizes)}"]
        for name, peer in self._peers.items():
            cells = [f"{p['tokens_per_second']:,.0f} ({p['peak_gib']:.1f})" for p in map(peer.get, sizes) if p]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return lines

    def _product_table(self) -> list[str]:
        ceilings = {"copy_tb_per_second": math.nan, "cublas_f32_tflops": math.nan, "cublas_bf16_tflops": math.nan}
        ceilings |= self._ceilings
        f32 = ceilings["cublas_f32_tflops"]
        full = {p["arithmetic"]: p["product_tflops"] for p in self._products if p["sizes"][0] == MANY_ROWS}
        of_bf16 = ceilings["cublas_bf16_tflops"]
        lines = [
            "",
            f"Ceilings of the card: device copy {ceilings['copy_tb_per_second']:.2f} TB/s; cuBLAS at 2048x9728x2560"
            f" {f32:.1f} TFLOP/s in f32, {ceilings['cublas_bf16_tflops']:.0f} in bf16.",
            "",
            "| product | arithmetic | TFLOP/s | with x narrowed | with x and W | relative to cuBLAS f32 (bar)"
            " | with x, to bf16 (bar on matrix units) | to 2,048 rows (bar) | relative error |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for p in self._products:
            kind, speed = p["arithmetic"], p["product_tflops"]
            many, matrices = p["sizes"][0] == MANY_ROWS, p["matrices"]
            plain_bar, bar = PRODUCT_BARS.get(kind), MATRIX_BARS.get(kind)
            beside = f"{speed / f32:.2f}" + (f" ({plain_bar})" if many and not matrices and plain_bar else "")
            narrowed = f"{p['kept_tflops'] / of_bf16:.2f}" + (f" ({bar})" if many and matrices and bar else "")
            few_bar = FEW_ROWS_MATRIX_BAR if matrices else FEW_ROWS_BAR
            few = "" if many else f"{speed / full.get(kind, math.nan):.2f} ({few_bar})"
            speeds = f"{speed:.1f} | {p['kept_tflops']:.1f} | {p['tflops']:.1f}"
            size = "x".join(map(str, p["sizes"]))
            lines.append(f"| {size} | {kind} | {speeds} | {beside} | {narrowed} | {few} | {p['error']:.1e} |")
        return lines


def _products() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "products.json"
        command = _module(
            "benchmarks.gemm", "--only", PRODUCT, "--rows", f"{FEW_ROWS},{MANY_ROWS}", "--json", str(path)
        )
        _, failure = _lines_of(command, 120)
        if failure is not None:
            raise Failed(failure)
        return list(json.loads(path.read_text()))


def _module(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def _json_of(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """What a command prints as JSON. Raises Failed."""
    lines, failure = _lines_of(command, seconds)
    if failure is not None:
        raise Failed(failure)
    try:
        return dict(json.loads("\n".join(lines)))
    except ValueError:
        raise Failed(f"printed {lines[:1]} instead of JSON") from None


def _lines_of(command: Sequence[str], seconds: float) -> tuple[list[str], str | None]:
    """(what a command printed, what went wrong in one line, or None)."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        printed, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
        return printed.splitlines(), f"took longer than {seconds:.0f} s"
    last = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
    return printed.splitlines(), last if process.returncode else None


def _commit() -> str:
    lines, failure = _lines_of(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], 10)
    return lines[0] if failure is None else "unknown"


if __name__ == "__main__":
    main()
