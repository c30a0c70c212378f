r"""Decomposition of a weight that approximates the layer's output instead of the weight itself.

For inputs :math:`x` (a patch of I·K values) and outputs :math:`y`, the best weight of a format minimises

.. math:: E‖y - Ŵx‖^2 = \operatorname{tr} (Ŵ - T) C (Ŵ - T)^T + const, \quad C = E[xx^T], \; T = E[yx^T] C^{-1}.

The starting point is the decomposition of :math:`T S`, where :math:`S` is a square root of the second moment of the input
channels: the metric that ignores correlations between taps. For a matrix it is the exact minimum, the reduced-rank regression
of Izenman (1975). From there the cores are fitted in turn, see `alternating`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tensorrail_exporter.calibrate.alternating import alternate, energy, view
from tensorrail_exporter.calibrate.channels import refitted, removal
from tensorrail_exporter.formats import WIDTH, format_of
from tensorrail_exporter.formats.modes import Equation
from tensorrail_exporter.plans.plan import LayerPlan

SWEEPS = 4
_FLOOR = 1e-4  # share of the mean eigenvalue: keeps directions that hardly occur from dominating the inverse


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's inputs.

    Attributes:
        gram: matrix (I·K, I·K) in the order of a weight (O, I, *K); about the mean for a layer with a bias.

    """

    gram: np.ndarray
    _origin: tuple[Moments, float] | None = field(default=None, repr=False, compare=False)  # the moments that were shrunk, s
    _spectra: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _rotated: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)
    _kept: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def channels(self, inputs: int) -> np.ndarray:
        """Return the second moment (I, I) of the input channels, summed over the taps."""
        taps = self.gram.shape[0] // inputs
        return np.asarray(np.einsum("ikjk->ij", self.gram.reshape(inputs, taps, inputs, taps), optimize=True))

    def spectrum(self, inputs: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the eigenvalues (I,) and eigenvectors (I, I) of the second moment of the input channels."""
        if self._origin is not None:  # the eigenvectors stay the same
            origin, share = self._origin
            values, vectors = origin.spectrum(inputs)
            return (1 - share) * values + share * origin.scale * (len(self.gram) // inputs), vectors
        if inputs not in self._spectra:
            values, vectors = np.linalg.eigh(self.channels(inputs).astype(np.float64))
            self._spectra[inputs] = values, vectors
        return self._spectra[inputs]

    def whitened(self, inputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the moments of channels that are mixed so that their own second moment is the identity.

        Returns:
            The moments (I·K, I·K); the matrix (I, I) that takes the channels of a weight to the mixed ones; and its inverse.

        """
        values, vectors = self.spectrum(inputs)
        sizes = raised(values)
        origin, share = (self, 0.0) if self._origin is None else self._origin
        taps = len(self.gram) // inputs
        scales = np.repeat(1 / sizes, taps)
        gram = origin.rotated(inputs) * ((1 - share) * scales).astype(np.float32)
        gram *= scales.astype(np.float32)[:, None]
        gram[np.diag_indices(len(gram))] += (share * origin.scale * np.square(scales)).astype(np.float32)
        return gram, (vectors * sizes).astype(np.float32), ((vectors / sizes).T).astype(np.float32)

    def rotated(self, inputs: int) -> np.ndarray:
        """Return the gram matrix with its channels turned to the eigenvectors of their second moment, computed once."""
        if inputs not in self._rotated:
            taps = len(self.gram) // inputs
            vectors = self.spectrum(inputs)[1].astype(np.float32)
            half = vectors.T @ self.gram.astype(np.float32, copy=False).reshape(inputs, -1)
            # The matrix is symmetric: after half of the turn, the other half acts on the rows of its transpose.
            half = np.ascontiguousarray(half.reshape(len(self.gram), -1).T).reshape(inputs, -1)
            self._rotated[inputs] = (vectors.T @ half).reshape(inputs * taps, -1)
        return self._rotated[inputs]

    def kept(self, target: np.ndarray, count: int) -> np.ndarray:
        """Return the channels (k,) that a layer should read; for shrunk moments, those of the moments that they are made of.

        Args:
            target: the weight (O, I, *K) to approximate. With another one later, the channels stay those of the first.
            count: the number k of channels.

        """
        if self._origin is not None:
            return self._origin[0].kept(target, count)
        if count not in self._kept:
            inputs = target.shape[1]
            channels = self.channels(inputs).astype(np.float64)
            # A channel that hardly varies says nothing of its own, and its inverse would be noise.
            channels[np.diag_indices(inputs)] += _FLOOR * max(float(np.trace(channels)) / inputs, 1e-30)
            self._kept[count] = removal(target, channels, count).kept(count)
        return self._kept[count]

    @property
    def scale(self) -> float:
        """The mean eigenvalue of the gram matrix."""
        return float(np.trace(self.gram, dtype=np.float64)) / len(self.gram)

    def shrunk(self, share: float) -> Moments:
        """Return (1 − s) C + s μ I for the gram matrix C with the mean eigenvalue μ.

        Few rows leave directions that none of them has, in which a fit is free to do any harm. The shrunk moments are those of
        rows of which a share s is noise (Ledoit and Wolf, Journal of Multivariate Analysis, 2004). Their eigenvectors are those
        of these moments, which are computed once.

        Args:
            share: the share s, from 0 to 1.

        """
        gram = self.gram * (1 - share)
        gram[np.diag_indices(len(gram))] += share * self.scale
        return Moments(gram, (self, share) if self._origin is None else None)

    def energy(self, weight: np.ndarray) -> float:
        """Return tr(W C Wᵀ) = E‖Wx‖² of a weight (O, …)."""
        return energy(weight.reshape(weight.shape[0], -1), self.gram)


def roots(second_moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the symmetric square root of a second moment (n, n) and its inverse; small eigenvalues are raised."""
    values, vectors = np.linalg.eigh(second_moment.astype(np.float64))
    sizes = raised(values)
    return (vectors * sizes) @ vectors.T, (vectors / sizes) @ vectors.T


def raised(values: np.ndarray) -> np.ndarray:
    """Return the square roots of eigenvalues (n,); small eigenvalues are raised."""
    return np.asarray(np.sqrt(np.maximum(values, _FLOOR * max(float(values.mean()), 1e-30))))


def decompose(plan: LayerPlan, target: np.ndarray, moments: Moments, *, sweeps: int = SWEEPS) -> list[np.ndarray]:
    """Return the cores whose outputs are closest to those of a target weight, on inputs with these moments.

    Args:
        plan: the format, modes and ranks of the layer.
        target: the weight (O, I, *K) whose outputs are approximated.
        moments: second moments of the layer's inputs.
        sweeps: largest number of alternating sweeps over the cores; default 4. 0: only the core of the outputs is fitted.

    Returns:
        The fitted cores, or those of the plain decomposition if their error is smaller. That can happen with `cp` near full
        rank, where the starting point is itself the result of a search.

    Raises:
        PlanError: the plan does not fit the weight.

    """
    fitted = in_metric(plan, target, moments, sweeps=sweeps)
    plain = format_of(plan.format).decompose(target.astype(np.float32), plan.modes, plan.ranks)
    errors = [moments.energy(plan.reconstruct(cores, target.shape) - target) for cores in (fitted, plain)]
    return fitted if errors[0] <= errors[1] else plain


def in_metric(plan: LayerPlan, target: np.ndarray, moments: Moments, *, sweeps: int = SWEEPS) -> list[np.ndarray]:
    """Do the same as `decompose` without a comparison with the plain decomposition."""
    shape = target.shape
    form = format_of(plan.format)
    equation = form.equation(shape, plan.modes)
    if plan.format == WIDTH:
        return _narrow(plan, target, moments)
    if len(equation.inputs) != 1:  # with several input modes the square root mixes all of them
        plain = form.decompose(target.astype(np.float32), plan.modes, plan.ranks)
        return alternate(equation, plain, target, moments.gram, sweeps)
    gram, mixing, inverse = moments.whitened(shape[1])
    white = np.moveaxis(np.tensordot(target.astype(np.float32), mixing, (1, 0)), -1, 1)
    cores = form.decompose(np.ascontiguousarray(white), plan.modes, plan.ranks)
    cores = alternate(equation, cores, white, gram, sweeps)
    place = next(k for k, letters in enumerate(equation.cores) if equation.inputs in letters)
    return [_on_inputs(core, equation, k, inverse) if k == place else core for k, core in enumerate(cores)]


def _narrow(plan: LayerPlan, target: np.ndarray, moments: Moments) -> list[np.ndarray]:
    """Return the weight on the channels that are kept, and their selection."""
    inputs = target.shape[1]
    (count,) = format_of(WIDTH).clamp(target.shape, plan.modes, plan.ranks)
    kept = moments.kept(target, count)
    return [refitted(target, moments.gram, kept), np.eye(inputs, dtype=np.float32)[kept]]


def _on_inputs(core: np.ndarray, equation: Equation, k: int, matrix: np.ndarray) -> np.ndarray:
    """Return a core with its input mode multiplied by a matrix (I, I)."""
    letters = equation.cores[k]
    shaped = view(core, letters, equation)
    axis = letters.index(equation.inputs)
    return np.moveaxis(np.tensordot(shaped, matrix.astype(np.float32), (axis, 0)), -1, axis).reshape(core.shape)
