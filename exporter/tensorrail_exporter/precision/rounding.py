"""Rounds weights to int8 so that the outputs of their layers change least on typical inputs.

The nearest integer is the best one for a single weight. Inputs vary together, though, and what rounding one weight changes in
the outputs can be taken back by others. So the columns of a weight are rounded one after another, those with the largest inputs
first, and the columns that follow are changed by what then makes up best for the error: Frantar et al., *GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers*, ICLR 2023 (arXiv:2210.17323). Where a layer has a bias, it
takes up the mean of what is left: Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*, ICCV
2019.

The scale of a channel follows from its largest weight, which stays as it is: ONNX Runtime's quantization then finds the same
scale, and all weights on its integers. A layer keeps the nearest integers where these change its outputs less on inputs that
were held out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper
from scipy.linalg.lapack import dtrtri

from tensorrail_exporter.calibrate.inputs import Sampler, fits, run_to
from tensorrail_exporter.precision.products import Uses, bias_of, data_of, plain_products
from tensorrail_exporter.precision.weights import Weighted
from tensorrail_exporter.rewrite.survey import DenseLayer, survey
from tensorrail_runtime.graphs.constants import constants_of
from tensorrail_runtime.sessions.session import Session

_DIGITS = 1e-6  # of the mean square of the inputs, is added at least
_DAMPING = 0.01  # of the mean square of the inputs, is added to every square, as in GPTQ
_BLOCK = 128  # columns after which those behind them are changed
HELD_OUT = 4  # one row in so many, or one batch, is for judging
_TOGETHER = 2**26  # values of the moments that are kept at once


@dataclass(frozen=True)
class Grid:
    """The integers that weights are rounded to, times a scale."""

    per_channel: bool = True
    """Whether weights have one scale per output channel."""
    steps: int = 127
    """The largest integer: 127, or 64 with 7 bits."""

    def scale(self, values: np.ndarray, axis: int | None) -> np.ndarray:
        """Return the scales of weights, in a shape by which these can be divided.

        Args:
            values: the weights.
            axis: that of the output channels; None for one scale in all.

        """
        others = None if axis is None or not self.per_channel else tuple(k for k in range(values.ndim) if k != axis)
        scale = np.abs(values).max(others, keepdims=True) / self.steps
        return np.asarray(np.where(scale == 0, 1.0, scale))

    def error(self, values: np.ndarray, axis: int | None) -> np.ndarray:
        """Return what rounding to the nearest integers adds to weights; the arguments are those of `scale`."""
        scale = self.scale(values, axis)
        return np.asarray(np.round(values / scale) * scale - values)


class _Moments:
    """Sums over the rows of a layer's input, (rows, width), about the mean of the first rows."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._shift = np.zeros(width)
        self._products = np.zeros((width, width))
        self._total = np.zeros(width)

    def add(self, rows: np.ndarray) -> None:
        """Add rows."""
        if not self.count and len(rows):
            self._shift = rows.mean(0, dtype=np.float64)
        moved = (rows - self._shift).astype(np.float32)
        self.count += len(rows)
        self._products += moved.T @ moved
        self._total += moved.sum(0, dtype=np.float64)

    @property
    def mean(self) -> np.ndarray:
        """The mean row."""
        return np.asarray(self._shift + self._total / max(1, self.count))

    def squares(self, about: np.ndarray | None = None) -> np.ndarray:
        """Return E (x − a)(x − a)ᵀ about a row a; default: zero."""
        away = (0.0 if about is None else about) - self._shift
        cross = np.outer(self._total / max(1, self.count), away)
        return np.asarray(self._products / max(1, self.count) - cross - cross.T + np.outer(away, away))


