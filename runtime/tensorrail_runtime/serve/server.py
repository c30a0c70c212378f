"""An HTTP server that stops gracefully: no new connection, every accepted request answered, then the end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

_MOST_HEAD = 1 << 16  # bytes of a request's line and headers
_WHOLE = 1 << 62  # more than any body: what comes after the head does not count
_KEEP_ALIVE = 75  # seconds: longer than the pools of common clients and proxies keep a connection


async def run_server(
    app: Any,
    listening: socket.socket,
    grace: float,
    *,
    seconds: float = 30.0,
    on_ready: Callable[[], None] = lambda: None,
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Serve an ASGI application at a bound socket until SIGTERM or Ctrl-C, then for up to `grace` seconds what was accepted.

    The line and headers of a request may have 64 KiB and take `seconds`. A second signal ends it at once. Must run in the main
    thread, where Python handles signals.
    """
    config = uvicorn.Config(
        app,
        http=_protocol(seconds),
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


def _protocol(seconds: float) -> Any:
    """Return uvicorn's reader of HTTP with limits on the head of a request, which httptools has none for, and h11 has."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"

    class Bounded(HttpToolsProtocol):
        """Closes a connection whose request line and headers are too long, or come too slowly."""

        _head = 0  # bytes of a head that is not whole yet
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
            super().connection_made(transport)
            self._late = self.loop.call_later(_KEEP_ALIVE, transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._on_time()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._head += len(data)
            super().data_received(data)
            if self._head > _MOST_HEAD and not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")
                self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._on_time()
            self._late = self.loop.call_later(seconds, self.transport.close)

        def on_headers_complete(self) -> None:
            self._on_time()
            self._head = -_WHOLE
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._head = 0
            super().on_message_complete()

        def _on_time(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Bounded


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
