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

from tensorrail_exporter.errors import TargetError

_SECONDS = 60.0


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
                f"the target on {limit.name} cannot be met: it allows {limit.most:.4g}, and the cheapest option of every layer "
                f"together costs {least:.4g}; ask for less, or allow more formats or layers"
            )
    if not counts:
        return ()
    flat = np.concatenate([np.asarray(one, float) for one in losses])
    scale = max(float(np.abs(flat).max()), 1e-30)
    once = block_diag([np.ones((1, count)) for count in counts], format="csr")
    rows = [csr_matrix(np.concatenate([np.asarray(one, float) for one in limit.costs]) / limit.most) for limit in limits]
    matrix = vstack([once, *rows]) if rows else once
    low = np.concatenate([np.ones(len(counts)), np.full(len(rows), -np.inf)])
    high = np.concatenate([np.ones(len(counts)), np.ones(len(rows))])
    with _silent():
        found = milp(
            flat / scale,
            constraints=LinearConstraint(matrix, low, high),
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"time_limit": _SECONDS, "mip_rel_gap": 1e-6},
        )
    if found.x is None:
        raise TargetError(f"no choice of options meets {', '.join(limit.name for limit in limits)} together: ask for less")
    picks = np.split(found.x, np.cumsum(counts)[:-1])
    return tuple(int(np.argmax(pick)) for pick in picks)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep HiGHS's own debugging lines, which no option turns off, off the standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
