"""Serving a model until told to stop: replicas on Ray, and the HTTP side in this process.

    client ── HTTP ── this process ── Ray ── replica 1 … n

This process holds an accepted request until it is answered, and sends it again when its replica dies. Ray Serve's own HTTP
proxy would not: it answers such a request with an error, and it takes a whole body in before any limit of ours could be seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from tensorrail_runtime.serve.batch_axis import Axes, find_batch_axis
from tensorrail_runtime.serve.options import ServeOptions
from tensorrail_runtime.serve.signature import Signature
from tensorrail_runtime.session import ModelError, Settings, open_session

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_START_SECONDS = 180.0  # for all replicas to be there
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True)
class Started:
    """What is served, and where: `batching` says in words along which axis, or why not; `port` is the one that was taken."""

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
        """The server's address."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return on_loopback(self.host)


def on_loopback(host: str) -> bool:
    """Return whether a host's name or address is this machine's own."""
    return host in ("localhost", "::1") or host.startswith("127.")


@dataclass(frozen=True)
class Model:
    """A model that was read and tried: its bytes with all weights in them, its signature, and its batch axes."""

    content: bytes
    signature: Signature
    axes: Axes | None
    batching: str


def serve_model(path: Path, options: ServeOptions, on_ready: Callable[[Started], None]) -> None:
    """Serve a model until SIGTERM or Ctrl-C, then answer what was accepted and return.

    `on_ready` is told once requests are answered. Raises `ModelError` for a model that cannot be served or options that
    cannot be had, `OSError` for a port that is taken, `ModuleNotFoundError` without the extra `serve`.
    """
    options.check()
    _set_environment(own=options.address is None)
    import ray

    # All that the extra brings is imported before anything is started.
    from tensorrail_runtime.serve import app, backend, replica, server  # noqa: F401

    model = read_model(path, options)
    shadow = None if options.shadow is None else _read_shadow(options.shadow, model, options)
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.replicas)
    with _socket(options.host, options.port) as listening:
        started = Started(
            path,
            options.name,
            options.host,
            listening.getsockname()[1],
            options.replicas,
            threads,
            model.batching,
            model.axes is not None,
        )
        try:
            _connect(options)
            with _deployed(options, model, shadow, threads) as (handle, shadow_handle):
                asyncio.run(_answer(options, model, handle, shadow_handle, listening, partial(on_ready, started)))
        finally:
            ray.shutdown()


def read_model(path: Path, options: ServeOptions) -> Model:
    """Return a model, opened and tried here; `ModelError` says what is wrong with it.

    On a cluster the replicas' provider need not be on this node, so it is tried on the CPU.
    """
    provider = options.provider if options.address is None else "cpu"
    session = open_session(path, settings=Settings(provider=provider, threads=1, linger=False))
    signature = Signature.of(session)
    axes, batching = find_batch_axis(session, signature)
    if options.max_batch == 1:
        axes, batching = None, "batches of 1 were asked for"
    try:
        content = onnx.load(path).SerializeToString()
    except Exception as error:  # noqa: BLE001 - protobuf and onnx raise unrelated classes, the last for more than 2 GiB
        raise ModelError(f"{path}: cannot be sent to the replicas ({str(error).partition(chr(10))[0]})") from None
    return Model(content, signature, axes, batching)


def _read_shadow(path: Path, served: Model, options: ServeOptions) -> Model:
    model = read_model(path, options)
    problem = served.signature.like(model.signature)
    if problem:
        raise ModelError(f"{path}: cannot shadow the served model: {problem}")
    return model


