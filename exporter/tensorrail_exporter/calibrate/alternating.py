r"""Alternating least squares: cores whose product is closest to a weight, in the metric of the layer's inputs.

For a target :math:`T` and the second moment :math:`C` of the inputs, the error of a weight :math:`W` is

.. math:: \operatorname{tr} (W - T) C (W - T)^T .

Every format is linear in each of its cores, so the cores are fitted in turn, each by a few steps of conjugate gradients; no
step increases the error. Most formats have a core of the outputs and no input mode, and then :math:`W = \sum_s A_s P E_s`: the
output core :math:`A` times the product :math:`P` of all other cores, at each tap :math:`s` that is a mode of the output core
(:math:`E_s` places the columns of :math:`P` at the tap). :math:`A` has a closed form. Everything else needs only
:math:`H_s = P E_s C`, which is as many rows as ranks and not as outputs: the normal equations of :math:`P` are
:math:`\sum_{s,t} A_s^T A_t H_t E_s^T = \sum_s A_s^T T C E_s^T`, and the error is known from both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tensorrail_exporter.formats.modes import Equation

_STEPS = 8  # steps of conjugate gradients for one core in one sweep
_ENOUGH = 1e-3  # share of the error: the sweeps end after one that gains less
_CANCELLED = 1e-4  # share of the target below which an error that is a difference of large numbers is computed anew


def alternate(
    equation: Equation, cores: Sequence[np.ndarray], target: np.ndarray, gram: np.ndarray, sweeps: int
) -> list[np.ndarray]:
    """Return the cores after sweeps over all of them, those with the smallest error.

    Args:
        equation: the einsum of the cores.
        cores: the cores to start from.
        target: the weight (O, I, *K) to approximate.
        gram: second moments (I·K, I·K) of the inputs.
        sweeps: largest number of sweeps; they end earlier once they gain little. 0: only the output core is fitted.

    """
    goal = np.ascontiguousarray(target.reshape(target.shape[0], -1), np.float32)
    gram = gram.astype(np.float32, copy=False)
    fitted = [core.astype(np.float32) for core in cores]
    outer = _outer(equation)
    if outer is None:
        problem: _AllCores | _BehindOutputs = _AllCores(equation, goal, gram)
    else:
        letters = equation.cores[outer]
        sizes = dict(zip(letters, view(fitted[outer], letters, equation).shape, strict=True))
        problem = _BehindOutputs(equation, goal, gram, outer, sizes)
    if not sweeps:
        return problem.start(fitted)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows has no finite error, and is not kept
        best, least = list(fitted), problem.error(fitted)
        least = least if math.isfinite(least) else math.inf
        before = math.inf
        for _ in range(sweeps):
            fitted = problem.sweep(fitted)
            error = problem.error(fitted)
            if not math.isfinite(error):
                break
            if error < least:  # near the minimum, rounding may increase the error
                best, least = list(fitted), error
            if before - error < _ENOUGH * before:
                break
            before = error
    return best


def energy(weight: np.ndarray, gram: np.ndarray) -> float:
    """Return tr(W C Wᵀ)."""
    return float(np.vdot(weight, weight @ gram))


def view(core: np.ndarray, letters: str, equation: Equation) -> np.ndarray:
    """Return a core with one axis per letter."""
    if core.ndim == len(letters):
        return core
    sizes = dict(zip(equation.weight, equation.axes, strict=True))
    return core.reshape([sizes.get(letter, -1) for letter in letters])


class _AllCores:
    """The cores of a format whose output core is not in front of all others; products are as large as the weight."""

    def __init__(self, equation: Equation, goal: np.ndarray, gram: np.ndarray) -> None:
        self.equation, self.goal, self.gram = equation, goal, gram
        self.correlation = goal @ gram

    def error(self, cores: Sequence[np.ndarray]) -> float:
        """Return the error of the cores' product."""
        return energy(_product(self.equation, cores, self.goal.shape) - self.goal, self.gram)

    def start(self, cores: list[np.ndarray]) -> list[np.ndarray]:
        """Return the cores as they are: none of them has a closed form."""
        return cores

    def sweep(self, cores: list[np.ndarray]) -> list[np.ndarray]:
        """Fit every core once, the last one first."""
        for k in reversed(range(len(cores))):
            cores = _balanced(cores)
            core = _Core(self.equation, cores, k)
            fitted = core.fitted(self.correlation, lambda weight: weight.reshape(self.goal.shape) @ self.gram)
            cores[k] = fitted.reshape(cores[k].shape)
        return cores


