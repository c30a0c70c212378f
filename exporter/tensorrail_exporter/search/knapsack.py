"""Choosing one option per layer with the least total loss within a budget (multiple-choice knapsack).

Deciding layer by layer would spend the budget on the first layers. Here the options of all layers compete for it, in an
integer program with one variable per option, which HiGHS solves exactly through scipy.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_matrix, vstack

from tensorrail_runtime.errors import TargetError

_SECONDS = 60.0  # time limit of one call of the solver
_ROUNDS = 8  # calls of the solver at most


@dataclass(frozen=True)
class Limit:
    """A limit on the total cost of all layers.

    Attributes:
        name: name of the cost, for error messages.
        costs: `costs[l][k]` is the cost of option k of layer l.
        most: largest sum of the costs.

    """

    name: str
    costs: Sequence[Sequence[float]]
    most: float


Apart = tuple[Collection[tuple[int, int]], Collection[tuple[int, int]]]
"""Options, as (layer, option), of which those in the first collection are not chosen together with those in the second."""


def choose(losses: Sequence[Sequence[float]], limits: Sequence[Limit], apart: Sequence[Apart] = ()) -> tuple[int, ...]:
    """Return the option of every layer with the least sum of losses within all limits.

    Args:
        losses: `losses[l][k]` is the loss of option k of layer l.
        limits: the limits, each with a cost for every option.
        apart: options that are not chosen together; default: none.

    Returns:
        The index of the chosen option of every layer.

    Raises:
        TargetError: no choice meets all limits; the message says what can be reached for a limit.

    """
    counts = [len(options) for options in losses]
    for limit in limits:
        least = sum(min(options) for options in limit.costs)
        if least > limit.most:
            raise TargetError(
                f"the target on {limit.name} cannot be met: it allows {limit.most:.4g}, but the cheapest options of all layers "
                f"together cost {least:.4g}; lower the target, or allow more formats or layers"
            )
    if not counts:
        return ()
    losses = [[loss - min(options) for loss in options] for options in losses]  # one of each layer is paid in any case
    flat = np.concatenate([np.asarray(options, float) for options in losses])
    one_per_layer = block_diag([np.ones((1, count)) for count in counts], format="csr")
    units = [abs(limit.most) or 1.0 for limit in limits]
    rows = [
        csr_matrix(np.concatenate([np.asarray(options, float) for options in limit.costs]) / unit)
        for limit, unit in zip(limits, units, strict=True)
    ]
    firsts = np.cumsum([0, *counts])
    pairs = [[firsts[layer] + option for layer, option in group] for groups in apart for group in groups]
    # One of each collection at most, since each lies within one layer: their sum is at most one.
    rows += [
        csr_matrix(np.isin(np.arange(len(flat)), [*a, *b]).astype(float)) for a, b in zip(pairs[::2], pairs[1::2], strict=True)
    ]
    matrix = vstack([one_per_layer, *rows]) if rows else one_per_layer
    most = [limit.most / unit for limit, unit in zip(limits, units, strict=True)]
    low = np.concatenate([np.ones(len(counts)), np.full(len(rows), -np.inf)])
    high = np.concatenate([np.ones(len(counts)), most, np.ones(len(apart))])
    ends = np.cumsum(counts)[:-1]
    best, total = None, float(np.abs(flat).max())
    for _ in range(_ROUNDS):
        # The solver stops within a millionth of the largest loss. Options that alone lose more than the best choice so far are
        # excluded from the next round, so that the differences between the others become large enough to count.
        allowed = np.ones(len(flat)) if best is None else (flat <= total * (1 + 1e-9)).astype(float)
        with _silent():
            solution = milp(
                np.where(allowed > 0, flat, 0.0) / max(total, 1e-30),
                constraints=LinearConstraint(matrix, low, high),
                integrality=np.ones(len(flat)),
                bounds=Bounds(0, allowed),
                options={"time_limit": _SECONDS, "mip_rel_gap": 1e-6},
            )
        if solution.x is None:
            break
        picks = tuple(int(np.argmax(pick)) for pick in np.split(solution.x, ends))
        loss = sum(float(options[pick]) for options, pick in zip(losses, picks, strict=True))
        if best is not None and not loss < total:
            break
        best, total = picks, loss
    if best is None:
        names = ", ".join(limit.name for limit in limits)
        raise TargetError(f"no choice of options meets the targets on {names} together: lower one of them")
    return best


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress HiGHS's debugging output, which no option turns off."""
    sys.stdout.flush()
    stdout = os.dup(1)
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as devnull:
            os.dup2(devnull.fileno(), 1)
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
