"""Runs a model on several batches at a time, where its sessions leave processors unused."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tensorrail_runtime.sessions.machine import processors
from tensorrail_runtime.sessions.session import Session

_MOST = 8  # batches at a time: each needs memory for its activations

T = TypeVar("T")


def side_by_side(call: Callable[[int], T], count: int, settings: Session) -> Iterator[T]:
    """Yield `call(0)`, …, `call(count - 1)` in this order, several of which run at a time.

    Sessions of one thread on a machine with eight processors run eight at a time; sessions that take all processors, or a
    GPU, one after the other. ONNX Runtime releases Python's lock while a session runs, and sessions may run in several
    threads at once. Do not time what runs in this way.

    Args:
        call: runs a session on the batch with an index, and has no effects.
        count: the number of batches.
        settings: the settings of the session.

    Yields:
        The results.

    """
    at_a_time = min(count, _MOST, processors() // settings.threads) if settings.threads and not settings.on_gpu else 1
    if at_a_time < 2:
        yield from map(call, range(count))
        return
    running: deque[Future[T]] = deque()
    with ThreadPoolExecutor(at_a_time) as pool:
        try:
            for index in range(count):
                running.append(pool.submit(call, index))
                if len(running) > at_a_time:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
