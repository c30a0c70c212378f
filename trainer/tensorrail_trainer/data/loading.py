"""Batches that other processes read and put together: the same ones, however many processes there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from tensorrail_runtime.errors import DataError
from tensorrail_trainer.data.splits import Share

ALONE = Share()
CPU = torch.device("cpu")

Fetch = Callable[[int, int | None], tuple[Tensor, int]]
"""Gives a sample by its index: values (…) and label. What chance decides about it follows from the seed, where one is given."""


def workers_of(workers: int | None) -> int:
    """Return the number of processes: as asked for, or one a core of this process's own, four at most."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(4, cores)
    if workers < 0:
        raise DataError(f"workers: expected 0 (read in the training process) or more, got {workers}")
    return workers


def loaded(
    fetch: Fetch, picks: Sequence[Tensor], share: Share, seed: int | None, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield samples (B, …) and labels (B,) int64 of each pick's share, fetched by `workers` processes, in the picks' order.

    Each sample has a seed of its own, made of `seed` and its index alone. `DataError` of a worker is raised here as it was.
    """
    loader: DataLoader[tuple[Tensor, Tensor] | DataError] = DataLoader(
        _Batches(fetch, seed),
        batch_size=None,  # the sampler's entries are whole batches
        sampler=[share.of(pick).tolist() for pick in picks],
        num_workers=workers if len(picks) > 1 else 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # otherwise a number is drawn from the training's own generator
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        x, y = batch
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


class _Batches(MapDataset[tuple[Tensor, Tensor] | DataError]):
    """A batch by the list of its indices; a `DataError` is handed on as a value, for a raised one would carry a traceback."""

    def __init__(self, fetch: Fetch, seed: int | None) -> None:
        self.fetch = fetch
        self.seed = seed

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor] | DataError:
        try:
            # a share may be empty: the shape of its nothing is that of the first sample
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