def _socket(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address, before anything is started that would have to be stopped again."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise ModelError(f"--host {host}: no address of this name is known here") from None
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise ModelError(f"{host}:{port} cannot be listened at ({error.strerror}): try another --port") from None
    return made


def _set_environment(own: bool) -> None:
    """Set what Ray reads when it is imported; its processes inherit it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray announces as its future default
    if own:
        # One node that talks to nobody: all its ports are on loopback, and even there want a token that only it has.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # the name is narrower than what it does
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # Fewer hops a request, which halved what Ray takes of the processor: straight to the replica's own port, no threads
        # between. A cluster keeps its own settings.
        os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
        os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "0")
        os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")


def _connect(options: ServeOptions) -> None:
    """Start a Ray of our own, all of it on loopback, or join the cluster."""
    import ray
    from ray import serve

    if options.address is not None:
        try:
            ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ModelError(f"no Ray cluster at {options.address!r} ({str(error).partition(chr(10))[0]})") from None
    else:
        reserved = options.cpus * (options.replicas + (options.shadow is not None))
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(reserved)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        if not on_loopback(ray.util.get_node_ip_address()):
            raise ModelError("Ray was imported before with other settings, and would be open to the network: use a new process")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # a replica's death is said by our own `backend`, in one line
    serve.start(proxy_location="Disabled", logging_config=_QUIET)


@contextlib.contextmanager
def _deployed(
    options: ServeOptions, model: Model, shadow: Model | None, threads: int
) -> Iterator[tuple[DeploymentHandle[Any], DeploymentHandle[Any] | None]]:
    """Deploy the model, and the shadow beside it, and yield their handles once every replica runs; remove both afterwards."""
    import ray
    from ray import serve

    from tensorrail_runtime.serve.replica import Replica, ShadowReplica

    settings = Settings(provider=options.provider, threads=threads, linger=False)
    common: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": options.cpus, "num_gpus": options.gpus},
        # Requests queue in the replicas, where they gather to batches, and not on the way to them.
        "max_ongoing_requests": max(options.limits.accepted, 2 * options.max_batch),
        "health_check_period_s": 1.0,
        "graceful_shutdown_wait_loop_s": 0.1,
        "max_constructor_retry_count": 3,
        "logging_config": _QUIET,
    }
    application = application_name(options.name)
    if application in serve.status().applications:
        raise ModelError(
            f"a model {options.name!r} is served on this cluster already: stop that server, or give another --name"
        )
    content = ray.put(model.content)  # held here as long as replicas may be started
    replicas = serve.deployment(name="model", num_replicas=options.replicas, **common)(Replica)
    targets = [
        serve.RunTarget(
            replicas.bind(content, settings, model.axes, options.max_batch, options.wait), name=application, route_prefix=None
        )
    ]
    if shadow is not None:
        other = serve.deployment(name="shadow", num_replicas=1, **common)(ShadowReplica)
        held = ray.put(shadow.content)
        targets.append(serve.RunTarget(other.bind(held, settings), name=f"{application}-shadow", route_prefix=None))
    try:
        handles = serve.run_many(targets, wait_for_applications_running=False)
        for target in targets:
            _wait_until_running(target.name)
        yield handles[0], handles[1] if shadow is not None else None
    finally:
        if options.address is not None:  # a Ray of our own ends with this process
            _remove([target.name for target in targets])


def application_name(name: str) -> str:
    """Return under which name Ray Serve knows a served model."""
    return f"tensorrail-{name}"


def _wait_until_running(application: str) -> None:
    from ray import serve

    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        found = serve.status().applications.get(application)
        if found is not None and found.status == "RUNNING":
            return
        if found is not None and found.status == "DEPLOY_FAILED":
            reasons = [one.message for one in found.deployments.values() if one.message] or [found.message]
            raise ModelError(f"{application}: its replicas do not start: {_reason(reasons[0])}")
        time.sleep(0.1)
    raise ModelError(
        f"{application}: its replicas did not start within {_START_SECONDS:g} s; where the cluster is busy, give fewer "
        "--replicas, --cpus or --gpus"
    )


def _reason(message: str) -> str:
    """Return the last line of a traceback that names an error, else all in one line."""
    lines = [line.strip() for line in message.splitlines() if "Error" in line]
    return lines[-1] if lines else " ".join(message.split())


def _remove(applications: list[str]) -> None:
    """Remove applications from the cluster, and Serve as well where nothing else uses it."""
    from ray import serve

    for name in applications:
        if name in serve.status().applications:
            serve.delete(name)
    status = serve.status()
    if not status.applications and not status.proxies:
        serve.shutdown()


async def _answer(
    options: ServeOptions,
    model: Model,
    handle: DeploymentHandle[Any],
    shadow_handle: DeploymentHandle[Any] | None,
    listening: socket.socket,
    on_ready: Callable[[], None],
) -> None:
    """Answer requests at the socket until a signal, then those that were accepted."""
    from tensorrail_runtime.serve.app import Service, create_app
    from tensorrail_runtime.serve.backend import RayBackend, compare
    from tensorrail_runtime.serve.metrics import Metrics
    from tensorrail_runtime.serve.server import run_server
    from tensorrail_runtime.serve.shadow import Shadow

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

    await run_server(create_app(service), listening, options.grace, on_ready=on_ready, on_stop=stopping)
    if shadow is not None:
        await shadow.close()


def _version() -> str:
    try:
        return version("tensorrail")
    except PackageNotFoundError:
        return ""
