r"""Which channels a layer should read, and the weight that makes up for the others.

With the second moment :math:`C` (I, I) of the channels, the best weight for the channels of a set S is the regression
:math:`W C_{:S} C_{SS}^{-1}`. Channels are removed a few at a time, always those whose loss the others make up for best: with
:math:`P = C^{-1}` of the channels that are left and their weight :math:`B`, the removal of a set Q loses
:math:`\operatorname{tr} (B_Q P_{QQ}^{-1} B_Q^T)` (Hassibi and Stork, "Second order derivatives for network pruning: Optimal
Brain Surgeon", 1992, for single weights).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_FLOOR = 1e-7  # share of the mean diagonal of a moment that is added to it
_STEPS = 128  # in which half of the channels are removed: several at a time where there are more


@dataclass(frozen=True)
class Removal:
    """The order in which channels are removed.

    Attributes:
        inputs: the number of channels.
        order: the channels that are removed, the first one first.
        lost: what is lost once the first n are removed, for n from 0, as a share of E‖Wx‖².

    """

    inputs: int
    order: np.ndarray
    lost: np.ndarray

    def kept(self, count: int) -> np.ndarray:
        """Return the channels that are left when there are so many, in rising order."""
        return np.setdiff1d(np.arange(self.inputs), self.order[: self.inputs - count])


def removal(weight: np.ndarray, moment: np.ndarray, fewest: int = 1) -> Removal:
    """Return the order in which the channels of a layer should be removed.

    Args:
        weight: the weight (O, I, *K).
        moment: second moment (I, I) of the input channels, regular.
        fewest: how many channels are left at the end; default 1.

    """
    inputs = weight.shape[1]
    rows = np.moveaxis(weight, 1, -1).reshape(-1, inputs).astype(np.float64)
    precision = np.linalg.inv(moment.astype(np.float64))
    grams = rows.T @ rows  # BᵀB of the channels that are left
    total = float(np.einsum("ij,ij->", grams, moment)) or 1.0
    left = np.ones(inputs, bool)
    order: list[int] = []
    lost = [0.0]
    while len(order) < inputs - fewest:
        costs = np.where(left, np.diag(grams) / np.maximum(np.diag(precision), 1e-30), np.inf)
        several = min(max(1, inputs // (2 * _STEPS)), inputs - fewest - len(order))
        removed = np.argsort(costs, kind="stable")[:several]
        inverse = np.linalg.inv(precision[np.ix_(removed, removed)])
        cost = float(np.einsum("ij,ij->", grams[np.ix_(removed, removed)], inverse))
        lost += (lost[-1] + cost / total * np.arange(1, several + 1) / several).tolist()
        order += removed.tolist()
        # B ← B − B_Q P_QQ⁻¹ P_Q:, and the same for the inverse of what is left.
        carried = inverse @ precision[removed]
        cross = grams[:, removed] @ carried
        grams += carried.T @ (grams[np.ix_(removed, removed)] @ carried)
        grams -= cross
        grams -= cross.T
        precision -= precision[:, removed] @ carried
        left[removed] = False
    return Removal(inputs, np.array(order, int), np.minimum(np.array(lost), 1.0))


def refitted(weight: np.ndarray, moment: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the weight (O, k, *K) on some channels whose outputs are nearest to those of a weight (O, I, *K).

    Args:
        weight: the weight.
        moment: second moment of the inputs: of channels (I, I), or of all inputs (I·K, I·K) in the order of the weight.
        kept: the channels (k,).

    """
    outputs, inputs, *kernel = weight.shape
    taps = len(moment) // inputs
    alike = taps == 1 and bool(kernel)  # the moment is the same for each tap
    rows = np.moveaxis(weight, 1, -1).reshape(-1, inputs) if alike else weight.reshape(outputs, -1)
    places = (kept[:, None] * taps + np.arange(taps)).reshape(-1)
    # Solved in float64, with a floor: some channels may be nearly the same, or never vary.
    square = moment[np.ix_(places, places)].astype(np.float64)
    square[np.diag_indices(len(square))] += _FLOOR * max(float(np.trace(square)) / len(square), 1e-30)
    best = np.linalg.solve(square, moment[places].astype(np.float64) @ rows.T.astype(np.float64)).T
    if alike:
        return np.ascontiguousarray(np.moveaxis(best.reshape(outputs, *kernel, len(kept)), -1, 1), np.float32)
    return np.ascontiguousarray(best.reshape(outputs, len(kept), *kernel), np.float32)
