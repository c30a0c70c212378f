"""What runs on Ray: replicas of the served model, which batch, and of the shadow model, which compares."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import ray
from ray import serve

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.serve.replicas._compat_ray import bind_replica_to_loopback
from tensorrail_runtime.serve.replicas.batch_axis import Axes
from tensorrail_runtime.serve.replicas.batching import Answer, Feed, run_batch
from tensorrail_runtime.serve.replicas.differences import Difference, differences
from tensorrail_runtime.serve.replicas.gathering import Gathering, Waiting
from tensorrail_runtime.sessions.session import Session, open_session, run


class Replica:
    """Answers requests with the model, several by one run where the model has batch axes; none is run after `seconds`."""

    def __init__(
        self, model: ray.ObjectRef[bytes], settings: Session, axes: Axes | None, max_batch: int, wait: float, seconds: float
    ) -> None:
        self._seconds = seconds
        self._session = _open(model, settings)
        self._axes = axes
        self._max_batch = max_batch
        self._runs = Gathering(self._run, max_batch if axes is not None else 1)
        # Batches that are closed while the model is busy wait in `Gathering`, so as many as may come are taken.
        together = serve.batch(max_batch_size=max_batch, batch_wait_timeout_s=wait, max_concurrent_batches=1_000_000)
        self._batch: Callable[[Waiting], Awaitable[Answer]] = together(self._runs.answer)

    async def infer(self, feed: Feed, alone: bool = False) -> Answer:
        """Return the answer to one request; `alone`, after a replica died with it, keeps it apart from others."""
        if alone:
            return (await asyncio.to_thread(self._run, [feed]))[0]
        request = Waiting(feed, self._seconds)
        try:
            return (await self._runs.answer([request]))[0] if self._axes is None else await self._batch(request)
        except asyncio.CancelledError:
            request.gone = True
            raise

    def _run(self, feeds: Sequence[Feed]) -> list[Answer]:
        return run_batch(self._session, feeds, self._axes, self._max_batch)


class ShadowReplica:
    """Runs the shadow model on a request that was answered already and compares."""

    def __init__(self, model: ray.ObjectRef[bytes], settings: Session) -> None:
        self._session = _open(model, settings)
        self._turn = asyncio.Lock()

    async def compare(self, feed: Feed, served: Mapping[str, np.ndarray]) -> list[Difference]:
        """Return how far the served outputs are from this model's; raises `ModelError` when it cannot run."""
        async with self._turn:
            return await asyncio.to_thread(self._compare, feed, served)

    def _compare(self, feed: Feed, served: Mapping[str, np.ndarray]) -> list[Difference]:
        made = run(self._session, {name: np.require(array, requirements=["A", "C"]) for name, array in feed.items()})
        return differences(served, made)


def _open(model: ray.ObjectRef[bytes], settings: Session) -> ort.InferenceSession:
    """Return a session of the model's bytes, which come through Ray: the file need not lie on this node."""
    bind_replica_to_loopback()
    content = ray.get(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        try:
            return open_session(path, settings=settings)
        except ModelError as error:
            raise ModelError(str(error).replace(str(path), "the model")) from None
