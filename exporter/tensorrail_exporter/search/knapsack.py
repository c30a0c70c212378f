"""One option a layer, for all layers at once: the least loss within a budget (multiple-choice knapsack).

Deciding layer by layer would spend the budget where it is first asked for. Here every layer's options compete for it: an
integer programme with one variable an option, solved exactly by HiGHS through scipy.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_matrix, vstack

from tensorrail_runtime.errors import TargetError

_SECONDS = 60.0
_ROUNDS = 8


@dataclass(frozen=True)
class Limit:
    """What all layers together may cost: `costs[l][k]` of option k of layer l, and their sum at most `most`."""

    name: str
    costs: Sequence[Sequence[float]]
    most: float


def choose(losses: Sequence[Sequence[float]], limits: Sequence[Limit]) -> tuple[int, ...]:
    """Return the option of every layer: the least sum of losses within all limits.

    Raises `TargetError` when no choice meets a limit, with the least that can be reached.
    """
    counts = [len(one) for one in losses]
    for limit in limits:
        least = sum(min(one) for one in limit.costs)
        if least > limit.most:
            raise TargetError(
                f"the target on {limit.name} cannot be met: it allows {limit.most:.4g}, but the cheapest options of all layers "
                f"together cost {least:.4g}; lower the target, or allow more formats or layers"
            )
    if not counts:
        return ()
    flat = np.concatenate([np.asarray(one, float) for one in losses])
    once = block_diag([np.ones((1, count)) for count in counts], format="csr")
    rows = [csr_matrix(np.concatenate([np.asarray(one, float) for one in limit.costs]) / limit.most) for limit in limits]
    matrix = vstack([once, *rows]) if rows else once
    low = np.concatenate([np.ones(len(counts)), np.full(len(rows), -np.inf)])
    high = np.concatenate([np.ones(len(counts)), np.ones(len(rows))])
    ends = np.cumsum(counts)[:-1]
    best, total = None, float(np.abs(flat).max())
    for _ in range(_ROUNDS):
        # The solver ends when it is within a millionth of the largest number that it sees: options that lose more than a whole
        # choice are left out of the next round, so that the differences between the others count.
        allowed = np.ones(len(flat)) if best is None else (flat <= total * (1 + 1e-9)).astype(float)
        with _silent():
            found = milp(
                np.where(allowed > 0, flat, 0.0) / max(total, 1e-30),
                constraints=LinearConstraint(matrix, low, high),
                integrality=np.ones(len(flat)),
                bounds=Bounds(0, allowed),
                options={"time_limit": _SECONDS, "mip_rel_gap": 1e-6},
            )
        if found.x is None:
            break
        picks = tuple(int(np.argmax(pick)) for pick in np.split(found.x, ends))
        lost = sum(float(one[pick]) for one, pick in zip(losses, picks, strict=True))
        if best is not None and not lost < total:
            break
        best, total = picks, lost
    if best is None:
        names = ", ".join(limit.name for limit in limits)
        raise TargetError(f"no choice of options meets the targets on {names} together: lower one of them")
    return best


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep HiGHS's own debugging lines, which no option turns off, off the standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
