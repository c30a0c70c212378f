"""Outputs that hold quantities of different size, such as the coordinates of boxes beside the scores of what is in them.

The relative error of such an output as a whole is that of its largest quantity: a detector may keep its coordinates and lose
all of its boxes. So errors are taken relative to each feature, an index of the axis along which the quantities differ most, and
averaged over those that are not small. A probability is small where it stays near 0: where nothing is ever found, nothing
is lost. An output whose features are alike is one feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ALIKE = 100.0  # times: features whose squared sizes differ by less are alike
_PROBABLE = 0.01  # size of a probability that is small
_SMALL = 1e-6  # of the median of the squared sizes of other features
_TINY = 1e-30


@dataclass(frozen=True)
class Features:
    """The features of an output."""

    axis: int | None
    """The axis whose indices they are; None for one feature, which is all of the output."""
    floors: np.ndarray
    """The squared size of each, summed over all values, below which it is small."""

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sums of values over all axes but that of the features, (features,)."""
        if self.axis is None:
            return np.array([values.sum(dtype=np.float64)])
        return np.asarray(values.sum(tuple(k for k in range(values.ndim) if k != self.axis), dtype=np.float64))

    def weights(self, sizes: np.ndarray) -> np.ndarray:
        """Return by what the squared error of each feature is multiplied, so that their sum is the mean relative error.

        Args:
            sizes: the squared sizes, or variations, of the features.

        """
        large = max(1, int((sizes >= self.floors).sum()))
        return np.asarray(1 / (np.maximum(sizes, self.floors) * large))


def features_of(parts: Sequence[np.ndarray], *, alike: bool = False) -> Features:
    """Return the features of an output.

    Args:
        parts: the values of the output, one array (samples, …) per batch.
        alike: whether it is one feature in any case, as for the scores of classes; default False.

    """
    whole = Features(None, np.array([_TINY]))
    rank = parts[0].ndim
    if alike or any(part.ndim != rank for part in parts):
        return whole
    axes = [axis for axis in range(1, rank) if parts[0].shape[axis] > 1 and len({part.shape[axis] for part in parts}) == 1]
    squares = [np.square(part.astype(np.float64)) for part in parts]
    candidates = [Features(axis, np.zeros(parts[0].shape[axis])) for axis in axes]
    found = [(one, np.sum([one.sums(square) for square in squares], 0)) for one in candidates]
    found = [(one, sizes) for one, sizes in found if sizes.max() > _ALIKE * sizes.min()]
    if not found:
        return whole
    features, sizes = max(found, key=lambda pair: _spread(pair[1]))
    others = tuple(k for k in range(rank) if k != features.axis)
    low, high = (np.array([getattr(part, end)(axis=others) for part in parts if part.size]) for end in ("min", "max"))
    probable = (low.min(0) >= 0) & (high.max(0) <= 1)
    count = sum(part.size for part in parts) / len(sizes)
    small = _SMALL * float(np.median(sizes[~probable])) if not probable.all() else _TINY
    return Features(features.axis, np.maximum(np.where(probable, count * _PROBABLE**2, small), _TINY))


def _spread(sizes: np.ndarray) -> float:
    return float(np.log(np.maximum(sizes, 1e-12 * sizes.max())).std())
