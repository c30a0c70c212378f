"""Differences between the served outputs and those of another model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """The difference of one output: the relative L2 norm of served − reference, and the largest element-wise difference."""

    output: str
    relative_l2: float
    max_abs: float


def differences(served: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> list[Difference]:
    """Return the difference of every output; it is infinite if shapes differ, a value is NaN, or only one is infinite.

    Elements that are not numbers, such as strings, differ by 0 if they are equal, else by 1. Equal infinities, as of a mask,
    differ by 0, and are no part of the norm.
    """
    return [_difference(name, array, reference[name]) for name, array in served.items()]


def _difference(name: str, served: np.ndarray, reference: np.ndarray) -> Difference:
    if served.shape != reference.shape:
        return Difference(name, float("inf"), float("inf"))
    if served.dtype.kind in "fiu":
        ours, theirs = served.astype(np.float64), reference.astype(np.float64)
    else:
        ours, theirs = (served != reference).astype(np.float64), np.zeros(served.shape)
    equal = np.isinf(ours) & (ours == theirs)
    ours, theirs = np.where(equal, 0.0, ours), np.where(equal, 0.0, theirs)
    with np.errstate(invalid="ignore"):
        error = ours - theirs
    distance, size = float(np.linalg.norm(error.ravel())), float(np.linalg.norm(theirs.ravel()))
    difference = Difference(name, distance / (size or 1.0), float(np.abs(error).max(initial=0)))
    return (
        difference
        if np.isfinite([difference.relative_l2, difference.max_abs]).all()
        else Difference(name, float("inf"), float("inf"))
    )
