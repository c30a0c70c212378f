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

_MOST_HEAD = 1 << 16  # bytes of a request's line and headers, and of what surrounds its body
ABORT = "tensorrail.abort"  # the ASGI extension that holds a function which drops the connection at once
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

    The line and headers of a request may have 64 KiB and take `seconds`, its body twice that. A second signal ends all at once.
    Must run in the main thread, where Python handles signals.
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
    """Return uvicorn's reader of HTTP with limits on head and trailers, which httptools has none for, and h11 has."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"

    class Bounded(HttpToolsProtocol):
        """Closes a connection whose requests have too much around their bodies, or come too slowly."""

        _around = 0  # bytes of the message that comes which are not its body
        _in_body = False
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
            super().connection_made(transport)
            self._late_in(_KEEP_ALIVE)

        def connection_lost(self, exc: Exception | None) -> None:
            self._on_time()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._late is None:
                self._late_in(seconds)
            self._around += len(data)
            super().data_received(data)
            if self._around > _MOST_HEAD and not self.transport.is_closing():
                if not self._in_body:  # else an answer may be on its way already
                    self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")
                self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["extensions"] = {ABORT: {"drop": self.transport.abort}}
            self._late_in(seconds)

        def on_header(self, name: bytes, value: bytes) -> None:
            if not self._in_body:  # trailers are not for anyone here
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._in_body, self._around = True, 0
            self._late_in(2 * seconds)  # whoever reads it has refused it before
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._around -= len(body) + len(f"{len(body):x}") + 4  # of a chunk: its size and two line ends
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._in_body, self._around = False, 0
            self._on_time()
            super().on_message_complete()

        def _late_in(self, time: float) -> None:
            self._on_time()
            self._late = self.loop.call_later(time, self.transport.close)

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
