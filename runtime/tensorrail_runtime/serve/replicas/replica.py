"""The actors on Ray: replicas of the served model, which batch requests, and of the shadow model, which compare outputs."""

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
    """Runs the model on requests, several at once if it has batch axes; a request that waited over `seconds` is dropped."""

    def __init__(
        self, model: ray.ObjectRef[bytes], settings: Session, axes: Axes | None, max_batch: int, wait: float, seconds: float
    ) -> None:
        self._seconds = seconds
        self._session = _open(model, settings)
        self._axes = axes
        self._max_batch = max_batch
        self._joins = axes is not None and max_batch > 1
        self._runs = Gathering(self._run, max_batch if self._joins else 1)
        # Batches that are closed while the model is busy wait in `Gathering`, so their number is not limited here.
        together = serve.batch(max_batch_size=max_batch, batch_wait_timeout_s=wait, max_concurrent_batches=1_000_000)
        self._batch: Callable[[Waiting], Awaitable[Answer]] = together(self._runs.answer)

    async def infer(self, feed: Feed, alone: bool = False) -> Answer:
        """Return the answer to one request; with `alone`, used after a replica died on it, it runs without others."""
        if alone:
            return (await asyncio.to_thread(self._run, [feed]))[0]
        request = Waiting(feed, self._seconds)
        try:
            return await self._batch(request) if self._joins else (await self._runs.answer([request]))[0]
        except asyncio.CancelledError:
            request.gone = True
            raise

    def _run(self, feeds: Sequence[Feed]) -> list[Answer]:
        return run_batch(self._session, feeds, self._axes, self._max_batch)


class ShadowReplica:
    """Runs the shadow model on requests that were already answered, and compares the outputs."""

    def __init__(self, model: ray.ObjectRef[bytes], settings: Session) -> None:
        self._session = _open(model, settings)
        self._turn = asyncio.Lock()

    async def compare(self, feed: Feed, served: Mapping[str, np.ndarray]) -> list[Difference]:
        """Return the differences between the served outputs and this model's; raises `ModelError` if it cannot run."""
        async with self._turn:
            return await asyncio.to_thread(self._compare, feed, served)

    def _compare(self, feed: Feed, served: Mapping[str, np.ndarray]) -> list[Difference]:
        outputs = run(self._session, {name: np.require(array, requirements=["A", "C"]) for name, array in feed.items()})
        return differences(served, outputs)


def _open(model: ray.ObjectRef[bytes], settings: Session) -> ort.InferenceSession:
    """Open a session of a model whose bytes come through Ray, since its file may be on another node."""
    bind_replica_to_loopback()
    content = ray.get(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        try:
            return open_session(path, settings=settings)
        except ModelError as error:
            raise ModelError(str(error).replace(str(path), "the model")) from None
