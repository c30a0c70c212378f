"""What a data set is to the training loop: two splits that give batches, the same ones for the same seed.

Nothing is drawn from a state that an interruption, or another number of processes, would change: the order of an epoch and
what is done to each sample follow from the seed and the place in the global batch alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Border = Literal["edge", "zero", "reflect"]
_BORDERS = {"edge": "replicate", "zero": "constant", "reflect": "reflect"}
EVALUATED = 256  # samples at once


@dataclass(frozen=True)
class Augment:
    """What is done to training images: moved by up to `shift` pixels, mirrored, a square of `cutout` pixels blanked.

    It becomes the mean colour of data that are standardised, and black in others.
    Sets that are read from files do what their own arguments say, and only take the seed.
    """

    shift: int = 0
    flip: bool = False
    border: Border = "edge"
    cutout: int = 0


@dataclass(frozen=True)
class Share:
    """Which part of each global batch this process takes: every `world`-th sample from `rank` on."""

    rank: int = 0
    world: int = 1

    def of(self, pick: Tensor) -> Tensor:
        """Return this process's part of anything that has one entry a sample."""
        return pick[self.rank :: self.world]


class Split(Protocol):
    """Samples and labels that can be asked for by index."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def batches(
        self, picks: Sequence[Tensor], share: Share = Share(), augment: Augment | None = None, seed: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the samples (B, …) float32 and labels (B,) int64 of each pick of indices, this process's share of them.

        Without `augment` they come as they are; with it, changed as the seed and their place say.
        """
        ...

    def to(self, device: torch.device) -> Split:
        """Return the same split, its batches on a device."""
        ...


@dataclass(frozen=True)
class Dataset:
    """Two splits, the number of classes, and a line that says where the data come from and how they were read."""

    source: str
    classes: int
    train: Split
    test: Split

    def to(self, device: torch.device) -> Dataset:
        """Return the same data on a device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def example(self, count: int = 2) -> Tensor:
        """Return the first test samples, (count, …), on the CPU."""
        x, _ = next(self.test.batches([torch.arange(min(count, len(self.test)))]))
        return x.cpu()


@dataclass(frozen=True)
class InMemory:
    """A split that is held whole, on one device: `x` (N, …), uint8 or float32, and labels `y` (N,) int64.

    Batches are (x − mean) / deviation, both of a shape that broadcasts with a batch. Images are (N, C, H, W).
    """

    x: Tensor
    y: Tensor
    mean: Tensor | None = None
    deviation: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.y) or len(self.x) != len(self.y):
            raise ValueError(
                f"expected one label per sample and at least one sample, got {len(self.x)} samples and {len(self.y)} labels"
            )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.y)

    def batches(
        self, picks: Sequence[Tensor], share: Share = Share(), augment: Augment | None = None, seed: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield samples and labels, images changed on their own device by a few gathers for the whole batch."""
        generator = torch.Generator().manual_seed(seed)
        for pick in picks:
            own = _sent(share.of(pick), self.x.device)
            image = self.x[own]
            if augment is not None and image.dim() == 4:
                image = _augmented(image, augment, len(pick), share, generator, self.mean)
            image = image.float()
            if self.mean is not None and self.deviation is not None:
                image = (image - self.mean) / self.deviation
            yield image, self.y[own]

    def to(self, device: torch.device) -> InMemory:
        """Return the split on a device."""
        mean, deviation = (None if one is None else one.to(device) for one in (self.mean, self.deviation))
        return InMemory(self.x.to(device), self.y.to(device), mean, deviation)


def shuffled(count: int, size: int, seed: int) -> list[Tensor]:
    """Return an epoch's picks of `size` indices each, in an order that the seed alone decides; the rest is left out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return list(order[: count - count % size].split(size)) if count >= size else []


def in_order(count: int, size: int = EVALUATED) -> list[Tensor]:
    """Return picks of all indices in their order, the last one shorter."""
    return list(torch.arange(count).split(size))


def arrays(split: Split, size: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the whole split as it is, as NumPy batches."""
    for x, y in split.batches(in_order(len(split), size)):
        yield x.cpu().numpy(), y.cpu().numpy()


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; a GPU is not waited for, and works on meanwhile."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _augmented(
    image: Tensor, augment: Augment, count: int, share: Share, generator: torch.Generator, mean: Tensor | None
) -> Tensor:
    """Return each image changed by its own numbers, which are drawn for the whole batch of all processes."""
    if augment.shift:
        offsets = torch.randint(0, 2 * augment.shift + 1, (count, 2), generator=generator)
        image = _shifted(image, augment, _sent(share.of(offsets), image.device))
    if augment.flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        image = torch.where(_sent(share.of(mirrored), image.device)[:, None, None, None], image.flip(3), image)
    if augment.cutout:
        centres = torch.rand(count, 2, generator=generator)
        image = _cut_out(image, augment.cutout, _sent(share.of(centres), image.device), mean)
    return image


def _shifted(image: Tensor, augment: Augment, offsets: Tensor) -> Tensor:
    count, channels, height, width = image.shape
    if augment.border == "zero":
        padded = F.pad(image, (augment.shift,) * 4)
    else:  # torch pads bytes with constants only
        padded = F.pad(image.float(), (augment.shift,) * 4, mode=_BORDERS[augment.border]).to(image.dtype)
    rows = (torch.arange(height, device=image.device) + offsets[:, :1])[:, None, :, None]
    columns = (torch.arange(width, device=image.device) + offsets[:, 1:])[:, None, None, :]
    each = torch.arange(count, device=image.device)[:, None, None, None]
    channel = torch.arange(channels, device=image.device)[None, :, None, None]
    return padded[each, channel, rows, columns]


def _cut_out(image: Tensor, size: int, centres: Tensor, mean: Tensor | None) -> Tensor:
    """Return the images with a square blanked, its centre anywhere (DeVries and Taylor 2017)."""
    height, width = image.shape[2:]
    rows = torch.arange(height, device=image.device) - (centres[:, :1] * height).floor() + size // 2
    columns = torch.arange(width, device=image.device) - (centres[:, 1:] * width).floor() + size // 2
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    return torch.where(inside[:, None], 0 if mean is None else mean.to(image.dtype), image)
