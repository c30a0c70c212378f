"""Gathers requests while the model is busy; the next run takes as many of them as it may.

`@serve.batch` closes a batch when its waiting time is over, even if the model is still busy with an earlier batch; under load
this gives many small batches. Here they are merged again before the model runs. A request whose client no longer waits does
not run: under overload, the model would otherwise work for clients that have left.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tensorrail_runtime.serve.replicas.batching import Answer, Feed

_GONE = Answer(None, "the client no longer waits for the answer")


@dataclass
class Waiting:
    """One request and how many seconds its client waits; `gone` is set when the client has left."""

    feed: Feed
    seconds: float = math.inf
    gone: bool = False
    since: float = field(default_factory=time.perf_counter)

    @property
    def useless(self) -> bool:
        """Whether the client no longer waits for the answer."""
        return self.gone or time.perf_counter() - self.since > self.seconds


class Gathering:
    """Calls `work` with up to `limit` waiting requests at a time, one call after another, outside the event loop."""

    def __init__(self, work: Callable[[Sequence[Feed]], list[Answer]], limit: int) -> None:
        self._work = work
        self._limit = limit
        self._turn = asyncio.Lock()
        self._waiting: deque[tuple[Waiting, asyncio.Future[Answer]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, requests: Sequence[Waiting]) -> list[Answer]:
        """Return one answer per request, in order; raises what `work` raised for any of them.

        The run continues if this call is cancelled, since others may wait for it. Requests that are `gone` by then do not run.
        """
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in requests]
        self._waiting.extend(zip(requests, futures, strict=True))
        task = asyncio.create_task(self._drain(futures))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)
        return [future.result() for future in futures]

    async def _drain(self, futures: Sequence[asyncio.Future[Answer]]) -> None:
        async with self._turn:
            while not all(future.done() for future in futures):
                await self._next()

    async def _next(self) -> None:
        taken: list[tuple[Waiting, asyncio.Future[Answer]]] = []
        while self._waiting and len(taken) < self._limit:
            request, future = self._waiting.popleft()
            if request.useless:
                future.set_result(_GONE)
            else:
                taken.append((request, future))
        if not taken:
            return
        begin = time.perf_counter()
        try:
            answers = await asyncio.to_thread(self._work, [request.feed for request, _ in taken])
        except Exception as error:  # noqa: BLE001 - passed on to the waiting requests
            for _, future in taken:
                future.set_exception(error)
            return
        for (request, future), answer in zip(taken, answers, strict=True):
            future.set_result(replace(answer, waited=begin - request.since))