def rounded(
    model: onnx.ModelProto,
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    grid: Grid | None = None,
    skip: frozenset[str] = frozenset(),
) -> dict[str, dict[str, np.ndarray]]:
    """Return weights on the integers, with which the outputs of single layers change least.

    Args:
        model: the fp32 graph; it is not changed. Its nodes all have names of their own.
        feeds: typical inputs by name, batch by batch.
        grid: the integers; default `Grid()`.
        skip: names of nodes that are not rounded.

    Returns:
        For the name of each node that is changed, its weight and bias by the names of their tensors. Where the nearest integers
        are as good, the weight stays as it is, and only the bias makes up for their mean error. Convolutions in groups, and
        products with factors of their own (Gemm with `alpha` or `beta`), are left out.

    Raises:
        ModelError: the model cannot run on the inputs.

    """
    grid = grid or Grid()
    constants = constants_of(model.graph)
    found: dict[str, dict[str, np.ndarray]] = {}
    for together in _groups(_layers(model, feeds, skip)):
        moments = _measured(model, together, feeds)
        for (product, _), (fitted, held_out) in zip(together, moments, strict=True):
            bias = bias_of(product)
            values = _best(product, fitted, held_out, grid, biased=bool(bias))
            tensors = {} if values is None else {product.weight: values}
            if bias and fitted.count:
                nearest = product.values + grid.error(product.values, product.axis)
                change = _rows(product, (nearest if values is None else values) - product.values) @ fitted.mean
                old = numpy_helper.to_array(constants[bias])
                tensors[bias] = (old - change.reshape(old.shape)).astype(np.float32)
            if tensors:
                found[product.node.name] = tensors
    return found


def _layers(
    model: onnx.ModelProto, feeds: Sequence[Mapping[str, np.ndarray]], skip: frozenset[str]
) -> list[tuple[Weighted, DenseLayer]]:
    """Return the products with a matrix on their right, or a kernel, whose inputs can be laid out in rows."""
    if not feeds:
        return []
    shapes = {name: tuple(array.shape) for name, array in feeds[0].items()}
    known = {
        layer.output_names[0]: layer
        for layer in survey(model, shapes=shapes)
        if layer.nodes == 1 and layer.spec.groups == 1 and fits(layer.spec)
    }
    products = plain_products(model, Uses.of(model)).values()
    return [
        (one, known[one.node.output[0]])
        for one in products
        if one.place == 1 and one.node.name not in skip and one.node.output[0] in known and not _has_factors(one.node)
    ]


def _has_factors(node: onnx.NodeProto) -> bool:
    """Return whether a Gemm multiplies its product or its bias by a number."""
    return any(one.name in ("alpha", "beta") and one.f != 1 for one in node.attribute)


def _groups(layers: Sequence[tuple[Weighted, DenseLayer]]) -> Iterator[list[tuple[Weighted, DenseLayer]]]:
    """Yield layers whose moments fit into memory together."""
    group: list[tuple[Weighted, DenseLayer]] = []
    size = 0
    for one in layers:
        own = 4 * _rows(one[0], one[0].values).shape[1] ** 2
        if group and size + own > _TOGETHER:
            yield group
            group, size = [], 0
        group.append(one)
        size += own
    if group:
        yield group


def _measured(
    model: onnx.ModelProto, layers: Sequence[tuple[Weighted, DenseLayer]], feeds: Sequence[Mapping[str, np.ndarray]]
) -> list[tuple[_Moments, _Moments]]:
    """Return the moments of the inputs of each layer: of those that weights are rounded by, and of those held out."""
    names = list(dict.fromkeys(data_of(product) for product, _ in layers))
    run = run_to(model, names, Session())
    samplers: list[Sampler] = []
    widths = [_rows(product, product.values).shape[1] for product, _ in layers]
    found = [(_Moments(width), _Moments(width)) for width in widths]
    for batch, feed in enumerate(feeds):
        values = dict(zip(names, run(feed), strict=True))
        samplers = samplers or [Sampler(layer, [len(values[data_of(one)])] * len(feeds)) for one, layer in layers]
        for (product, _), sampler, (fitted, held_out) in zip(layers, samplers, found, strict=True):
            rows = sampler.rows(values[data_of(product)], batch)
            if len(feeds) >= HELD_OUT:
                (held_out if batch % HELD_OUT == HELD_OUT - 1 else fitted).add(rows)
            else:
                aside = len(rows) // HELD_OUT
                fitted.add(rows[: len(rows) - aside])
                held_out.add(rows[len(rows) - aside :])
    return found


