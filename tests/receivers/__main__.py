"""Sends a run to two real backends, Phoenix and MLflow, and reads back what they kept: `make receivers`.

Both are started here, on free ports of this machine and in a folder that goes afterwards. Every span of the run's own
file must come back from both with its id, parent, name, times and attributes. Exit status 1 where one does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from observability import observe, schema
from tests.helpers.step_records import KERNELS, checkpoint_record, eval_record, run_info, run_summary, step_record

STEPS: Final = 20
_STARTS_WITHIN: Final = 180  # seconds
_ARRIVES_WITHIN: Final = 60
Span = tuple[str, str, str, int, int, str]  # id, parent's id, name, begin and end in nanoseconds, attributes as JSON
BIN: Final = Path(sys.executable).parent


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="receivers") as folder:
        results = [
            _compare("Phoenix", Path(folder) / "phoenix", phoenix, from_phoenix, 2000),  # it keeps microseconds
            _compare("MLflow", Path(folder) / "mlflow", mlflow, from_mlflow, 0),
        ]
    return 0 if all(results) else 1


def _compare(
    name: str,
    folder: Path,
    server: Callable[[Path], contextlib.AbstractContextManager[str]],
    read: Callable[[str, str], list[Span]],
    nanoseconds: int,
) -> bool:
    """Whether `read` gives back what was sent, times to so many nanoseconds."""
    folder.mkdir()
    with server(folder) as url:
        sent = train(folder / "run", url)
        trace = next(iter(json_spans(folder / "run")))["traceId"]
        until = time.monotonic() + _ARRIVES_WITHIN
        kept = read(url, trace)
        while len(kept) < len(sent) and time.monotonic() < until:  # backends write what they took a little later
            time.sleep(1)
            kept = read(url, trace)
    apart = [max(abs(a[3] - b[3]), abs(a[4] - b[4])) for a, b in zip(sorted(sent), sorted(kept), strict=False)]
    equal = [(*s[:3], s[5]) for s in sorted(sent)] == [(*s[:3], s[5]) for s in sorted(kept)]
    equal = equal and max(apart) <= nanoseconds
    print(
        f"{name}: {len(sent)} spans sent, {len(kept)} read back, {'all equal' if equal else 'NOT equal'};"
        f" times differ by {max(apart, default=0)} ns at most"
    )
    if not equal:
        changed = [pair for pair in zip(sorted(sent), sorted(kept), strict=False) if pair[0] != pair[1]]
        print(*(f"  sent {a}\n  kept {b}" for a, b in changed[:3]), sep="\n")
    return equal


def train(run: Path, url: str) -> list[Span]:
    """A run of made-up steps, exported to `url`; the spans of its file."""
    os.environ["OTEL_METRICS_EXPORTER"] = "none"  # neither backend takes metrics
    os.environ["OTEL_EXPORTER_OTLP_TIMEOUT"] = "60"  # a backend that has just started is slow with its first spans
    observer = observe(run, level="kernel", otlp=url, flush_seconds=60.0)
    observer.run_started(run_info())
    for step in range(1, STEPS + 1):
        observer.step_finished(step_record(step, kernels=KERNELS))
    observer.checkpoint_saved(checkpoint_record(STEPS))
    observer.eval_finished(eval_record(STEPS))
    observer.run_finished(run_summary(STEPS))
    summary = observer.close()
    if summary.dropped or summary.sent != summary.written:
        raise SystemExit(f"{summary.sent} of {summary.written} spans were sent, {summary.dropped} dropped")
    return [
        _span(s["spanId"], s.get("parentSpanId"), s["name"], s["startTimeUnixNano"], s["endTimeUnixNano"], _plain(s))
        for s in json_spans(run)
    ]


def json_spans(run: Path) -> Iterator[dict[str, Any]]:
    for line in (run / schema.TRACE_FILE).read_text().splitlines():
        for resource in json.loads(line)["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                yield from scope["spans"]


def _plain(span: dict[str, Any]) -> dict[str, Any]:
    """Attributes of an OTLP/JSON span as values of Python; Phoenix writes its keys with underscores."""
    read = {"intvalue": int, "doublevalue": float, "stringvalue": str, "boolvalue": bool}
    return {
        pair["key"]: read[kind.replace("_", "").lower()](value)
        for pair in span.get("attributes") or []
        for kind, value in pair["value"].items()
        if value is not None
    }


def _span(own: str, parent: str | None, name: str, begin: Any, end: Any, attributes: dict[str, Any]) -> Span:
    return own, parent or "", name, int(begin), int(end), json.dumps(attributes, sort_keys=True)


# --- Phoenix ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def phoenix(folder: Path) -> Iterator[str]:
    port = free_port()
    settings = {
        "PHOENIX_WORKING_DIR": str(folder),
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": str(port),
        "PHOENIX_GRPC_PORT": str(free_port()),
        "PHOENIX_TELEMETRY_ENABLED": "false",
    }
    with started([BIN / "phoenix", "serve"], folder, port, "v1/projects", settings) as url:
        yield url


def from_phoenix(url: str, trace: str) -> list[Span]:
    spans, cursor = [], ""
    while cursor is not None:
        page = get(f"{url}/v1/projects/default/spans/otlpv1?limit=500" + (f"&cursor={cursor}" if cursor else ""))
        spans += [span for span in page["data"] if span["trace_id"] == trace]
        cursor = page.get("next_cursor")
    return [
        _span(
            s["span_id"],
            s.get("parent_span_id"),
            s["name"],
            s["start_time_unix_nano"],
            s["end_time_unix_nano"],
            _plain(s),
        )
        for s in spans
    ]


# --- MLflow -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mlflow(folder: Path) -> Iterator[str]:
    port = free_port()
    command = [BIN / "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    os.environ["OTEL_EXPORTER_OTLP_HEADERS"] = "x-mlflow-experiment-id=0"
    with started(command, folder, port, "api/2.0/mlflow/experiments/get?experiment_id=0", {}) as url:
        yield url


def from_mlflow(url: str, trace: str) -> list[Span]:
    from mlflow import MlflowClient  # only .venv-receivers has it
    from mlflow.exceptions import MlflowException

    try:
        kept = MlflowClient(tracking_uri=url).get_trace(f"tr-{trace}").data.spans
    except MlflowException:  # not yet there
        return []
    return [
        _span(s.span_id, s.parent_id, s.name, s.start_time_ns, s.end_time_ns, _without_its_own(s.attributes))
        for s in kept
    ]


def _without_its_own(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes as they were sent: MLflow adds some, and its client takes a text that is JSON apart."""
    return {
        key: json.dumps(value) if isinstance(value, dict) else value
        for key, value in attributes.items()
        if not key.startswith("mlflow.")
    }


# --- both -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(command: list[Any], folder: Path, port: int, page: str, settings: dict[str, str]) -> Iterator[str]:
    """The server that `command` starts, once its `page` is there; ended with the block. Its output is in `folder`."""
    url = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*map(str, command)], cwd=folder, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
        )
        try:
            until = time.monotonic() + _STARTS_WITHIN
            while not answers(f"{url}/{page}"):
                if process.poll() is not None or time.monotonic() > until:
                    text = (folder / "server.log").read_text(errors="replace")
                    raise SystemExit(f"{Path(command[0]).name} did not start:\n{text[-2000:]}")
                time.sleep(0.5)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as reply:
        return json.load(reply)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
