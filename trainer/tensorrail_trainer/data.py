"""Data sets that fit in memory, and batches of them that depend on nothing but a seed and an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Dataset:
    """Images (N, C, H, W) float32 and labels (N,) int64, both splits, and where they come from."""

    source: str
    classes: int
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: torch.device) -> Dataset:
        """Return the same data on a device."""
        moved = (tensor.to(device) for tensor in (self.train_x, self.train_y, self.test_x, self.test_y))
        return Dataset(self.source, self.classes, *moved)


def digits(seed: int, test_fraction: float = 0.4, size: int = 32) -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits, drawn up from 8×8 to size×size, split by class.

    Values are standardised by the training split's mean and deviation.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    train, test = train_test_split(np.arange(len(raw.target)), test_size=test_fraction, random_state=seed, stratify=raw.target)
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    labels = torch.from_numpy(raw.target).long()
    return Dataset(
        f"scikit-learn load_digits, drawn up to {size}×{size}; {len(train)} training and {len(test)} test images",
        10,
        images[train],
        labels[train],
        images[test],
        labels[test],
    )


CHANNELS_AND_CLASSES = {"digits": (1, 10)}  # what a model must know before the data are read
DATASETS: dict[str, Callable[..., Dataset]] = {"digits": digits}


def batches(x: Tensor, y: Tensor, size: int, seed: int, shift: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches of `size` (the rest that fills none is left out), each image shifted by up to `shift` pixels."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    for start in range(0, len(x) - size + 1, size):
        pick = order[start : start + size]
        image = x[pick]
        yield (_shifted(image, shift, generator) if shift else image), y[pick]


def _shifted(image: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Return each image moved by its own offsets, the border filled with the image's own edge value."""
    count, _, height, width = image.shape
    padded = F.pad(image, (shift,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator).to(image.device)
    rows = (torch.arange(height, device=image.device) + offsets[0])[:, None, :, None]
    columns = (torch.arange(width, device=image.device) + offsets[1])[:, None, None, :]
    each = torch.arange(count, device=image.device)[:, None, None, None]
    channel = torch.arange(image.shape[1], device=image.device)[None, :, None, None]
    return padded[each, channel, rows, columns]