def _best(product: Weighted, fitted: _Moments, held_out: _Moments, grid: Grid, *, biased: bool) -> np.ndarray | None:
    """Return the weight on the integers, or None where the nearest ones change outputs less on the rows held out."""
    if not fitted.count or not held_out.count:
        return None
    weight = _rows(product, product.values).astype(np.float64)
    scale = grid.scale(weight, 0)
    centre = fitted.mean if biased else None
    # Moments about a mean are differences of larger numbers, of which float32 has seven digits.
    least = _DIGITS * float(np.trace(fitted.squares())) / len(fitted.mean)
    by_outputs = _one_by_one(weight, fitted.squares(centre), scale, grid.steps, least)
    if by_outputs is None:
        return None
    squares = held_out.squares(centre)
    errors = [float(np.sum((change @ squares) * change)) for change in (by_outputs - weight, grid.error(weight, 0))]
    if not errors[0] < errors[1]:
        return None
    return _weight(product, by_outputs)


def _one_by_one(
    weight: np.ndarray, squares: np.ndarray, scale: np.ndarray, steps: int, least: float = 0.0
) -> np.ndarray | None:
    """Return a weight (outputs, width) on the integers −steps to steps times its scales; None for moments that are noise.

    Args:
        weight: the weight.
        squares: the second moment of the inputs, (width, width).
        scale: the scale of each output, (outputs, 1), or one in all, (1, 1).
        steps: the largest integer.
        least: what is added to all squares at least.

    """
    width = len(squares)
    order = np.argsort(-np.diag(squares), kind="stable")
    damping = max(_DAMPING * float(np.trace(squares)) / width, least, 1e-30)
    damped = squares[np.ix_(order, order)] + damping * np.eye(width)
    try:
        factor = _inverse_factor(damped)
    except np.linalg.LinAlgError:
        return None
    before = weight[:, order]
    fixed = _largest(before, one_scale=len(scale) == 1)
    left, out = before.copy(), np.empty_like(before)
    scales = np.broadcast_to(scale[:, 0], len(left))
    for begin in range(0, width, _BLOCK):
        end = min(begin + _BLOCK, width)
        errors = np.empty((len(left), end - begin))
        for column in range(begin, end):
            values = np.clip(np.round(left[:, column] / scales), -steps, steps) * scales
            values = np.where(fixed[:, column], before[:, column], values)
            out[:, column] = values
            error = (left[:, column] - values) / factor[column, column]
            left[:, column + 1 : end] -= np.outer(error, factor[column, column + 1 : end])
            errors[:, column - begin] = error
        left[:, end:] -= errors @ factor[begin:end, end:]
    found = np.empty_like(out)
    found[:, order] = out
    return found


def _inverse_factor(matrix: np.ndarray) -> np.ndarray:
    """Return the upper triangular U with UᵀU = M⁻¹, of a symmetric positive matrix M."""
    flipped = np.linalg.cholesky(matrix[::-1, ::-1])
    inverse, _ = dtrtri(np.asfortranarray(flipped[::-1, ::-1]), lower=0)
    return np.asarray(inverse)


def _largest(weight: np.ndarray, *, one_scale: bool) -> np.ndarray:
    """Return where the largest weight of each output stands, or that of all outputs: it makes the scale."""
    sizes = np.abs(weight)
    found = np.zeros(weight.shape, bool)
    if one_scale:
        found[np.unravel_index(sizes.argmax(), sizes.shape)] = True
    else:
        found[np.arange(len(weight)), sizes.argmax(1)] = True
    return found


def _rows(product: Weighted, values: np.ndarray) -> np.ndarray:
    """Return a weight as (outputs, width)."""
    moved = np.moveaxis(values, product.axis, 0)
    return moved.reshape(len(moved), -1)


def _weight(product: Weighted, rows: np.ndarray) -> np.ndarray:
    """Return (outputs, width) in the shape of the product's weight."""
    moved = np.moveaxis(product.values, product.axis, 0)
    return np.ascontiguousarray(np.moveaxis(rows.reshape(moved.shape), 0, product.axis), np.float32)