class _BehindOutputs:
    """The cores of a format with a core of the outputs in front: that one in closed form, the others by their product P."""

    def __init__(self, equation: Equation, goal: np.ndarray, gram: np.ndarray, outer: int, sizes: Mapping[str, int]) -> None:
        self.outer, self.letters = outer, equation.cores[outer]
        self.others = [k for k in range(len(equation.cores)) if k != outer]
        sizes = {**sizes, **dict(zip(equation.weight, equation.axes, strict=True))}
        self.taps = [letter for letter in self.letters[1:] if letter in equation.weight]  # modes of the output core
        self.ranks = [letter for letter in self.letters[1:] if letter not in equation.weight]
        inside = [letter for letter in equation.weight[1:] if letter not in self.taps]
        self.order = [*self.taps, *self.ranks]
        self.sizes = [sizes[letter] for letter in self.order]
        # P as a tensor, and the einsum that makes it
        product = "".join((*self.ranks, *inside))
        axes = tuple(sizes[letter] for letter in product)
        self.within = Equation(tuple(equation.cores[k] for k in self.others), product, axes, equation.inputs)
        self.rows = math.prod(sizes[letter] for letter in self.ranks)
        # Columns are ordered by taps, so that those of one tap are a block.
        columns = equation.weight[1:]
        order = [columns.index(letter) for letter in (*self.taps, *inside)]
        lengths = equation.axes[1:]
        self.equation = replace(
            equation,
            weight=equation.weight[0] + "".join((*self.taps, *inside)),
            axes=(len(goal), *(lengths[place] for place in order)),
        )
        if self.taps:
            goal = goal.reshape(-1, *lengths).transpose(0, *(1 + place for place in order)).reshape(goal.shape)
            both = (*order, *(len(order) + place for place in order))
            gram = gram.reshape(*lengths, *lengths).transpose(both).reshape(gram.shape)
        self.goal, self.gram = goal, gram
        width = math.prod(sizes[letter] for letter in inside)
        self.blocks = [slice(start, start + width) for start in range(0, len(gram), width)]  # columns at each tap
        self.correlation = goal @ gram  # T C
        self.size = float(np.einsum("oi,oi->", self.correlation, goal, dtype=np.float64))
        self.half: np.ndarray | None = None  # of the cores whose error was computed last

    def error(self, cores: Sequence[np.ndarray]) -> float:
        """Return the error of the cores' product."""
        product = self._product(cores)
        self.half = self._times_gram(product)
        squares, wanted = self._normal(cores)
        exact = product.astype(np.float64)
        error = self.size + float(np.vdot(exact, squares(self.half)) - 2 * np.vdot(exact, wanted))
        if error > _CANCELLED * self.size:
            return error
        return energy(_product(self.equation, cores, self.goal.shape) - self.goal, self.gram)

    def start(self, cores: list[np.ndarray]) -> list[np.ndarray]:
        """Fit the core of the outputs, which takes a tenth of a sweep."""
        product = self._product(cores)
        half = self._times_gram(product) if self.half is None else self.half
        cores = list(cores)
        cores[self.outer] = self._closed(product, half).reshape(cores[self.outer].shape)
        self.half = None
        return cores

    def sweep(self, cores: list[np.ndarray]) -> list[np.ndarray]:
        """Fit every core once: that of the outputs, then the last one first."""
        cores = _balanced(self.start(cores))
        squares, wanted = self._normal(cores)
        for place in reversed(range(len(self.others))):
            views = [view(cores[k], self.equation.cores[k], self.equation) for k in self.others]
            core = _Core(self.within, views, place)
            fitted = core.fitted(wanted, lambda change: squares(self._times_gram(change.reshape(wanted.shape))))
            cores[self.others[place]] = fitted.reshape(cores[self.others[place]].shape)
        return cores

    def _product(self, cores: Sequence[np.ndarray]) -> np.ndarray:
        """Return P (ranks, inside), the product of all cores but that of the outputs."""
        return np.ascontiguousarray(_product(self.within, [cores[k] for k in self.others], (self.rows, -1)))

    def _times_gram(self, product: np.ndarray) -> np.ndarray:
        """Return H (taps · ranks, I·K): the product at each tap, times the moments."""
        half = np.empty((len(self.blocks) * self.rows, len(self.gram)), np.float32)
        for tap, block in enumerate(self.blocks):
            np.matmul(product, self.gram[block], out=half[tap * self.rows : (tap + 1) * self.rows])
        return half

    def _closed(self, product: np.ndarray, half: np.ndarray) -> np.ndarray:
        """Return the best output core (O, …): every output is a combination of the rows of P at the taps."""
        inner = np.concatenate([half[:, block] @ product.T for block in self.blocks], 1).astype(np.float64)
        cross = np.concatenate([self.correlation[:, block] @ product.T for block in self.blocks], 1).astype(np.float64)
        inner[np.diag_indices(len(inner))] += 1e-9 * float(np.trace(inner)) / len(inner) + 1e-30
        solved = np.linalg.solve(inner, cross.T).T.astype(np.float32).reshape(len(self.goal), *self.sizes)
        return solved.transpose(0, *(1 + self.order.index(letter) for letter in self.letters[1:]))

    def _normal(self, cores: Sequence[np.ndarray]) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
        """Return both sides of the normal equations of P: a function of H, and the right side (ranks, inside)."""
        core = view(cores[self.outer], self.letters, self.equation)
        matrix = core.transpose(0, *(self.letters.index(letter) for letter in self.order)).reshape(len(core), -1)
        gram = (matrix.T @ matrix).reshape(len(self.blocks), self.rows, -1)
        by_tap = matrix.reshape(len(core), len(self.blocks), self.rows)

        def squares(half: np.ndarray) -> np.ndarray:
            return np.asarray(sum(rows @ half[:, block] for rows, block in zip(gram, self.blocks, strict=True)))

        wanted = sum(by_tap[:, tap].T @ self.correlation[:, block] for tap, block in enumerate(self.blocks))
        return squares, np.asarray(wanted)


