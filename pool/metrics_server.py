"""`MetricsServer`: where Prometheus gets a node's metrics."""

import logging
import socket
import socketserver
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pool.errors import ConfigError

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CLIENT_TIMEOUT = 10.0
"""Seconds that a client gets to send its request, and to take each piece of the answer."""


class MetricsServer:
    """``GET /metrics`` on daemon threads, and nothing else. *render* is called on them, by several at once.

    Port 0: any that is free; see ``port``. Raises `ConfigError` when the address cannot be had.
    """

    def __init__(self, host: str, port: int, render: Callable[[], bytes]) -> None:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            server = type("_Server", (_HttpServer,), {"address_family": family})
            self._server: ThreadingHTTPServer = server(address, partial(_Handler, render))
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(
                f"POOL_METRICS_PORT={port}: cannot listen on POOL_METRICS_HOST={host} ({reason})."
                " Each node of a machine needs a port of its own; 0: no metrics"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="pool-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the port back; answers under way are finished or cut off by their client's timeout."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _HttpServer(ThreadingHTTPServer):
    block_on_close = False

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the DNS for a name that nobody reads
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        logger.debug("a client of /metrics went away: %r", client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = CLIENT_TIMEOUT
    server_version = "backend-pool"
    sys_version = ""

    def __init__(self, render: Callable[[], bytes], *args: Any) -> None:
        self._render = render
        super().__init__(*args)

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        try:
            body = self._render()
        except Exception:
            logger.exception("metrics cannot be rendered")
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
