"""Batches that are read by several processes. The batches do not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from tensorrail_runtime.errors import DataError
from tensorrail_runtime.sessions.machine import processors
from tensorrail_trainer.data.splits import Share

ALONE = Share()
CPU = torch.device("cpu")

Fetch = Callable[[int, int | None], tuple[Tensor, int]]
"""Returns the sample of an index, values (…) and label. All randomness depends on the seed, if one is given."""


def workers_of(workers: int | None) -> int:
    """Return the number of processes: `workers`, or by default one per core available to this process, at most four."""
    if workers is None:
        return min(4, processors())
    if workers < 0:
        raise DataError(f"workers: expected 0 (read in the training process) or more, got {workers}")
    return workers


def used_gpus() -> list[int]:
    """Return the GPU of this process if it uses one, for `torch.random.fork_rng`, which would otherwise start all of them."""
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []


def loaded(
    fetch: Fetch, picks: Sequence[Tensor], share: Share, seed: int | None, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield samples (B, …) and labels (B,) int64 for this process's share of each batch of indices, in order.

    `workers` processes fetch the samples. The seed of a sample depends only on `seed` and its index. A `DataError` in a worker
    is raised here unchanged.
    """
    loader: DataLoader[tuple[Tensor, Tensor] | DataError] = DataLoader(
        _Batches(fetch, seed),
        batch_size=None,  # each entry of the sampler is a whole batch
        sampler=[share.of(pick).tolist() for pick in picks],
        num_workers=workers if len(picks) > 1 else 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # otherwise the loader draws a number from torch's global generator
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        x, y = batch
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


class _Batches(MapDataset[tuple[Tensor, Tensor] | DataError]):
    """Batches by lists of indices. A `DataError` is returned as a value: if raised, its message would contain a traceback."""

    def __init__(self, fetch: Fetch, seed: int | None) -> None:
        self.fetch = fetch
        self.seed = seed

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor] | DataError:
        try:
            # If the share is empty, sample 0 gives the shape of the empty batch.
            samples = [self.fetch(index, self._seed_of(index)) for index in indices or [0]]
        except DataError as error:
            return error
        first = samples[0][0]
        for index, (x, _) in zip(indices, samples, strict=False):
            if x.shape != first.shape or x.dtype != first.dtype:
                expected, actual = (f"{tuple(each.shape)} {each.dtype}" for each in (first, x))
                return DataError(f"sample {index}: expected {expected}, as sample {indices[0]} is, got {actual}")
        x = torch.stack([x for x, _ in samples])
        return x[: len(indices)], torch.tensor([label for _, label in samples])[: len(indices)]

    def _seed_of(self, index: int) -> int | None:
        return None if self.seed is None else int(np.random.SeedSequence((self.seed, index)).generate_state(1)[0])
