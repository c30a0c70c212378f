"""CIFAR-100 at half its resolution, for `admm.py`: an epoch takes a quarter of the time, so that many runs can be compared."""

from __future__ import annotations

from typing import cast

from torch.nn import functional as F

from tensorrail_trainer.data import Dataset
from tensorrail_trainer.data.cifar import cifar100 as whole
from tensorrail_trainer.data.splits import InMemory


def cifar100(root: str, validation: int = 0) -> Dataset:
    """Return CIFAR-100 with images (N, 3, 16, 16), each pixel the mean of four; arguments as for the data set `cifar100`."""
    data = whole(root, validation=validation)
    train, test = (_halved(cast(InMemory, split)) for split in (data.train, data.test))
    return Dataset(f"{data.source}, at 16×16 pixels", data.classes, train, test)


def _halved(split: InMemory) -> InMemory:
    pixels = F.avg_pool2d(split.x.float(), 2).round().to(split.x.dtype)
    return InMemory(pixels, split.y, split.mean, split.deviation)
