"""All uses of uvicorn's internals. Tested with uvicorn 0.54.0 and httptools 0.9.0.

uvicorn has no option for what the server needs: limits on the size of a request's head and on how slowly a request may come,
and signals that stop the server without being raised again afterwards. Both are subclasses of its classes: the one that reads
HTTP with httptools, and the server itself. A version of uvicorn in which they work differently fails the tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

ABORT = "tensorrail.abort"  # the ASGI extension that holds a function which drops the connection at once
KEEP_ALIVE = 75  # seconds: longer than the pools of common clients and proxies keep a connection
LARGEST_HEAD = 1 << 16  # bytes of a request's line and headers, and of what surrounds its body


def http_protocol(seconds: float) -> Any:
    """Return the class with which uvicorn reads HTTP, with limits on size and time.

    httptools has no limits on headers and trailers; h11 has them, and is used where httptools is not installed.

    Args:
        seconds: how long the line and headers of a request may take; its body may take twice as long.

    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"

    class Bounded(HttpToolsProtocol):
        """Closes a connection whose requests have too many bytes around their bodies, or arrive too slowly."""

        _bytes_around_body = 0
        _in_body = False
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # uvicorn's signature
            super().connection_made(transport)
            self._start_deadline(KEEP_ALIVE)

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_deadline()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._deadline is None:
                self._start_deadline(seconds)
            self._bytes_around_body += len(data)
            super().data_received(data)
            if self._bytes_around_body > LARGEST_HEAD and not self.transport.is_closing():
                if not self._in_body:  # within a body, an answer may already be on its way
                    self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")
                self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["extensions"] = {ABORT: {"drop": self.transport.abort}}
            self._start_deadline(seconds)

        def on_header(self, name: bytes, value: bytes) -> None:
            if not self._in_body:  # trailers are ignored
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._in_body, self._bytes_around_body = True, 0
            self._start_deadline(2 * seconds)  # the application refuses a slow body earlier
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._bytes_around_body -= len(body) + len(f"{len(body):x}") + 4  # of a chunk: its size and two line ends
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._in_body, self._bytes_around_body = False, 0
            self._cancel_deadline()
            super().on_message_complete()

        def _start_deadline(self, time: float) -> None:
            self._cancel_deadline()
            self._deadline = self.loop.call_later(time, self.transport.close)

        def _cancel_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Bounded


class Server(uvicorn.Server):
    """uvicorn's server with signal handlers of its own.

    uvicorn raises the signals again after it has stopped, which would interrupt the clean-up of the replicas.
    """

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._on_stop = on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, then call `on_ready`."""
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no handlers: `signals` does."""
        yield

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Stop at SIGTERM and Ctrl-C while the context lasts."""
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self, *_: object) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._on_stop()
