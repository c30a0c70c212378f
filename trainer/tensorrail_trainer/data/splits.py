"""The data sets of the training loop: two splits that return batches, the same ones for the same seed.

The order of an epoch and the augmentation of each sample depend only on the seed and on the position in the global batch, so
that neither an interruption nor the number of processes changes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tensorrail_runtime.sessions.values import native

Border = Literal["edge", "zero", "reflect"]
_BORDERS = {"edge": "replicate", "zero": "constant", "reflect": "reflect"}
EVALUATED = 256  # samples per batch of an evaluation


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images: random shift by up to `shift` pixels, random mirroring, and cutout.

    `border` fills the pixels outside the image. Cutout sets a random square of `cutout` pixels to the mean colour if the data
    are standardized, else to black. Data sets that are read from files use their own arguments instead, and only the seed.
    """

    shift: int = 0
    flip: bool = False
    border: Border = "edge"
    cutout: int = 0


@dataclass(frozen=True)
class Share:
    """The part of each global batch that belongs to this process: every `world`-th sample, starting at `rank`."""

    rank: int = 0
    world: int = 1

    def of(self, pick: Tensor) -> Tensor:
        """Return this process's part of a tensor with one entry per sample."""
        return pick[self.rank :: self.world]


class Split(Protocol):
    """Samples and labels that can be read by index."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def batches(
        self, picks: Sequence[Tensor], share: Share = Share(), augment: Augment | None = None, seed: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield samples (B, …) float32 and labels (B,) int64 for this process's share of each batch of indices.

        With `augment` the samples are augmented, depending on the seed and their position.
        """
        ...

    def to(self, device: torch.device) -> Split:
        """Return the same split with batches on a device."""
        ...


@dataclass(frozen=True)
class Dataset:
    """Two splits, the number of classes, and a line that describes the source of the data.

    `left_out` says which files of its folder are not read, one line for each kind.
    """

    source: str
    classes: int
    train: Split
    test: Split
    left_out: tuple[str, ...] = field(default=(), kw_only=True)

    def to(self, device: torch.device) -> Dataset:
        """Return the same data on a device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def example(self, count: int = 2) -> Tensor:
        """Return the first test samples, (count, …), on the CPU."""
        x, _ = next(self.test.batches([torch.arange(min(count, len(self.test)))]))
        return x.cpu()


@dataclass(frozen=True)
class InMemory:
    """A split in memory, on one device: samples `x` (N, …), uint8 or float32, and labels `y` (N,) int64.

    Batches are (x − mean) / deviation, both of a shape that broadcasts with a batch. Images are (N, C, H, W). NumPy arrays
    become tensors, whatever their byte order and strides.
    """

    x: Tensor
    y: Tensor
    mean: Tensor | None = None
    deviation: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("x", "y", "mean", "deviation"):
            values: object = getattr(self, name)
            if isinstance(values, np.ndarray):
                object.__setattr__(self, name, tensor_of(values))
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
        """Yield samples and labels; images are augmented on their device, a whole batch at once."""
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
        mean, deviation = (None if value is None else value.to(device) for value in (self.mean, self.deviation))
        return InMemory(self.x.to(device), self.y.to(device), mean, deviation)


def tensor_of(array: np.ndarray) -> Tensor:
    """Return the values of an array of any byte order and strides as a tensor, which may share its memory.

    Args:
        array: numbers, (…).

    Raises:
        ValueError: some of its values are masked.
        TypeError: torch has no such type, such as text.

    """
    values = native(array)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def shuffled(count: int, size: int, seed: int) -> list[Tensor]:
    """Return batches of `size` indices in an order that depends only on the seed; an incomplete last batch is left out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return list(order[: count - count % size].split(size)) if count >= size else []


def in_order(count: int, size: int = EVALUATED) -> list[Tensor]:
    """Return batches of all indices in order; the last batch may be smaller."""
    return list(torch.arange(count).split(size))


def arrays(split: Split, size: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the whole split as NumPy batches, in order and without augmentation."""
    for x, y in split.batches(in_order(len(split), size)):
        yield x.cpu().numpy(), y.cpu().numpy()


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, without waiting for a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _augmented(
    image: Tensor, augment: Augment, count: int, share: Share, generator: torch.Generator, mean: Tensor | None
) -> Tensor:
    """Augment each image by its own random numbers, which are drawn for the whole global batch."""
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
    """Blank a square with a random centre in each image (DeVries and Taylor 2017)."""
    height, width = image.shape[2:]
    rows = torch.arange(height, device=image.device) - (centres[:, :1] * height).floor() + size // 2
    columns = torch.arange(width, device=image.device) - (centres[:, 1:] * width).floor() + size // 2
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    return torch.where(inside[:, None], 0 if mean is None else mean.to(image.dtype), image)
