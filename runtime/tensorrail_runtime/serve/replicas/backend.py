"""The way from the HTTP side to the replicas: a request whose replica dies is sent to another one."""

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

# The replica, or the node with its answer, is gone: inference changes nothing, so it can be asked for again.
_DIED = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, grpc.RpcError)
_ATTEMPTS = 4  # in all: a request that ends every replica that takes it must not end them for ever
_PAUSE = 0.05  # seconds before the second attempt, then twice as long each time
_FRESH = 1.0  # seconds for which the number of running replicas is taken as known, and a death as said


class RayBackend:
    """Sends requests to the replicas of an application's deployment."""

    def __init__(self, handle: DeploymentHandle[Any], application: str, metrics: Metrics) -> None:
        self._handle = handle
        self._application = application
        self._metrics = metrics
        self._asked = float("-inf")
        self._running = False
        self._said = float("-inf")

    async def infer(self, feed: Feed) -> Answer:
        """Return the answer of a replica; `ProtocolError` 500 when several died with the request, 503 when there are none."""
        for attempt in range(_ATTEMPTS):
            if attempt:
                self._metrics.retried()
                await asyncio.sleep(_PAUSE * 2 ** (attempt - 1))
            response = self._handle.infer.remote(dict(feed), bool(attempt))
            try:
                answer: Answer = await response
            except _DIED as error:
                self._say(error)
                continue
            except DeploymentUnavailableError as error:
                raise ProtocolError(f"no replica can be started: {first_line(error)}", 503) from None
            except asyncio.CancelledError:
                response.cancel()
                raise
            return answer
        raise ProtocolError(f"{_ATTEMPTS} replicas died, one after another, while they ran this request", 500)

    def _say(self, error: Exception) -> None:
        """Log that a replica died, once a second however many requests it had."""
        if time.monotonic() - self._said > _FRESH:
            self._said = time.monotonic()
            _log.warning("a replica died; its requests are sent to another one (%s)", first_line(error))

    async def ready(self) -> bool:
        """Return whether a replica runs."""
        if time.monotonic() - self._asked > _FRESH:
            self._running = await asyncio.to_thread(running_replicas, self._application) > 0
            self._asked = time.monotonic()
        return self._running


async def compare(
    handle: DeploymentHandle[Any], seconds: float, feed: Feed, served: Mapping[str, np.ndarray]
) -> Sequence[Difference]:
    """Return the differences that a shadow replica finds, within so many seconds."""
    async with asyncio.timeout(seconds):
        found: list[Difference] = await handle.compare.remote(dict(feed), dict(served))
    return found


def running_replicas(application: str) -> int:
    """Return how many replicas of an application's served model run."""
    found = serve.status().applications.get(application)
    deployment = found.deployments.get("model") if found else None
    return deployment.replica_states.get("RUNNING", 0) if deployment else 0  # type: ignore[call-overload]
