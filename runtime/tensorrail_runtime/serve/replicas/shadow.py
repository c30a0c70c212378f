"""Shadow mode: another model runs on a sample of the requests as well, and only the metrics show its outputs.

A sampled request is passed on after its answer has been sent, so a slow or failing shadow model does not affect the client. If
too many samples wait, further ones are dropped and counted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence

import numpy as np

from tensorrail_runtime.serve.http.metrics import Metrics
from tensorrail_runtime.serve.replicas.batching import Feed
from tensorrail_runtime.serve.replicas.differences import Difference

Compare = Callable[[Feed, Mapping[str, np.ndarray]], Awaitable[Sequence[Difference]]]
_MOST_WAITING = 8


class Shadow:
    """Samples a share of the requests, calls `compare` on them, and passes the results to the metrics."""

    def __init__(self, compare: Compare, fraction: float, metrics: Metrics, seed: int | None = None) -> None:
        self._compare = compare
        self._fraction = fraction
        self._metrics = metrics
        self._random = random.Random(seed)  # noqa: S311 - used for sampling, not for secrets
        self._tasks: set[asyncio.Task[None]] = set()

    async def sample(self, feed: Feed, served: Mapping[str, np.ndarray]) -> None:
        """Decide whether to sample a request, and if so, start its comparison; returns at once."""
        if self._random.random() >= self._fraction:
            return
        if len(self._tasks) >= _MOST_WAITING:
            self._metrics.shadowed("dropped")
            return
        task = asyncio.create_task(self._run(feed, served))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel the comparisons that still run."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, feed: Feed, served: Mapping[str, np.ndarray]) -> None:
        try:
            differences = await self._compare(feed, served)
        except Exception:  # noqa: BLE001 - no failure of the shadow model may reach the server
            self._metrics.shadowed("failed")
            return
        self._metrics.shadowed("compared", differences)