class _Core:
    """One core of a product, with the others fixed."""

    def __init__(self, equation: Equation, cores: Sequence[np.ndarray], k: int) -> None:
        self.axes = equation.axes
        views = [view(core, letters, equation) for core, letters in zip(cores, equation.cores, strict=True)]
        own, self.start = equation.cores[k], views.pop(k)
        self.views = views
        subscripts = [*equation.cores[:k], *equation.cores[k + 1 :]]
        self.forward = f"{','.join([*subscripts, own])}->{equation.weight}"
        self.backward = f"{','.join([*subscripts, equation.weight])}->{own}"
        # The order of the products is planned once for all steps; the plan needs only the shape of the weight.
        self.ahead = np.einsum_path(self.forward, *views, self.start, optimize="greedy")[0]
        self.back = np.einsum_path(self.backward, *views, np.broadcast_to(np.float32(0), self.axes), optimize="greedy")[0]

    def fitted(self, wanted: np.ndarray, squares: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the core after a few steps of conjugate gradients on its least-squares problem.

        Args:
            wanted: right side of the normal equations of the product.
            squares: their left side, linear in the product.

        """
        core = self.start.copy()
        residual = self._adjoint(wanted - squares(self._product(core)).reshape(wanted.shape))
        direction = residual.copy()
        size = first = float(np.vdot(residual, residual))
        for _ in range(_STEPS):
            if size <= 1e-10 * first or size == 0.0:
                break
            weighted = self._adjoint(squares(self._product(direction)))
            curvature = float(np.vdot(direction, weighted))
            if not 0.0 < curvature < math.inf:
                break
            step = size / curvature
            core += step * direction
            residual -= step * weighted
            after = float(np.vdot(residual, residual))
            if not math.isfinite(after):
                break
            direction = residual + (after / size) * direction
            size = after
        return core

    def _product(self, core: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum(self.forward, *self.views, core, optimize=self.ahead))

    def _adjoint(self, product: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum(self.backward, *self.views, product.reshape(self.axes), optimize=self.back))


def _outer(equation: Equation) -> int | None:
    """Return the index of the core that starts with the only output mode and has no input mode, or None."""
    outs = equation.weight[: equation.weight.index(equation.inputs[0])]
    if len(outs) != 1 or len(equation.cores) == 1:
        return None
    place = next(k for k, letters in enumerate(equation.cores) if outs[0] in letters)
    letters = equation.cores[place]
    return place if letters[0] == outs[0] and not set(letters) & set(equation.inputs) else None


def _balanced(cores: list[np.ndarray]) -> list[np.ndarray]:
    """Return cores of equal norms with the same product: one that grows while others shrink would overflow in the end."""
    norms = [float(np.linalg.norm(core)) for core in cores]
    if not all(0 < norm < math.inf for norm in norms):
        return cores
    mean = math.exp(sum(map(math.log, norms)) / len(norms))
    return [core * np.float32(mean / norm) for core, norm in zip(cores, norms, strict=True)]


def _product(equation: Equation, cores: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    views = [view(core, letters, equation) for core, letters in zip(cores, equation.cores, strict=True)]
    return np.asarray(np.einsum(f"{','.join(equation.cores)}->{equation.weight}", *views, optimize=True)).reshape(shape)
