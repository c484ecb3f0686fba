"""`serve`: a model and its adapters behind OpenAI's HTTP interface."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from entrenar_gpu.cli import options
from entrenar_gpu.cli.generate import Context, Slots, Speculate
from entrenar_gpu.cli.text import printable
from entrenar_gpu.errors import UserError

KEY_VARIABLE = "ENTRENAR_API_KEY"


@options.with_options(*options.RUNTIME, "otlp")
def serve(
    given: Mapping[str, Any],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=DIR", help="PEFT adapter folder and its name; may be given again"),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="port to listen on; 0: a free one")] = 8080,
    api_key: Annotated[
        str | None, typer.Option("--api-key", help=f"bearer token that clients must send (default: {KEY_VARIABLE})")
    ] = None,
    context: Context = None,
    slots: Slots = 8,
    queue: Annotated[int, typer.Option("--queue", min=0, max=1 << 20, help="answers that may wait for a slot")] = 64,
    speculate: Speculate = True,
    output: Annotated[str | None, typer.Option("--output", help="folder for trace.jsonl: a span per request")] = None,
) -> None:
    """Serve a model and its adapters over HTTP, as OpenAI's API does."""
    try:
        from entrenar_gpu.serve import HttpServer, Served, make_app
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}: pip install 'entrenar-gpu[serve]'") from None
    import observability
    from entrenar_gpu import __version__

    run = dict(given)
    otlp = run.pop("otlp", None)
    key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
    if key == "":
        raise UserError(f"--api-key: empty; leave it, and {KEY_VARIABLE}, out to serve without")
    if key is None and not _is_loopback(host):
        print(f"warning: {printable(host)} is open to others, and there is no --api-key", file=sys.stderr)
    with options.open_model(run, adapter or [], context, slots, speculate) as model:
        name = Path(run.get("model", "")).name or "model"
        tracer = observability.trace_requests(output, otlp=otlp, model=run["model"], version=__version__)
        observers = [] if tracer is None else [tracer.request_finished]
        try:
            server = HttpServer(make_app(Served(model, name), queue, key, observers), host, port)
            names = ", ".join(["base", *model.adapters])
            print(f"serving {printable(name)} ({printable(names)}) at {server.url}", flush=True)
            server.run()
        finally:
            if tracer is not None:
                tracer.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
