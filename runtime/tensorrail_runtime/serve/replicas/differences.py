"""How far another model's outputs are from those that were served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """One output's: the relative L2 norm of served − reference, and the largest difference of an element."""

    output: str
    relative_l2: float
    max_abs: float


def differences(served: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> list[Difference]:
    """Return the difference of every output; infinite where shapes differ or a value is not a number.

    What is not numbers counts by element: 0 where equal, 1 where not.
    """
    return [_difference(name, array, reference[name]) for name, array in served.items()]


def _difference(name: str, served: np.ndarray, reference: np.ndarray) -> Difference:
    if served.shape != reference.shape:
        return Difference(name, float("inf"), float("inf"))
    if served.dtype.kind in "fiu":
        ours, theirs = served.astype(np.float64), reference.astype(np.float64)
    else:
        ours, theirs = (served != reference).astype(np.float64), np.zeros(served.shape)
    apart = ours - theirs
    distance, size = float(np.linalg.norm(apart.ravel())), float(np.linalg.norm(theirs.ravel()))
    found = Difference(name, distance / (size or 1.0), float(np.abs(apart).max(initial=0)))
    return found if np.isfinite([found.relative_l2, found.max_abs]).all() else Difference(name, float("inf"), float("inf"))
