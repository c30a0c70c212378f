"""Sends requests from the HTTP server to the replicas; a request whose replica dies is sent to another one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import DeploymentUnavailableError

from tensorrail_runtime.errors import first_line
from tensorrail_runtime.serve.http.metrics import Metrics
from tensorrail_runtime.serve.protocol.errors import ProtocolError
from tensorrail_runtime.serve.replicas.batching import Answer, Feed
from tensorrail_runtime.serve.replicas.differences import Difference

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_log = logging.getLogger("tensorrail.serve")

# The replica, or the node with its answer, is gone. Inference has no side effects, so the request can be sent again.
_DIED = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, grpc.RpcError)
_ATTEMPTS = 4  # in total: a request that crashes every replica must not be sent again for ever
_PAUSE = 0.05  # seconds before the second attempt, then twice as long each time
_FRESH = 1.0  # seconds until the number of running replicas is asked for again, and between two log messages


class RayBackend:
    """Sends requests to the replicas of a Ray Serve application."""

    def __init__(self, handle: DeploymentHandle[Any], application: str, metrics: Metrics) -> None:
        self._handle = handle
        self._application = application
        self._metrics = metrics
        self._checked_at = float("-inf")
        self._running = False
        self._logged_at = float("-inf")

    async def infer(self, feed: Feed) -> Answer:
        """Return the answer of a replica; raises `ProtocolError` 500 if several die on the request, 503 if none can start."""
        for attempt in range(_ATTEMPTS):
            if attempt:
                self._metrics.retried()
                await asyncio.sleep(_PAUSE * 2 ** (attempt - 1))
            response = self._handle.infer.remote(dict(feed), bool(attempt))
            try:
                answer: Answer = await response
            except _DIED as error:
                if _is_too_large(error):
                    raise ProtocolError(
                        f"the request or its answer is larger than Ray sends ({first_line(error)})", 500
                    ) from None
                self._log_death(error)
                continue
            except DeploymentUnavailableError as error:
                raise ProtocolError(f"no replica can be started: {first_line(error)}", 503) from None
            except asyncio.CancelledError:
                response.cancel()
                raise
            return answer
        raise ProtocolError(f"{_ATTEMPTS} replicas died, one after another, while they ran this request", 500)

    def _log_death(self, error: Exception) -> None:
        """Log that a replica died, at most once per second."""
        if time.monotonic() - self._logged_at > _FRESH:
            self._logged_at = time.monotonic()
            _log.warning("a replica died; its requests are sent to another one (%s)", first_line(error))

    async def ready(self) -> bool:
        """Return whether at least one replica runs."""
        if time.monotonic() - self._checked_at > _FRESH:
            self._running = await asyncio.to_thread(running_replicas, self._application) > 0
            self._checked_at = time.monotonic()
        return self._running


def _is_too_large(error: Exception) -> bool:
    """Return whether a message was larger than gRPC allows, which another replica cannot change."""
    code = getattr(error, "code", None)
    return isinstance(error, grpc.RpcError) and callable(code) and code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def compare(
    handle: DeploymentHandle[Any], seconds: float, feed: Feed, served: Mapping[str, np.ndarray]
) -> Sequence[Difference]:
    """Return the differences between served outputs and those of a shadow replica; times out after `seconds`."""
    response = handle.compare.remote(dict(feed), dict(served))
    try:
        async with asyncio.timeout(seconds):
            differences: list[Difference] = await response
    except (TimeoutError, asyncio.CancelledError):
        response.cancel()  # or it would still run, before newer ones
        raise
    return differences


def running_replicas(application: str) -> int:
    """Return the number of running replicas of an application's served model."""
    status = serve.status().applications.get(application)
    deployment = status.deployments.get("model") if status else None
    return deployment.replica_states.get("RUNNING", 0) if deployment else 0  # type: ignore[call-overload]
