"""A model's server on a free port of loopback, in a thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from entrenar_gpu.serve import HttpServer


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """The URL of the running application."""
    server = HttpServer(app, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server.url
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()
