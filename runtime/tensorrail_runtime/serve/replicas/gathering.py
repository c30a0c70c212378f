"""Runs that take all that waits: while one is under way requests gather, and the next run takes as many as it may.

`@serve.batch` closes a batch when its wait is over, also when the model is still busy with an earlier one; under load that
leaves many small batches in a row. Here they come together again before the model runs. A request that nobody waits for any
more is not run: under more load than there is time for, the model would else work for clients that have gone.
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
    """One request, and until when an answer to it is any use; `gone` is set when its client has left."""

    feed: Feed
    seconds: float = math.inf
    gone: bool = False
    since: float = field(default_factory=time.perf_counter)

    @property
    def useless(self) -> bool:
        """Whether nobody waits for the answer."""
        return self.gone or time.perf_counter() - self.since > self.seconds


class Gathering:
    """Calls `work` with up to `limit` waiting requests at a time, one call after the other, outside the event loop."""

    def __init__(self, work: Callable[[Sequence[Feed]], list[Answer]], limit: int) -> None:
        self._work = work
        self._limit = limit
        self._turn = asyncio.Lock()
        self._waiting: deque[tuple[Waiting, asyncio.Future[Answer]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, requests: Sequence[Waiting]) -> list[Answer]:
        """Return one answer a request, in order; raises what `work` raised for any of them.

        Who waits may be cancelled: others may wait for the same run, so it goes on. What has `gone` before its run is left out.
        """
        loop = asyncio.get_running_loop()
        mine = [loop.create_future() for _ in requests]
        self._waiting.extend(zip(requests, mine, strict=True))
        task = asyncio.create_task(self._drain(mine))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)
        return [future.result() for future in mine]

    async def _drain(self, mine: Sequence[asyncio.Future[Answer]]) -> None:
        async with self._turn:
            while not all(future.done() for future in mine):
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
        except Exception as error:  # noqa: BLE001 - handed on to those who wait
            for _, future in taken:
                future.set_exception(error)
            return
        for (request, future), answer in zip(taken, answers, strict=True):
            future.set_result(replace(answer, waited=begin - request.since))
