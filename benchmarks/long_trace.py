"""What a long run's trace takes on disk, and its report in time and memory.

    python -m benchmarks.long_trace --steps 100000                   a 36-layer model, layer level, one core
    python -m benchmarks.long_trace --steps 100000 --level kernel    with kernels of a sample of steps

Steps are made up, written by what writes a run's trace, and reported by processes of their own: first from the trace,
then from the index that this leaves beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu.events import HostStats, Span, StepRecord
from observability import schema
from observability.write import export
from observability.write.tracing import OwnSpans, SpanBuilder
from tests.helpers.step_records import KERNELS, run_info, run_summary, step_record

LAYERS = 36


def records(steps: int, kernels: bool) -> Iterator[StepRecord]:
    """Steps that differ by some percent, as those of a real run do; a tenth of a second each."""
    rng = np.random.default_rng(0)
    plain = step_record(1, LAYERS, KERNELS * 3 if kernels else ())
    begin, now = plain.start_ns, plain.start_ns
    offsets = np.array([(span.start_ns - begin, span.end_ns - begin) for span in plain.spans])
    for step in range(1, steps + 1):
        factor = 0.5 * float(1 + 0.02 * abs(rng.standard_normal()))
        places = (offsets * factor).astype(np.int64) + now
        places += rng.integers(0, 2000, places.shape)
        spans = tuple(_at(s, *edges) for s, edges in zip(plain.spans, places.tolist(), strict=True))
        end = now + round(factor * (plain.end_ns - begin))
        host = HostStats(*rng.random(4).tolist(), 0, *rng.integers(0, 99, 3).tolist(), 1980.0, 61.0, 120.0, "")
        yield replace(
            plain, step=step, start_ns=now, end_ns=end, spans=spans, host=host, loss=2 + float(rng.random()),
            grad_norm=float(rng.random()) + 0.5, step_seconds=(end - now) / 1e9,
        )  # fmt: skip
        now = end


def _at(span: Span, start: int, end: int) -> Span:
    return Span(span.name, span.kind, start, max(end, start), span.parent, span.on_gpu, span.attributes)


def write(folder: Path, steps: int, level: schema.Level) -> dict[str, Any]:
    """A run's trace in `folder`; what it took."""
    builder = SpanBuilder(run_info(total_steps=steps), level, None, OwnSpans())
    head = export.line_head(builder.resource, schema.SCOPE_NAME, "0.1.0")
    file = export.TraceFile(folder / schema.TRACE_FILE, head)
    begin = time.process_time()
    for record in records(steps, level == "kernel"):
        file.write(builder.step(record))
    file.write(builder.finish(run_summary(steps)))
    file.close()
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"spans": file.written, "megabytes": round(size / 1e6, 1), "write_cpu_seconds": time.process_time() - begin}


def report(folder: Path) -> dict[str, Any]:
    """Seconds and MiB of a report, terminal and page, in a process of its own."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "observability.report", str(folder), "--html", str(folder / "report.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print("\n".join(done.stdout.splitlines()[:3]), file=sys.stderr)
    return {"seconds": time.monotonic() - began, "cpu_seconds": cpu, "peak_mib": after.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_trace", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--level", choices=schema.LEVELS, default=schema.DEFAULT_LEVEL)
    parser.add_argument("--folder", type=Path, help="keep the trace here (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = {"steps": options.steps, "level": options.level, **write(folder, options.steps, options.level)}
        print(json.dumps(figures), flush=True)
        for name in ("from the trace", "from the index"):
            figures[name] = report(folder)
            print(name, json.dumps(figures[name]), flush=True)


if __name__ == "__main__":
    main()
