"""Approximated weights of a layer for all of its options, from decompositions that are made once.

The weight is approximated in the metric of its input channels: it is multiplied by the root of their second moment, truncated,
and multiplied by the inverse. A bias keeps the mean of each output. A fit to all taps together (`calibrate.layerwise`) loses
less; this one takes milliseconds per option, so that many options can be tried in the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tensorrail_exporter.calibrate.channels import Removal, refitted, removal
from tensorrail_exporter.formats import WIDTH, format_of
from tensorrail_exporter.formats.ttm import paired, unpaired
from tensorrail_exporter.search.options import Option
from tensorrail_runtime.errors import PlanError


@dataclass(frozen=True)
class InputMoments:
    """What is known about the input of a layer.

    Attributes:
        root: square root (I, I) of the second moment of the input channels; about the mean, if a bias follows the weight. Of
            an embedding, whose inputs are one-hot, its diagonal (I,).
        inverse: the inverse of `root`, of the same shape.
        mean: mean (I, *K) of the inputs of each tap.

    """

    root: np.ndarray
    inverse: np.ndarray
    mean: np.ndarray


@dataclass
class Approximations:
    """The weight of one layer with any of its options.

    Attributes:
        weight: the dense weight W (O, I, *K).
        moments: moments of the layer's inputs; None: the weight alone is approximated.

    """

    weight: np.ndarray
    moments: InputMoments | None = None
    _white: np.ndarray = field(init=False, repr=False)
    _bases: dict[tuple[tuple[int, ...], ...], tuple[np.ndarray, np.ndarray, bool]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        self._white = self._in_metric(self.weight)

    def _in_metric(self, weight: np.ndarray) -> np.ndarray:
        """Return a weight (O, I, *K) whose norm is that of its outputs."""
        white = weight if self.moments is None else on_inputs(weight, self.moments.root)
        return np.ascontiguousarray(white, np.float32)

    @cached_property
    def energy(self) -> float:
        """‖W‖² in the metric of the inputs."""
        return float(np.square(self._white, dtype=np.float64).sum())

    def share(self, option: Option) -> float:
        """Return the share of ‖W‖² that an option loses, in the metric of the inputs.

        For `svd` the share follows exactly from the singular values. For `ttm`, and for `tt` and `tucker` with one mode per
        side, it is the sum over all unfoldings, an upper bound (Oseledets 2011, Theorem 2.2). For other formats the weight is
        decomposed.
        """
        if option.format == WIDTH:
            return float(self._removal.lost[self.weight.shape[1] - option.ranks[0]])
        total = self.energy or 1.0
        cuts = self._cuts(option)
        if self._rows_count_alike(option):
            error = self._white - self._in_metric(self.approximated(option))
            lost = float(np.square(error, dtype=np.float64).sum())
        elif cuts is None:
            lost = float(np.square(self._white - self._decomposed(option), dtype=np.float64).sum())
        else:
            tensor = self._tensor(option)
            lost = min(total, sum(self._lost(tensor, split, rank) for split, rank in cuts))
        return lost / total

    def approximated(self, option: Option) -> np.ndarray:
        """Return the approximated weight (O, I, *K)."""
        if option.format == WIDTH:
            kept = self._removal.kept(option.ranks[0])
            narrow = np.zeros_like(self.weight)
            narrow[:, kept] = refitted(self.weight, self._moment, kept)
            return narrow
        if self._rows_count_alike(option):
            return self._alone.approximated(option)
        cuts = self._cuts(option)
        if cuts is None:
            white = self._decomposed(option)
        else:
            white = tensor = self._tensor(option)
            for split, rank in cuts:
                white = self._projected(white, tensor, split, rank)
            if option.format == "ttm":
                white = unpaired(white, self.weight.shape, option.modes)
        return white if self.moments is None else on_inputs(white, self.moments.inverse)

    def bias(self, approximated: np.ndarray) -> np.ndarray:
        """Return the vector (O,) to add to the bias, with which the mean of each output stays the same."""
        if self.moments is None:
            return np.zeros(len(self.weight))
        rows = (self.weight - approximated).reshape(len(self.weight), -1).astype(np.float64)
        return np.asarray(rows @ self.moments.mean.reshape(-1))

    def _rows_count_alike(self, option: Option) -> bool:
        """Return whether rows of a table have weights that an option cannot use, since its entries are several modes."""
        if self.moments is None or self.moments.root.ndim > 1:
            return False
        return len(format_of(option.format).equation(self.weight.shape, option.modes).inputs) > 1

    @cached_property
    def _alone(self) -> Approximations:
        """The weight without the moments."""
        return Approximations(self.weight)

    @cached_property
    def _moment(self) -> np.ndarray:
        """Second moment (I, I) of the input channels, with a floor."""
        inputs = self.weight.shape[1]
        moment = np.eye(inputs) if self.moments is None else self.moments.root @ self.moments.root
        return np.asarray(moment, np.float64)

    @cached_property
    def _removal(self) -> Removal:
        return removal(self.weight, self._moment, self.weight.shape[1] // 2)

    def _cuts(self, option: Option) -> tuple[tuple[tuple[int, ...], int], ...] | None:
        """Return the unfoldings that an option truncates, by the axes of their rows, with the ranks; None otherwise."""
        kernel = self.weight.shape[2:]
        if option.format == "svd":
            j = next(j for j in range(len(kernel) + 1) if option.modes[1] == self.weight.shape[1] * math.prod(kernel[:j]))
            return (((0, *range(2 + j, self.weight.ndim)), option.ranks[0]),)
        if option.format in ("tt", "tucker") and len(option.modes) == (3 if kernel else 2):
            ranks = option.ranks[1:-1] if option.format == "tt" else option.ranks
            return (((0,), ranks[0]), ((1,), ranks[-1])) if kernel else (((0,), ranks[0]),)
        if option.format == "ttm":
            return tuple((tuple(range(k)), rank) for k, rank in enumerate(option.ranks[1:-1], start=1))
        return None

    def _tensor(self, option: Option) -> np.ndarray:
        """Return the tensor whose unfoldings an option truncates."""
        return paired(self._white, option.modes) if option.format == "ttm" else self._white

    def _decomposed(self, option: Option) -> np.ndarray:
        form = format_of(option.format)
        try:
            cores = form.decompose(self._white, option.modes, option.ranks)
        except PlanError as error:
            raise PlanError(
                f"a form with ranks {list(option.ranks)}: {error}; or leave {option.format} out of the formats"
            ) from None
        return np.asarray(form.reconstruct(cores, self.weight.shape, option.modes), np.float32)

    def _basis(self, tensor: np.ndarray, split: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return the singular vectors (n, n) of the smaller side, the energy beyond each rank, and if it is the rows'."""
        key = (tensor.shape, split)
        if key not in self._bases:
            matrix = _unfolded(tensor, split)
            of_rows = matrix.shape[0] <= matrix.shape[1]
            gram = matrix @ matrix.T if of_rows else matrix.T @ matrix
            values, vectors = np.linalg.eigh(gram.astype(np.float64))
            beyond = np.append(np.cumsum(np.maximum(values, 0.0))[::-1], 0.0)
            self._bases[key] = (np.ascontiguousarray(vectors[:, ::-1], np.float32), beyond, of_rows)
        return self._bases[key]

    def _lost(self, tensor: np.ndarray, split: tuple[int, ...], rank: int) -> float:
        beyond = self._basis(tensor, split)[1]
        return float(beyond[min(rank, len(beyond) - 1)])

    def _projected(self, tensor: np.ndarray, weight: np.ndarray, split: tuple[int, ...], rank: int) -> np.ndarray:
        """Return a tensor whose unfolding is projected onto the first singular vectors of that of the weight."""
        vectors, _, of_rows = self._basis(weight, split)
        kept = vectors[:, :rank]
        matrix = _unfolded(tensor, split)
        matrix = kept @ (kept.T @ matrix) if of_rows else (matrix @ kept) @ kept.T
        order = _order(split, tensor.ndim)
        return np.transpose(matrix.reshape([tensor.shape[axis] for axis in order]), np.argsort(order))


