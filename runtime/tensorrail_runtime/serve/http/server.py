"""An HTTP server that stops gracefully: it refuses new connections, answers every accepted request, and ends."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from tensorrail_runtime.serve.http._compat_uvicorn import KEEP_ALIVE, Server, http_protocol


async def run_server(
    app: Any,
    listening: socket.socket,
    grace: float,
    *,
    seconds: float = 30.0,
    on_ready: Callable[[], None] = lambda: None,
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Serve an ASGI application at a bound socket until SIGTERM or Ctrl-C, then finish the accepted requests.

    A second signal ends the server at once. Must run in the main thread, where Python handles signals.

    Args:
        app: the ASGI application.
        listening: a bound socket.
        grace: how many seconds accepted requests have to finish after the first signal.
        seconds: how long the line and headers of a request may take, at most 64 KiB; its body may take twice as long.
        on_ready: called once the server listens.
        on_stop: called at each signal.

    """
    config = uvicorn.Config(
        app,
        http=http_protocol(seconds),
        access_log=False,
        lifespan="off",
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, math.ceil(grace)),
        timeout_keep_alive=KEEP_ALIVE,
        ws="none",
    )
    server = Server(config, on_ready, on_stop)
    with server.signals():
        await server.serve(sockets=[listening])
