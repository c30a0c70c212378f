r"""Decomposes the table of an embedding by how often its rows are read.

Of the rows :math:`w_i` of a table, inputs read some often and most never. With the share :math:`f_i` of all reads, cores
minimise

.. math:: \sum_i p_i ‖w_i - ŵ_i‖^2, \quad p_i = (1 - s) f_i + s / N,

where s > 0 since calibration inputs show few of the N rows. That is the error of the layer's outputs, as `metric` has it for
other layers: the second moment of one-hot inputs is the diagonal of f, shrunk toward the identity. The table is scaled by
:math:`\sqrt{p_i}`, decomposed, and scaled back; for `svd` this is the exact minimum. Word frequencies weight the factors of an
embedding in Chen, Si, Li, Chelba and Hsieh, *GroupReduce: Block-Wise Low-Rank Approximation for Neural Language Model
Shrinking*, NeurIPS 2018.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tensorrail_exporter.calibrate.alternating import view
from tensorrail_exporter.formats import format_of
from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.plans.plan import LayerPlan

DEFAULT = 0.3
"""The shrinkage without inputs to choose it by."""

_LEAST = 1e-4  # of the shrinkage


def weighs_rows(spec: LayerSpec, plan: LayerPlan) -> bool:
    """Return whether a layer is an embedding whose entries are one mode, so that each row can have a weight of its own."""
    return spec.gathers and len(format_of(plan.format).equation(spec.shape, plan.modes).inputs) == 1


def reads(indices: Iterable[np.ndarray], entries: int) -> np.ndarray:
    """Return how often each row is read.

    Args:
        indices: integers of any shape, from −N to N − 1; negative ones count from the end, as in ONNX.
        entries: the number N of rows.

    Returns:
        Counts (N,), float64.

    """
    counts = np.zeros(entries)
    for batch in indices:
        counts += np.bincount(np.asarray(batch, np.int64).reshape(-1) % entries, minlength=entries)
    return counts


def row_weights(counts: np.ndarray, shrinkage: float) -> np.ndarray:
    """Return the weights N·p (N,) of the rows, of which the mean is 1.

    Args:
        counts: how often each row is read (N,).
        shrinkage: the share s of the weights that all rows have alike, above 0 and at most 1.

    """
    total = float(counts.sum())
    share = counts / total if total else np.full(len(counts), 1 / len(counts))
    return np.asarray((1 - shrinkage) * share * len(counts) + shrinkage)


def decompose(plan: LayerPlan, weight: np.ndarray, counts: np.ndarray, shrinkage: float) -> list[np.ndarray]:
    """Return the cores of a table, in which rows that are read often are closest.

    Args:
        plan: the format, modes and ranks; the entries are one mode.
        weight: the table as a weight (features, N).
        counts: how often each row is read (N,).
        shrinkage: as for `row_weights`, but at least 1e-4: a row of weight 0 could have any values.

    """
    form = format_of(plan.format)
    equation = form.equation(weight.shape, plan.modes)
    root = np.sqrt(row_weights(counts, max(shrinkage, _LEAST)))
    cores = form.decompose((weight * root).astype(np.float32), plan.modes, plan.ranks)
    place = next(k for k, letters in enumerate(equation.cores) if equation.inputs in letters)
    letters = equation.cores[place]
    entries = [1] * len(letters)
    entries[letters.index(equation.inputs)] = len(root)
    scaled = view(cores[place], letters, equation) / root.astype(np.float32).reshape(entries)
    cores[place] = np.ascontiguousarray(scaled.reshape(cores[place].shape))
    return cores


def lost(weight: np.ndarray, approximated: np.ndarray, counts: np.ndarray) -> float:
    """Return the share of the variance of the rows that are read which an approximated table loses.

    Args:
        weight: the table as a weight (features, N).
        approximated: the same of its cores.
        counts: how often each row is read (N,).

    """
    share = counts / max(counts.sum(), 1)
    error = float(share @ np.square(weight - approximated, dtype=np.float64).sum(0))
    mean = weight.astype(np.float64) @ share
    variance = float(share @ np.square(weight, dtype=np.float64).sum(0)) - float(mean @ mean)
    return error / max(variance, 1e-30)