class GroupedApproximations:
    """The weight of a convolution in groups, of which each group is approximated as a layer of its own.

    Args:
        weight: the dense weight W (O, I, *K), with I inputs per group.
        groups: the number of groups.
        moments: moments of the inputs of each group; None: the weight alone is approximated.

    """

    def __init__(self, weight: np.ndarray, groups: int, moments: Sequence[InputMoments] | None = None) -> None:
        own = [None] * groups if moments is None else moments
        self.parts = [Approximations(part, one) for part, one in zip(np.split(weight, groups), own, strict=True)]

    @property
    def energy(self) -> float:
        """‖W‖² in the metric of the inputs of each group."""
        return sum(part.energy for part in self.parts)

    def share(self, option: Option) -> float:
        """Return the share of ‖W‖² that an option loses, in the metric of the inputs of each group."""
        return sum(part.energy * part.share(option) for part in self.parts) / (self.energy or 1.0)

    def approximated(self, option: Option) -> np.ndarray:
        """Return the approximated weight (O, I, *K)."""
        return np.concatenate([part.approximated(option) for part in self.parts])

    def bias(self, approximated: np.ndarray) -> np.ndarray:
        """Return the vector (O,) to add to the bias, with which the mean of each output stays the same."""
        own = np.split(approximated, len(self.parts))
        return np.concatenate([part.bias(one) for part, one in zip(self.parts, own, strict=True)])


def on_inputs(weight: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return a weight (O, I, *K) with its input channels multiplied by a symmetric matrix (I, I), or by its diagonal (I,)."""
    if matrix.ndim == 1:
        return np.ascontiguousarray(weight * matrix, np.float32)
    product = np.moveaxis(np.tensordot(weight, matrix.astype(np.float32), (1, 0)), -1, 1)
    return np.ascontiguousarray(product, np.float32)


def _order(split: tuple[int, ...], axes: int) -> tuple[int, ...]:
    return (*split, *(axis for axis in range(axes) if axis not in split))


def _unfolded(tensor: np.ndarray, split: tuple[int, ...]) -> np.ndarray:
    """Return the matrix whose rows are the axes in `split`."""
    rows = math.prod(tensor.shape[axis] for axis in split)
    return np.ascontiguousarray(np.transpose(tensor, _order(split, tensor.ndim)).reshape(rows, -1), np.float32)
