"""QLoRA of Qwen3-4B's shape, ours beside the peer on one card: `python -m benchmarks.qwen3_4b --output FILE`.

Runs `entrenar-gpu bench train` with memory free and at a budget, transformers + PEFT + bitsandbytes at the same sizes
(benchmarks/peer.py), the card's ceilings, and single products, each in a process of its own with a time limit, one
after the other. Prints markdown: tables of ratios beside the project's bars. What fails is one line, and the rest
goes on. About six minutes on an H200.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from entrenar_gpu.files import write_text

RANK = 16
PRODUCT, FEW_ROWS, MANY_ROWS = "9728x2560", 512, 2048


@dataclass(frozen=True)
class Row:
    """A size to measure at: steps to time, and what is asked of it as a multiple of the peer's tokens/s."""

    batch: int
    seq: int
    steps: int
    free: float  # with memory free
    budget_gib: float
    within: float  # within the budget

    @property
    def size(self) -> str:
        return f"{self.batch}x{self.seq}"


ROWS = (Row(1, 512, 20, 2.2, 3.6, 2.0), Row(4, 512, 10, 0.85, 4.5, 0.7), Row(4, 2048, 4, 0.35, 7.0, 0.28))
# What single products are asked for, as multiples of cuBLAS in f32 at 2,048 rows, and of themselves at 512.
PRODUCT_BARS = {"f32": 0.8, "f16": 1.15, "int8": 1.8}
FEW_ROWS_BAR = 0.8


class Failed(Exception):
    """A measurement that could not be taken, and why, in one line."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="int8", help="of our products, comma-separated (default int8)")
    parser.add_argument("--rows", default=",".join(row.size for row in ROWS), help="sizes, as 1x512,4x512")
    parser.add_argument("--commit", default=os.environ.get("ENTRENAR_COMMIT"), help="where there is no .git to ask")
    parser.add_argument("--tune", action="store_true", help="measure our tiles first (entrenar-gpu bench train --tune)")
    parser.add_argument("--peer-keeps", action="store_true", help="the peer keeps activations, and recomputes nothing")
    parser.add_argument("--output", type=Path, help="write the markdown there too")
    args = parser.parse_args(arguments)
    report = Report([row for row in ROWS if row.size in args.rows.split(",")], args.precision.split(","))
    report.measure(args.peer_keeps, args.tune)
    text = report.markdown(args.commit or _commit())
    print(text, end="")
    if args.output:
        write_text(args.output, text)


class Report:
    """What was measured: training and single products, ours and the peer's, and what could not be."""

    def __init__(self, rows: Sequence[Row], precisions: Sequence[str]) -> None:
        self._rows, self._precisions = rows, precisions
        self._peer: dict[str, dict[str, Any]] = {}
        self._ceilings: dict[str, float] = {}
        self._ours: list[tuple[Row, float | None, dict[str, Any]]] = []
        self._products: list[dict[str, Any]] = []
        self._failures: list[str] = []

    def measure(self, peer_keeps: bool = False, tune: bool = False) -> None:
        """Everything, one process after the other."""
        self._try("ceilings", lambda: self._ceilings.update(_json_of(_module("benchmarks.peer", "ceilings"), 60)))
        self._try("products", lambda: self._products.extend(_products()))
        self._try("peer", lambda: self._measure_peer(peer_keeps))
        for row in self._rows:
            for precision in self._precisions:
                for budget in (None, row.budget_gib):
                    self._try(
                        f"{row.size} {precision}, budget {budget}", partial(self._train, row, precision, budget, tune)
                    )

    def _try(self, name: str, measurement: Callable[[], object]) -> None:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        try:
            measurement()
        except Failed as failure:
            self._failures.append(f"Not measured: {name}: {failure}")

    def _measure_peer(self, keeps: bool) -> None:
        command = _module("benchmarks.peer", "train", *(row.size for row in self._rows), *(["--keep"] if keeps else []))
        lines, failure = _lines_of(command, 180)
        for found in map(json.loads, lines):
            self._peer[f"{found['batch']}x{found['seq']}"] = found
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
        lines += self._training_table() + self._product_table()
        lines += ["", *self._failures] if self._failures else []
        return "\n".join(lines) + "\n"

    def _training_table(self) -> list[str]:
        lines = [
            "| batch x seq | precision | budget, GiB | ours, tok/s | peer, tok/s | ratio (bar) | ours, GiB | peer, GiB"
            " | of it | share of ceiling | encode, ms |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row, budget, ours in self._ours:
            peer = self._peer.get(row.size, {"tokens_per_second": math.nan, "peak_gib": math.nan})
            peak = ours["allocated_bytes"] / 2**30
            cells = [
                row.size,
                ours["precision"],
                "none" if budget is None else f"{budget:g}",
                f"{ours['tokens_per_second']:,.0f}",
                f"{peer['tokens_per_second']:,.0f}",
                f"{ours['tokens_per_second'] / peer['tokens_per_second']:.2f}"
                f" ({row.free if budget is None else row.within})",
                f"{peak:.2f}",
                f"{peer['peak_gib']:.2f}",
                f"{peak / peer['peak_gib']:.2f}",
                f"{ours['ceiling_share']:.0%}",
                f"{ours['seconds']['encode'] * 1e3:.1f} of {ours['step_seconds'] * 1e3:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    def _product_table(self) -> list[str]:
        ceilings = {"copy_tb_per_second": math.nan, "cublas_f32_tflops": math.nan, "cublas_bf16_tflops": math.nan}
        ceilings |= self._ceilings
        f32 = ceilings["cublas_f32_tflops"]
        full = {p["arithmetic"]: p["product_tflops"] for p in self._products if p["sizes"][0] == MANY_ROWS}
        lines = [
            "",
            f"Ceilings of the card: device copy {ceilings['copy_tb_per_second']:.2f} TB/s; cuBLAS at 2048x9728x2560"
            f" {f32:.1f} TFLOP/s in f32, {ceilings['cublas_bf16_tflops']:.0f} in bf16.",
            "",
            "| product | precision | TFLOP/s | relative to cuBLAS f32 (bar) | to 2,048 rows (bar) | relative error |",
            "|---|---|---|---|---|---|",
        ]
        for p in self._products:
            kind, speed = p["arithmetic"], p["product_tflops"]
            many = p["sizes"][0] == MANY_ROWS
            beside = f"{speed / f32:.2f} ({PRODUCT_BARS[kind]})" if many else f"{speed / f32:.2f}"
            few = "" if many else f"{speed / full.get(kind, math.nan):.2f} ({FEW_ROWS_BAR})"
            size = "x".join(map(str, p["sizes"]))
            lines.append(f"| {size} | {kind} | {speed:.1f} | {beside} | {few} | {p['error']:.1e} |")
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
        return [p for p in json.loads(path.read_text()) if p["name"] == f"forward {PRODUCT}"]


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
