"""Serves a model until it is told to stop: replicas on Ray, and the HTTP server in this process.

    client ── HTTP ── this process ── Ray ── replica 1 … n

This process keeps an accepted request until it is answered, and sends it again if its replica dies. Ray Serve's own HTTP proxy
would answer such a request with an error, and it reads the whole body before any limit can be checked.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.serve.http.model_file import Model, read_model, read_shadow
from tensorrail_runtime.serve.http.options import ServeOptions, on_loopback
from tensorrail_runtime.serve.replicas.deployment import application_name, connect, deployed, set_environment
from tensorrail_runtime.sessions.machine import processors

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


@dataclass(frozen=True)
class Started:
    """What is served, and where.

    Attributes:
        model: the ONNX file.
        name: the name of the model in requests.
        host: the address of the server.
        port: the port in use.
        replicas: the number of replicas.
        threads: the number of ONNX Runtime's threads in each replica.
        batching: a text that names the batch axis or says why there is none.
        batched: whether requests are batched.

    """

    model: Path
    name: str
    host: str
    port: int
    replicas: int
    threads: int
    batching: str
    batched: bool

    @property
    def url(self) -> str:
        """The URL of the server."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return on_loopback(self.host)


def serve_model(path: Path, options: ServeOptions, on_ready: Callable[[Started], None]) -> None:
    """Serve a model until SIGTERM or Ctrl-C, then answer the accepted requests and return.

    Args:
        path: the ONNX file.
        options: how it is served.
        on_ready: called once the server answers requests.

    Raises:
        ModelError: the model cannot be served, or an option cannot be met, such as a port that is in use.
        ModuleNotFoundError: the extra `serve` is not installed.

    """
    options.check()
    set_environment(own=options.address is None)
    import ray

    # Everything from the extra is imported before anything starts, so that a missing package is reported at once.
    from tensorrail_runtime.serve.http import app, server  # noqa: F401
    from tensorrail_runtime.serve.replicas import backend, replica  # noqa: F401

    model = read_model(path, options)
    shadow = None if options.shadow is None else read_shadow(options.shadow, model, options)
    threads = options.threads or max(1, processors() // options.replicas)
    with _socket(options.host, options.port) as listening:
        started = Started(
            path,
            options.name,
            options.host,
            listening.getsockname()[1],
            options.replicas,
            threads,
            model.batching,
            model.axes is not None and options.max_batch > 1,
        )
        try:
            connect(options)
            with deployed(options, model, shadow, threads) as (handle, shadow_handle):
                asyncio.run(_answer(options, model, handle, shadow_handle, listening, partial(on_ready, started)))
        finally:
            ray.shutdown()


def _socket(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address; this fails before anything starts that would have to be stopped."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise ModelError(
            f"host {host!r}: this name cannot be resolved: give a host name or IP address of this machine"
        ) from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise ModelError(f"cannot listen at {host}:{port} ({error.strerror}): try another port") from None
    return listening


async def _answer(
    options: ServeOptions,
    model: Model,
    handle: DeploymentHandle[Any],
    shadow_handle: DeploymentHandle[Any] | None,
    listening: socket.socket,
    on_ready: Callable[[], None],
) -> None:
    """Answer requests at the socket until a signal, then finish the accepted ones."""
    from tensorrail_runtime.serve.http.app import Service, create_app
    from tensorrail_runtime.serve.http.metrics import Metrics
    from tensorrail_runtime.serve.http.server import run_server
    from tensorrail_runtime.serve.replicas.backend import RayBackend, compare
    from tensorrail_runtime.serve.replicas.shadow import Shadow

    metrics = Metrics(options.name)
    shadow = None
    if shadow_handle is not None:
        shadow = Shadow(partial(compare, shadow_handle, options.limits.seconds), options.fraction, metrics)
    service = Service(
        name=options.name,
        signature=model.signature,
        backend=RayBackend(handle, application_name(options.name), metrics),
        metrics=metrics,
        limits=options.limits,
        shadow=shadow,
        server_version=_version(),
    )

    def stopping() -> None:
        service.stopping = True

    await run_server(
        create_app(service), listening, options.grace, seconds=options.limits.seconds, on_ready=on_ready, on_stop=stopping
    )
    if shadow is not None:
        await shadow.close()


def _version() -> str:
    try:
        return version("tensorrail")
    except PackageNotFoundError:
        return ""
