"""Shadow mode: another model answers a sample of the requests beside the served one, and only the metrics see it.

A sampled request is handed over after its own answer has been sent. What the shadow does with it, fail or be slow, cannot
reach the client; when too many samples wait, further ones are dropped and counted.
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
    """Samples a share of the requests and has `compare` run them; its outcomes go to the metrics."""

    def __init__(self, compare: Compare, fraction: float, metrics: Metrics, seed: int | None = None) -> None:
        self._compare = compare
        self._fraction = fraction
        self._metrics = metrics
        self._random = random.Random(seed)  # noqa: S311 - a sample, no secret
        self._tasks: set[asyncio.Task[None]] = set()

    async def sample(self, feed: Feed, served: Mapping[str, np.ndarray]) -> None:
        """Hand a request and its served outputs over, or let it pass; returns at once."""
        if self._random.random() >= self._fraction:
            return
        if len(self._tasks) >= _MOST_WAITING:
            self._metrics.shadowed("dropped")
            return
        task = asyncio.create_task(self._run(feed, served))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up the samples that still wait."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, feed: Feed, served: Mapping[str, np.ndarray]) -> None:
        try:
            found = await self._compare(feed, served)
        except Exception:  # noqa: BLE001 - whatever it is, it stays here
            self._metrics.shadowed("failed")
            return
        self._metrics.shadowed("compared", found)
