"""Outputs that hold probabilities beside other quantities, such as the scores of a detector beside coordinates of boxes.

The relative error of such an output as a whole is that of the coordinates, which are hundreds of times larger: a detector may
lose all of its boxes without a trace. So both groups of features are compared on their own, and their errors averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SEEN = 0.05  # a probability at least, among those of an output, that says that these are probabilities and not zeros


@dataclass(frozen=True)
class Features:
    """The features of an output, in groups of one kind."""

    axis: int | None
    """The axis whose indices are the features; None for an output that is one group."""
    groups: np.ndarray
    """Which features belong to each group, (groups, features) of 0 and 1."""

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of values over all features of each group, (groups,)."""
        if self.axis is None:
            return np.array([values.sum(dtype=np.float64)])
        others = tuple(k for k in range(values.ndim) if k != self.axis)
        return np.asarray(self.groups @ values.sum(others, dtype=np.float64))

    def weights(self, sizes: np.ndarray, least: float) -> np.ndarray:
        """Return by what the squared error of each group is multiplied, so that their sum is the mean relative squared error.

        Args:
            sizes: the squared sizes, or variations, of the groups.
            least: what they count as at least.

        """
        return np.asarray(1 / (np.maximum(sizes, least) * len(sizes)))


WHOLE = Features(None, np.ones((1, 1)))
"""An output that is one group."""


def features_of(parts: Sequence[np.ndarray]) -> Features:
    """Return the features of an output: probabilities, and all others, if it holds both.

    Features are the indices of axis 1, or of the last axis if that is shorter, as in rows of boxes. Those with values from 0 to
    1 alone are probabilities.

    Args:
        parts: the values of the output, one array (samples, features, …) or (samples, …, features) per batch.

    """
    axis = _feature_axis(parts)
    if axis is None:
        return WHOLE
    others = tuple(k for k in range(parts[0].ndim) if k != axis)
    low, high = (np.array([getattr(part, end)(axis=others) for part in parts if part.size]) for end in ("min", "max"))
    if not len(low):
        return WHOLE
    probable = (low.min(0) >= 0) & (high.max(0) <= 1)
    if probable.all() or not probable.any() or high.max(0)[probable].max() < _SEEN:
        return WHOLE
    return Features(axis, np.array([probable, ~probable], float))


def variation(parts: Sequence[np.ndarray], features: Features) -> np.ndarray:
    """Return ‖a − mean‖² of each group of features.

    The mean is over samples, or over all values of a group if there is one sample or the shapes differ.
    """
    together = parts[0].ndim > 0 and all(part.shape[1:] == parts[0].shape[1:] for part in parts) and sum(map(len, parts)) > 1
    if together:
        mean = np.sum([part.sum(0, dtype=np.float64) for part in parts], 0) / sum(map(len, parts))
        return np.asarray(np.sum([features.sums(np.square(np.asarray(part, np.float64) - mean)) for part in parts], 0))
    counts, totals, squares = (
        np.sum([features.sums(of(np.asarray(part, np.float64))) for part in parts], 0)
        for of in (np.ones_like, np.asarray, np.square)
    )
    return np.asarray(np.maximum(squares - np.square(totals) / np.maximum(counts, 1), 0.0))


def _feature_axis(parts: Sequence[np.ndarray]) -> int | None:
    rank = parts[0].ndim
    if rank < 2 or any(part.ndim != rank or part.dtype.kind not in "fiu" for part in parts):
        return None
    lengths = {axis: {part.shape[axis] for part in parts} for axis in ((1, 2) if rank == 3 else (1,))}
    fixed = {axis: min(found) for axis, found in lengths.items() if len(found) == 1}
    if not fixed or min(fixed.values()) < 2:
        return None
    return min(fixed, key=lambda axis: fixed[axis])
