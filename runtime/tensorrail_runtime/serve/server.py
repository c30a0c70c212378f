"""An HTTP server that stops gracefully: no new connection, every accepted request answered, then the end."""

from __future__ import annotations

import contextlib
import math
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

_KEEP_ALIVE = 75  # seconds: longer than the pools of common clients and proxies keep a connection


async def run_server(
    app: Any,
    listening: socket.socket,
    grace: float,
    *,
    on_ready: Callable[[], None] = lambda: None,
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Serve an ASGI application at a bound socket until SIGTERM or Ctrl-C, then for up to `grace` seconds what was accepted.

    A second signal ends it at once. Must run in the main thread, where Python handles signals.
    """
    config = uvicorn.Config(
        app,
        access_log=False,
        lifespan="off",
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, math.ceil(grace)),
        timeout_keep_alive=_KEEP_ALIVE,
        ws="none",
    )
    server = Server(config, on_ready, on_stop)
    with server.signals():
        await server.serve(sockets=[listening])


class Server(uvicorn.Server):
    """uvicorn's server with signals of our own: its own are raised again after the end, and would end the clean-up."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._on_stop = on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Stop at SIGTERM and Ctrl-C while the context lasts."""
        before = {one: signal.signal(one, self._stop) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _stop(self, *_: object) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._on_stop()
