"""The application on a socket: uvicorn, on loopback unless told otherwise."""

from __future__ import annotations

import uvicorn
from starlette.applications import Starlette

from entrenar_gpu.errors import UserError

LOOPBACK, PORT = "127.0.0.1", 8080
SHUTDOWN_SECONDS = 5  # for answers under way when the server is asked to end
MOST_CONNECTIONS = 1000


class HttpServer:
    """An application's server, which holds its address from the beginning."""

    def __init__(self, app: Starlette, host: str = LOOPBACK, port: int = PORT) -> None:
        """Port 0 takes a free one. Raises UserError where the address cannot be had."""
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level="critical",  # uvicorn would print why an address cannot be had; our own log goes its own way
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        try:
            self._socket = config.bind_socket()
        except (OSError, SystemExit):
            raise UserError(f"--port: {host}:{port} cannot be had; is another server there?") from None
        self._server = uvicorn.Server(config)

    @property
    def url(self) -> str:
        """The address that clients take."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    def run(self) -> None:
        """Serve until `stop`, or until a signal asks to end."""
        with self._socket:
            self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Have `run` return, from another thread."""
        self._server.should_exit = True
