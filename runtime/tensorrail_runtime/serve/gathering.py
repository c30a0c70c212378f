"""Runs that take all that waits: while one is under way requests gather, and the next run takes as many as it may.

`@serve.batch` closes a batch when its wait is over, also when the model is still busy with an earlier one; under load that
leaves many small batches in a row. Here they come together again before the model runs.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from tensorrail_runtime.serve.batching import Answer, Feed


class Gathering:
    """Calls `work` with up to `limit` waiting requests at a time, one call after the other, outside the event loop."""

    def __init__(self, work: Callable[[Sequence[Feed]], list[Answer]], limit: int) -> None:
        self._work = work
        self._limit = limit
        self._turn = asyncio.Lock()
        self._waiting: deque[tuple[Feed, float, asyncio.Future[Answer]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, feeds: Sequence[Feed]) -> list[Answer]:
        """Return one answer a request, in order; raises what `work` raised for any of them.

        Who waits may be cancelled: others may wait for the same run, so it goes on.
        """
        loop = asyncio.get_running_loop()
        mine = [loop.create_future() for _ in feeds]
        self._waiting.extend(zip(feeds, [time.perf_counter()] * len(mine), mine, strict=True))
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
        taken = [self._waiting.popleft() for _ in range(min(self._limit, len(self._waiting)))]
        begin = time.perf_counter()
        try:
            answers = await asyncio.to_thread(self._work, [feed for feed, _, _ in taken])
        except Exception as error:  # noqa: BLE001 - handed on to those who wait
            for _, _, future in taken:
                future.set_exception(error)
            return
        for (_, since, future), answer in zip(taken, answers, strict=True):
            future.set_result(replace(answer, waited=begin - since))
