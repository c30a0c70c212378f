"""Starts or joins Ray, deploys the replicas, and removes them at the end."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tensorrail_runtime.errors import ModelError, first_line
from tensorrail_runtime.serve.http.model_file import Model
from tensorrail_runtime.serve.http.options import ServeOptions, on_loopback
from tensorrail_runtime.serve.replicas._compat_ray import address_of_local_cluster
from tensorrail_runtime.sessions.machine import processors
from tensorrail_runtime.sessions.session import Session

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_START_SECONDS = 180.0  # until all replicas must run
_REACH_SECONDS = 10.0  # until the head of a cluster must answer
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


def application_name(name: str) -> str:
    """Return the name of a served model's Ray Serve application."""
    return f"tensorrail-{name}"


def set_environment(own: bool) -> None:
    """Set the environment variables that Ray reads when it is imported; its processes inherit them."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's announced future default
    if own:
        # A single node without network access: all its ports are on loopback, and calls need a token.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # keeps Ray on loopback, on Linux too
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # Requests go directly to the replica's own port, without further threads; this halved the CPU time that Ray takes. A
        # cluster keeps its own settings.
        os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
        # Ray's default is 4 MiB. `--max-mib` limits requests; their arrays and answers may be larger than what was sent.
        os.environ.setdefault("RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH", str(2**31 - 1))
        os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "0")
        os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")


def connect(options: ServeOptions) -> None:
    """Start a local Ray on loopback, or join the cluster."""
    import ray
    from ray import serve

    if options.address is not None:
        address = _reachable(options.address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ModelError(f"no Ray cluster at {address} ({first_line(error)})") from None
    else:
        reserved = options.cpus * (options.replicas + (options.shadow is not None))
        ray.init(
            address="local",
            num_cpus=max(processors(), math.ceil(reserved)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        if not on_loopback(ray.util.get_node_ip_address()):
            raise ModelError("Ray was already imported with other settings and would be open to the network: use a new process")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # `backend` logs the death of a replica in one line
    serve.start(proxy_location="Disabled", logging_config=_QUIET)


def _reachable(address: str) -> str:
    """Return HOST:PORT of a cluster's head; raises `ModelError` if it does not answer: Ray would try for many minutes."""
    if address == "auto":
        local = address_of_local_cluster()
        if local is None:
            raise ModelError(
                "no Ray cluster runs on this node: give HOST:PORT of the cluster's head, or no address for a local Ray"
            )
        address = local
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise ModelError(f"expected a Ray address `auto` or HOST:PORT of the cluster's head, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ModelError(f"no Ray cluster at {address}: {error}") from None
    return address


@contextlib.contextmanager
def deployed(
    options: ServeOptions, model: Model, shadow: Model | None, threads: int
) -> Iterator[tuple[DeploymentHandle[Any], DeploymentHandle[Any] | None]]:
    """Deploy the model and the shadow model, yield their handles when every replica runs, and remove them at the end."""
    import ray
    from ray import serve

    from tensorrail_runtime.serve.replicas.replica import Replica, ShadowReplica

    settings = Session(provider=options.provider, threads=threads, linger=False)
    common: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": options.cpus, "num_gpus": options.reserved_gpus},
        # Requests wait in the replicas, where they are batched, and not on the way to them.
        "max_ongoing_requests": max(options.limits.accepted, 2 * options.max_batch),
        "health_check_period_s": 1.0,
        "graceful_shutdown_wait_loop_s": 0.1,
        "max_constructor_retry_count": 3,
        "logging_config": _QUIET,
    }
    application = application_name(options.name)
    if application in serve.status().applications:
        raise ModelError(
            f"a model {options.name!r} is already served on this cluster: stop that server, or give this model "
            f"another name; after a killed server, clean up with Ray's serve.delete({application!r})"
        )
    content = ray.put(model.content)  # kept here as long as replicas may start
    replicas = serve.deployment(name="model", num_replicas=options.replicas, **common)(Replica)
    targets = [
        serve.RunTarget(
            replicas.bind(content, settings, model.axes, options.max_batch, options.wait, options.limits.seconds),
            name=application,
            route_prefix=None,
        )
    ]
    if shadow is not None:
        shadow_deployment = serve.deployment(name="shadow", num_replicas=1, **common)(ShadowReplica)
        shadow_content = ray.put(shadow.content)
        targets.append(
            serve.RunTarget(shadow_deployment.bind(shadow_content, settings), name=f"{application}-shadow", route_prefix=None)
        )
    try:
        handles = serve.run_many(targets, wait_for_applications_running=False)
        for target in targets:
            _wait_until_running(target.name)
        yield handles[0], handles[1] if shadow is not None else None
    finally:
        if options.address is not None:  # a local Ray ends with this process
            _remove([target.name for target in targets])


def _wait_until_running(application: str) -> None:
    from ray import serve

    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        status = serve.status().applications.get(application)
        if status is not None and status.status == "RUNNING":
            return
        if status is not None and status.status == "DEPLOY_FAILED":
            reasons = [deployment.message for deployment in status.deployments.values() if deployment.message]
            reasons = reasons or [status.message]
            raise ModelError(f"{application}: its replicas do not start: {_reason(reasons[0])}")
        time.sleep(0.1)
    raise ModelError(
        f"{application}: its replicas did not start within {_START_SECONDS:g} s: if the cluster is busy, use fewer "
        "replicas, or reserve fewer CPUs or GPUs for each"
    )


def _reason(message: str) -> str:
    """Return the last line of a traceback that names an error, else the whole message in one line."""
    lines = [line.strip() for line in message.splitlines() if "Error" in line]
    return lines[-1] if lines else " ".join(message.split())


def _remove(applications: list[str]) -> None:
    """Remove applications from the cluster, and Ray Serve too if nothing else uses it."""
    from ray import serve

    for name in applications:
        if name in serve.status().applications:
            serve.delete(name)
    status = serve.status()
    if not status.applications and not status.proxies:
        serve.shutdown()
