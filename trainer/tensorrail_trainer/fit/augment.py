"""Variants of images, so that a fit to few of them does not learn them by heart.

Images are mirrored, shifted by up to an eighth of their size, and a part of each is replaced by that part of another one
(CutMix: Yun et al., ICCV 2019). No label is needed, because the dense network says what its outputs for the variants are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

_SHIFT = 8  # images are shifted by up to this part of their size
_LEAST = 8  # pixels along each side
_LARGEST_CUT = 0.5  # share of the pixels


def image_input(feed: Mapping[str, Tensor]) -> str | None:
    """Return the name of the input of a network if it holds images (N, 1 or 3, H, W), None otherwise."""
    if len(feed) != 1:
        return None
    ((name, value),) = feed.items()
    is_image = value.dim() == 4 and value.shape[1] in (1, 3) and min(value.shape[2:]) >= _LEAST and value.is_floating_point()
    return name if is_image else None


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return one variant of each image (N, C, H, W), in channels_last memory format."""
    count, _, height, width = images.shape
    down, right = height // _SHIFT, width // _SHIFT
    padded = F.pad(images, (right, right, down, down), mode="reflect")
    variants = torch.empty_like(images)
    for k in range(count):
        top, left = _below(2 * down + 1, generator), _below(2 * right + 1, generator)
        variants[k] = padded[k, :, top : top + height, left : left + width]
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    variants = torch.where(mirrored, variants.flip(-1), variants)
    others = torch.randperm(count, generator=generator)
    mixed = variants.clone()
    for k in range(count):
        side = (_LARGEST_CUT * float(torch.rand(1, generator=generator))) ** 0.5
        rows, columns = int(height * side), int(width * side)
        top, left = _below(height - rows + 1, generator), _below(width - columns + 1, generator)
        part = (slice(None), slice(top, top + rows), slice(left, left + columns))
        mixed[(k, *part)] = variants[(int(others[k]), *part)]
    return mixed.contiguous(memory_format=torch.channels_last)


def _below(size: int, generator: torch.Generator) -> int:
    return int(torch.randint(size, (1,), generator=generator))
