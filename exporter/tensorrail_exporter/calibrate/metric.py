r"""Decomposition of a weight that approximates the layer's output instead of the weight itself.

For inputs :math:`x` (a patch of I·K values) and outputs :math:`y`, the best weight of a format minimises

.. math:: E‖y - Ŵx‖^2 = \operatorname{tr} (Ŵ - T) C (Ŵ - T)^T + const, \quad C = E[xx^T], \; T = E[yx^T] C^{-1}.

Every format is linear in each of its cores, so the cores are fitted in turn (alternating least squares), each by a few steps
of conjugate gradients; no step increases the error. The starting point is the decomposition of :math:`T S`, where :math:`S`
is the square root of the second moment of the input channels: the metric that ignores correlations between taps. For a
matrix it is the exact minimum, the reduced-rank regression of Izenman (1975).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tensorrail_exporter.formats import format_of
from tensorrail_exporter.formats.modes import Equation
from tensorrail_exporter.plans.plan import LayerPlan

SWEEPS = 4
_STEPS = 8  # steps of conjugate gradients for one core in one sweep
_ENOUGH = 1e-3  # share of the error: the sweeps end after one that gains less
_FLOOR = 1e-4  # share of the mean eigenvalue: keeps directions that hardly occur from dominating the inverse


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's inputs.

    Attributes:
        gram: matrix (I·K, I·K) in the order of a weight (O, I, *K); about the mean for a layer with a bias.

    """

    gram: np.ndarray
    _spectra: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def channels(self, inputs: int) -> np.ndarray:
        """Return the second moment (I, I) of the input channels, summed over the taps."""
        taps = self.gram.shape[0] // inputs
        return np.asarray(np.einsum("ikjk->ij", self.gram.reshape(inputs, taps, inputs, taps), optimize=True))

    def spectrum(self, inputs: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the eigenvalues (I,) and eigenvectors (I, I) of the second moment of the input channels."""
        if inputs not in self._spectra:
            values, vectors = np.linalg.eigh(self.channels(inputs).astype(np.float64))
            self._spectra[inputs] = values, vectors
        return self._spectra[inputs]

    @property
    def scale(self) -> float:
        """The mean eigenvalue of the gram matrix."""
        return float(np.trace(self.gram, dtype=np.float64)) / len(self.gram)

    def shrunk(self, share: float) -> Moments:
        """Return (1 − s) C + s μ I for the gram matrix C with the mean eigenvalue μ.

        Few rows leave directions that none of them has, in which a fit is free to do any harm. The shrunk moments are those of
        rows of which a share s is noise (Ledoit and Wolf, Journal of Multivariate Analysis, 2004). A spectrum that was computed
        already is not computed again.

        Args:
            share: the share s, from 0 to 1.

        """
        gram = self.gram * (1 - share)
        gram[np.diag_indices(len(gram))] += share * self.scale
        other = Moments(gram)
        for inputs, (values, vectors) in self._spectra.items():  # the eigenvectors stay the same
            other._spectra[inputs] = (1 - share) * values + share * self.scale * (len(gram) // inputs), vectors
        return other

    def error(self, weight: np.ndarray, target: np.ndarray) -> float:
        """Return the relative error E‖(Ŵ − T)x‖² / E‖Tx‖² of a weight Ŵ against a target T, both (O, …)."""
        rows = target.reshape(target.shape[0], -1)
        difference = weight.reshape(weight.shape[0], -1) - rows
        return float(_energy(difference, self.gram) / max(_energy(rows, self.gram), 1e-30))


def roots(second_moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the symmetric square root of a second moment (n, n) and its inverse; small eigenvalues are raised."""
    return roots_of_spectrum(*np.linalg.eigh(second_moment.astype(np.float64)))


def roots_of_spectrum(values: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Do the same for the eigenvalues (n,) and eigenvectors (n, n) of a second moment."""
    raised = np.sqrt(np.maximum(values, _FLOOR * max(float(values.mean()), 1e-30)))
    return (vectors * raised) @ vectors.T, (vectors / raised) @ vectors.T


def decompose(plan: LayerPlan, target: np.ndarray, moments: Moments, *, sweeps: int = SWEEPS) -> list[np.ndarray]:
    """Return the cores whose outputs are closest to those of a target weight, on inputs with these moments.

    Args:
        plan: the format, modes and ranks of the layer.
        target: the weight (O, I, *K) whose outputs are approximated.
        moments: second moments of the layer's inputs.
        sweeps: largest number of alternating sweeps over the cores; default 4.

    Returns:
        The fitted cores, or those of the plain decomposition if their error is smaller. That can happen with `cp` near full
        rank, where the starting point is itself the result of a search.

    Raises:
        PlanError: the plan does not fit the weight.

    """
    fitted = in_metric(plan, target, moments, sweeps=sweeps)
    plain = format_of(plan.format).decompose(target.astype(np.float32), plan.modes, plan.ranks)
    errors = [moments.error(plan.reconstruct(cores, target.shape), target) for cores in (fitted, plain)]
    return fitted if errors[0] <= errors[1] else plain


def in_metric(plan: LayerPlan, target: np.ndarray, moments: Moments, *, sweeps: int = SWEEPS) -> list[np.ndarray]:
    """Do the same as `decompose` without a comparison with the plain decomposition."""
    shape = target.shape
    form = format_of(plan.format)
    equation = form.equation(shape, plan.modes)
    if len(equation.inputs) != 1:  # with several input modes the square root mixes all of them
        plain = form.decompose(target.astype(np.float32), plan.modes, plan.ranks)
        return _alternate(equation, plain, target, moments.gram, sweeps)
    root, inverse = (matrix.astype(np.float32) for matrix in roots_of_spectrum(*moments.spectrum(shape[1])))
    white = np.moveaxis(np.tensordot(target, root, (1, 0)), -1, 1)
    cores = form.decompose(np.ascontiguousarray(white, np.float32), plan.modes, plan.ranks)
    taps = moments.gram.shape[0] // shape[1]
    gram = moments.gram.reshape(shape[1], taps, shape[1], taps)
    gram = np.einsum("ij,jkml,mn->iknl", inverse, gram, inverse, optimize=True).reshape(moments.gram.shape)
    cores = _alternate(equation, cores, white, gram, sweeps)
    place = next(k for k, letters in enumerate(equation.cores) if equation.inputs in letters)
    return [_on_inputs(core, equation, k, inverse) if k == place else core for k, core in enumerate(cores)]


def _alternate(
    equation: Equation, cores: Sequence[np.ndarray], target: np.ndarray, gram: np.ndarray, sweeps: int
) -> list[np.ndarray]:
    """Return the cores after sweeps over all of them.

    The best core of the outputs has a closed form. Once its columns are orthonormal, the other cores cannot change the
    outputs outside of their span, so they are fitted to the outputs within it, which are only as many rows as the rank.
    """
    fitted = [core.astype(np.float32) for core in cores]
    gram = gram.astype(np.float32)
    goal = target.reshape(target.shape[0], -1).astype(np.float32)
    outer = _outer(equation)
    best, least = list(fitted), _energy(_product(equation, fitted, goal.shape) - goal, gram)
    before = math.inf
    for _ in range(sweeps):
        rows, within = goal, equation
        basis = None
        if outer is not None:
            fitted[outer] = _closed(equation, fitted, outer, goal, gram)
            matrix = _view(fitted[outer], equation.cores[outer], equation).reshape(target.shape[0], -1)
            if matrix.shape[1] < matrix.shape[0]:
                basis, triangle = np.linalg.qr(matrix)
                rows = basis.T @ goal
                within = replace(equation, axes=(len(rows), *equation.axes[1:]))
                fitted[outer] = triangle
        correlation = rows @ gram
        for k in reversed([k for k in range(len(fitted)) if k != outer]):
            fitted = _balanced(fitted)
            fitted[k] = _solve(within, fitted, k, correlation, gram)
        if basis is not None and outer is not None:
            fitted[outer] = (basis @ fitted[outer].reshape(basis.shape[1], -1)).reshape(cores[outer].shape)
        error = _energy(_product(equation, fitted, goal.shape) - goal, gram)
        if error < least:  # near the minimum, rounding may increase the error
            best, least = list(fitted), error
        if before - error < _ENOUGH * before:
            break
        before = error
    return best


def _balanced(cores: list[np.ndarray]) -> list[np.ndarray]:
    """Return cores of equal norms with the same product: one that grows while others shrink would overflow in the end."""
    norms = [float(np.linalg.norm(core)) for core in cores]
    if not all(0 < norm < math.inf for norm in norms):
        return cores
    mean = math.exp(sum(map(math.log, norms)) / len(norms))
    return [core * np.float32(mean / norm) for core, norm in zip(cores, norms, strict=True)]


def _outer(equation: Equation) -> int | None:
    """Return the index of the core that starts with the only output mode and has no input mode, or None."""
    outs = equation.weight[: equation.weight.index(equation.inputs[0])]
    if len(outs) != 1 or len(equation.cores) == 1:
        return None
    place = next(k for k, letters in enumerate(equation.cores) if outs[0] in letters)
    letters = equation.cores[place]
    return place if letters[0] == outs[0] and not set(letters) & set(equation.inputs) else None


def _closed(equation: Equation, cores: Sequence[np.ndarray], k: int, goal: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Return the best core of the outputs in closed form: every output is a combination of the other cores' product."""
    letters = equation.cores[k]
    sizes = dict(zip(equation.weight, equation.axes, strict=True))
    view = _view(cores[k], letters, equation)
    rest = letters[1:]
    # Taps that are modes of this core become unit vectors; the other cores give the rest of the row.
    shared = [letter for letter in rest if letter in sizes]
    ranks = "".join(letter for letter in rest if letter not in sizes)
    others = [j for j in range(len(cores)) if j != k]
    views = [_view(cores[j], equation.cores[j], equation) for j in others]
    inside = "".join(letter for letter in equation.weight[1:] if letter not in shared)
    product = np.einsum(f"{','.join(equation.cores[j] for j in others)}->{ranks}{inside}", *views, optimize=True)
    count = math.prod(product.shape[: len(ranks)])
    rows = np.zeros(
        (*(sizes[letter] for letter in shared), count, *(sizes[letter] for letter in equation.weight[1:])), np.float32
    )
    order = [shared.index(letter) if letter in shared else None for letter in equation.weight[1:]]
    for tap in np.ndindex(*(sizes[letter] for letter in shared)):
        position = tuple(slice(None) if place is None else tap[place] for place in order)
        rows[(*tap, slice(None), *position)] = product.reshape(count, *product.shape[len(ranks) :])
    rows = rows.reshape(-1, goal.shape[1])
    half = rows @ gram
    inner = (half @ rows.T).astype(np.float64)
    inner[np.diag_indices(len(inner))] += 1e-9 * float(np.trace(inner)) / len(inner) + 1e-30
    solved = np.linalg.solve(inner, (half @ goal.T).astype(np.float64)).T.astype(np.float32)
    # From (o, shared taps, ranks) to the order of the core's axes.
    solved = solved.reshape(len(goal), *(sizes[letter] for letter in shared), *product.shape[: len(ranks)])
    axes = [1 + [*shared, *ranks].index(letter) for letter in rest]
    return solved.transpose(0, *axes).reshape(view.shape).reshape(cores[k].shape)


def _solve(equation: Equation, cores: Sequence[np.ndarray], k: int, correlation: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Return core `k` after a few steps of conjugate gradients on its least-squares problem, with the other cores fixed.

    `correlation` is the target weight times the moments of the inputs.
    """
    others = [*cores[:k], *cores[k + 1 :]]
    subscripts = [*equation.cores[:k], *equation.cores[k + 1 :]]
    views = [_view(core, letters, equation) for core, letters in zip(others, subscripts, strict=True)]
    own = equation.cores[k]
    if not views:
        return cores[k]
    start = _view(cores[k], own, equation)
    forward, backward = f"{','.join(subscripts)},{own}->{equation.weight}", f"{','.join(subscripts)},{equation.weight}->{own}"
    # The order of the products is planned once for all steps; the plan needs only the shape of the weight.
    ahead = np.einsum_path(forward, *views, start, optimize="greedy")[0]
    back = np.einsum_path(backward, *views, np.broadcast_to(np.float32(0), equation.axes), optimize="greedy")[0]

    def product(core: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum(forward, *views, core, optimize=ahead)).reshape(correlation.shape)

    def adjoint(weight: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum(backward, *views, weight.reshape(equation.axes), optimize=back))

    core = start.copy()
    residual = adjoint(correlation - product(core) @ gram)
    direction = residual.copy()
    size = first = float(np.vdot(residual, residual))
    for _ in range(_STEPS):
        if size <= 1e-10 * first or size == 0.0:
            break
        change = product(direction)
        weighted = change @ gram
        curvature = float(np.vdot(change, weighted))
        if curvature <= 0.0:
            break
        step = size / curvature
        core += step * direction
        residual -= step * adjoint(weighted)
        after = float(np.vdot(residual, residual))
        direction = residual + (after / size) * direction
        size = after
    return core.reshape(cores[k].shape)


def _product(equation: Equation, cores: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    views = [_view(core, letters, equation) for core, letters in zip(cores, equation.cores, strict=True)]
    return np.asarray(np.einsum(f"{','.join(equation.cores)}->{equation.weight}", *views, optimize=True)).reshape(shape)


def _on_inputs(core: np.ndarray, equation: Equation, k: int, matrix: np.ndarray) -> np.ndarray:
    """Return a core with its input mode multiplied by a symmetric matrix (I, I)."""
    letters = equation.cores[k]
    view = _view(core, letters, equation)
    axis = letters.index(equation.inputs)
    return np.moveaxis(np.tensordot(view, matrix.astype(np.float32), (axis, 0)), -1, axis).reshape(core.shape)


def _view(core: np.ndarray, letters: str, equation: Equation) -> np.ndarray:
    """Return a core with one axis per letter."""
    if core.ndim == len(letters):
        return core
    sizes = dict(zip(equation.weight, equation.axes, strict=True))
    return core.reshape([sizes.get(letter, -1) for letter in letters])


def _energy(weight: np.ndarray, gram: np.ndarray) -> float:
    """Return tr(W C Wᵀ)."""
    return float(np.vdot(weight, weight @ gram))
