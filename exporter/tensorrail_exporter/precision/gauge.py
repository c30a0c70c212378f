"""Chooses the basis between two layers so that rounding to int8 loses least.

Where nothing but linear operators stands between two layers A and B, any invertible matrix G may be put between them with its
inverse, (B G⁻¹)(G A) = B A: the network computes the same, in the same time. Rounding does not. The tensor between has one
scale for all of its channels, so a channel that varies little is rounded as coarsely as the one that varies most, and its error
is multiplied by the columns of B. Let C be the second moment of the tensor, and M = BᵀB. The noise at the output of B is in
proportion to range² · tr(G⁻ᵀ M G⁻¹), and range² to tr(G C Gᵀ) once a rotation has spread the variance over all channels. The
product of both traces is least for

    P = GᵀG = C^(−1/2) (C^(1/2) M C^(1/2))^(1/2) C^(−1/2),

where it is the square of the sum of the singular values of B C^(1/2); without G it is tr(C) tr(M). Across a Relu, which
commutes with positive scales alone, G is diagonal: Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias
Correction*, ICCV 2019; Xiao et al., *SmoothQuant*, ICML 2023. Rotations before rounding are those of Ashkboos et al.,
*QuaRot*, NeurIPS 2024. Between the two factors of an SVD, rotations and a power of the singular values are in *QSVD: Efficient
Low-Rank Approximation for Unified Query-Key-Value Weight Compression in Low-Precision Vision-Language Models*
(github.com/SAI-Lab-NYU/QSVD). For the cores of tensor trains, rings and other chains, nothing was found in a search of public
code and pages in November 2026, which is no proof that there is nothing.

Which of several matrices is best is decided by the rounding itself, on samples of the tensor that none was computed from, with
the ranges of all values that were seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper
from scipy.linalg import hadamard

from tensorrail_exporter.calibrate.inputs import run_to
from tensorrail_exporter.precision.products import (
    Uses,
    bias_of,
    data_of,
    groups_of,
    plain_products,
    scale_axis,
    write_tensor,
)
from tensorrail_exporter.precision.rounding import Grid
from tensorrail_exporter.precision.weights import Weighted
from tensorrail_runtime.graphs.constants import constants_of
from tensorrail_runtime.sessions.session import Session

Feeds = Sequence[Mapping[str, np.ndarray]]

_LINEAR = ("AveragePool", "GlobalAveragePool", "Identity")  # of each channel alone: channels may be mixed before or behind them
_SCALES = ("LeakyRelu", "MaxPool", "Relu")  # commute with positive scales of the channels
_SAMPLES = 2048  # of each tensor
_REGULAR = 1e-3  # of the mean eigenvalue, is added to moments: what varies less is left as it is
_POWERS = (0.5, 0.75, 1.0)  # of the ranges of channels by which these are divided
_WEAKEST = 1e-2  # of the range of the widest channel: narrower ones are scaled as if they were so wide
_WIDEST = 2048  # channels that are mixed at most; more are scaled
_GAIN = 0.98  # of the error of the present basis: a new one must be below
_ACTIVATION_STEPS = 255


@dataclass(frozen=True)
class Bond:
    """An index that one layer writes and another one reads: all channels of the tensor between, or a part of their index.

    A Reshape between two layers may divide an axis, as between the cores of a TTM: of the channels (o, r) that the first layer
    writes and (r, i) that the second one reads, r is the bond.

    Attributes:
        before: the layer that writes it.
        after: the layer that reads it.
        tensor: name of the tensor as the second layer reads it.
        mixes: whether its values may be mixed; otherwise they may be scaled.
        written: sizes (outside, bond, inside) of the axis of channels that the first layer writes.
        read: the same of the axis that the second layer reads.

    """

    before: Weighted
    after: Weighted
    tensor: str
    mixes: bool
    written: tuple[int, int, int]
    read: tuple[int, int, int]

    @property
    def size(self) -> int:
        """The number of its values."""
        return self.written[1]


def bonds(model: onnx.ModelProto, feeds: Feeds) -> tuple[Bond, ...]:
    """Return the indices between two layers that may be mixed or scaled, in the order of the graph.

    Args:
        model: a graph whose nodes all have names of their own.
        feeds: inputs by name, on which the graph runs to find the shapes of tensors, once for each kind of shapes.

    Raises:
        ModelError: the model cannot run on the inputs.

    """
    chains = list(_chains(model))
    names = list(dict.fromkeys(name for before, after, *_ in chains for name in (before.node.output[0], data_of(after))))
    if not names:
        return ()
    run = run_to(model, names, Session())
    kept: list[Bond | None] | None = None
    for feed in {str([(name, array.shape) for name, array in feed.items()]): feed for feed in feeds}.values():
        shapes = {name: values.shape for name, values in zip(names, run(feed), strict=True)}
        found = [_bond(*chain, shapes) for chain in chains]
        # What is one index for some shapes and another one for others is none.
        kept = found if kept is None else [a if _alike(a, b) else None for a, b in zip(kept, found, strict=True)]
    return tuple(bond for bond in kept or () if bond is not None)


def _alike(first: Bond | None, second: Bond | None) -> bool:
    if first is None or second is None:
        return False
    return (first.written, first.read) == (second.written, second.read)


def _chains(model: onnx.ModelProto) -> Iterator[tuple[Weighted, Weighted, tuple[str, ...]]]:
    """Yield pairs of layers between which all operators commute with positive scales of the channels, and these operators.

    A Reshape is taken where all axes of the model's inputs but the first are fixed: otherwise it may divide an axis in another
    place for another shape.
    """
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    axes = [axis for value in graph.input if value.name not in stored for axis in value.type.tensor_type.shape.dim[1:]]
    fixed = all(axis.HasField("dim_value") for axis in axes)
    allowed = (*_LINEAR, *_SCALES, *(("Reshape",) if fixed else ()))
    uses = Uses.of(model)
    layers = plain_products(model, uses)
    for before in layers.values():
        name = before.node.output[0]
        passed: list[str] = []
        while uses.once(name):
            (reader,) = uses.readers[name]
            after = layers.get(reader.name)
            if after is not None:
                if data_of(after) == name:
                    yield before, after, tuple(passed)
                break
            passed.append(reader.op_type)
            if reader.op_type not in allowed or reader.input[0] != name or len([one for one in reader.output if one]) != 1:
                break
            name = reader.output[0]


def gauged(
    model: onnx.ModelProto, feeds: Feeds, *, grid: Grid | None = None, skip: frozenset[str] = frozenset()
) -> onnx.ModelProto:
    """Return a model with other weights that computes the same in fp32, and loses less when it is rounded to int8.

    Args:
        model: the fp32 graph; it is not changed. Its nodes all have names of their own.
        feeds: typical inputs by name, batch by batch, one at least.
        grid: the integers that weights will be rounded to; default `Grid()`.
        skip: names of nodes that will not be rounded: what they read stays as it is.

    Returns:
        A copy, or the model itself where nothing can be changed.

    Raises:
        ModelError: the model cannot run on the inputs.

    """
    found = [bond for bond in bonds(model, feeds) if bond.after.node.name not in skip]
    if not found:
        return model
    grid = grid or Grid()
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = _Weights(copy)
    samples, squares = _sampled(model, found, feeds)
    changed = False
    for bond in found:
        seen = samples.pop(bond.tensor)
        problem = _Problem(bond, seen, squares[data_of(bond.before)], grid)
        matrix = problem.best(weights.of(bond.before), weights.of(bond.after))
        if matrix is not None:
            changed = True
            weights.change(bond, matrix)
            squares[bond.tensor] = float(np.mean(np.square(_applied(matrix, seen.rows.astype(np.float64)))))
    weights.store()
    return copy if changed else model


@dataclass
class _Seen:
    """Samples of the tensor of a bond, (n, bond), and the rows in which a value is the largest or the smallest of all."""

    rows: np.ndarray
    extremes: np.ndarray


class _Problem:
    """One bond, with samples of its tensor. Matrices are computed from one half of them and judged on the other."""

    def __init__(self, bond: Bond, seen: _Seen, square: float, grid: Grid) -> None:
        self.bond, self.grid = bond, grid
        rows = seen.rows.astype(np.float64)
        self.rows, self.others = (rows[::2], rows[1::2]) if len(rows) > 1 else (rows, rows)
        self.extremes = seen.extremes.astype(np.float64)
        self.square = square  # the mean square of the first layer's inputs
        self.moment = self.rows.T @ self.rows / len(self.rows)

    def best(self, before: np.ndarray, after: np.ndarray) -> np.ndarray | None:
        """Return the best scales (bond) or matrix (bond, bond) for the present weights; None if none is better than none.

        Args:
            before: weight of the first layer.
            after: weight of the second layer.

        """
        least, found = _GAIN * self.error(np.ones(self.bond.size), before, after), None
        for matrix in self._candidates(after):
            error = self.error(matrix, before, after)
            if error < least:
                least, found = error, matrix
        return found

    def error(self, matrix: np.ndarray, before: np.ndarray, after: np.ndarray) -> float:
        """Return the mean square that rounding adds to the outputs of the second layer.

        Errors are taken as independent of each other and, for the first layer, of its inputs.
        """
        changed, ends = _applied(matrix, self.others), _applied(matrix, self.extremes)
        low, high = min(float(ends.min()), 0.0), max(float(ends.max()), 0.0)
        step = (high - low) / _ACTIVATION_STEPS
        first, second = _changed_before(self.bond, before, matrix), _changed_after(self.bond, after, matrix)
        energies = np.square(_columns(self.bond, second)).sum(0)
        noise = float(np.mean(np.square(np.round(changed / step) * step - changed))) * float(energies.sum()) if step else 0.0
        wrong = self.grid.error(first, scale_axis(self.bond.before))
        rows = np.square(np.moveaxis(wrong, self.bond.before.axis, 0)).reshape(*self.bond.written, -1).mean((0, 2)).sum(-1)
        lost = _columns(self.bond, self.grid.error(second, scale_axis(self.bond.after)))
        if self.bond.mixes:
            rounded = float(np.sum((lost @ (changed.T @ changed / len(changed))) * lost))
        else:
            rounded = float(np.sum(np.square(lost) @ np.square(changed).mean(0)))
        return noise + self.square * float(rows @ energies) + rounded

    def _candidates(self, after: np.ndarray) -> Iterator[np.ndarray]:
        ranges = np.abs(self.extremes).max(0)
        ranges = np.maximum(ranges, _WEAKEST * max(float(ranges.max()), 1e-30))
        for power in _POWERS:
            yield (ranges / ranges.max()) ** -power
        if not self.bond.mixes or self.bond.size > _WIDEST:
            return
        columns = _columns(self.bond, after)
        least = _least_product(self.moment, columns.T @ columns)
        for basis in (np.eye(self.bond.size), least):
            values, vectors = np.linalg.eigh(basis @ self.moment @ basis.T)
            turned = vectors.T[np.argsort(values)[::-1]] @ basis
            yield turned
            for rotation in _rotations(self.bond.size):
                yield rotation @ turned


def _applied(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return rows (n, bond) that were scaled by a vector, or mixed by a matrix."""
    return rows * matrix if matrix.ndim == 1 else np.asarray(rows @ matrix.T)


def _least_product(moment: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return G for the least product tr(G C Gᵀ) · tr(G⁻ᵀ M G⁻¹) of two moments (channels, channels)."""
    first, second = (one + _REGULAR * max(np.trace(one) / len(one), 1e-30) * np.eye(len(one)) for one in (moment, columns))
    root = _power(first, 0.5)
    inverse = _power(first, -0.5)
    best = _power(inverse @ _power(root @ second @ root, 0.5) @ inverse, 0.5)
    return np.asarray(best / np.linalg.norm(best) * np.sqrt(len(best)))


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """Return a power of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    values = np.maximum(values, 1e-12 * max(float(values[-1]), 1e-30))
    return np.asarray((vectors * values**exponent) @ vectors.T)


def _rotations(size: int) -> Iterator[np.ndarray]:
    """Yield rotations that spread each channel over all: a Hadamard matrix times a small one, and one at random."""
    small = size
    while small % 2 == 0:
        small //= 2
    rng = np.random.default_rng(0)
    yield np.kron(hadamard(size // small) / np.sqrt(size // small), _orthogonal(rng, small))
    yield _orthogonal(rng, size)


def _orthogonal(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.asarray(np.linalg.qr(rng.standard_normal((size, size)))[0]) if size > 1 else np.eye(1)


class _Weights:
    """The weights and biases of a model that are being changed."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.tensors = constants_of(model.graph)
        self.values: dict[str, tuple[str, np.ndarray]] = {}  # by node: the name of the weight and its values
        self.biases: dict[str, np.ndarray] = {}

    def of(self, layer: Weighted) -> np.ndarray:
        """Return the present weight of a layer in double precision."""
        if layer.node.name not in self.values:
            self.values[layer.node.name] = layer.weight, layer.values.astype(np.float64)
        return self.values[layer.node.name][1]

    def change(self, bond: Bond, matrix: np.ndarray) -> None:
        """Put scales or a matrix behind the first layer, and their inverse before the second one."""
        before, after = bond.before, bond.after
        self.values[before.node.name] = before.weight, _changed_before(bond, self.of(before), matrix)
        self.values[after.node.name] = after.weight, _changed_after(bond, self.of(after), matrix)
        if bias := bias_of(before):
            stored = self.biases.get(bias, numpy_helper.to_array(self.tensors[bias]).astype(np.float64))
            self.biases[bias] = _written(bond, stored.reshape(-1, 1), matrix).reshape(stored.shape)

    def store(self) -> None:
        """Write all values to the model."""
        for name, values in (*self.values.values(), *self.biases.items()):
            write_tensor(self.tensors[name], values)


def _bond(before: Weighted, after: Weighted, between: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> Bond | None:
    """Return the bond between two layers; None where they share no index."""
    tensor = data_of(after)
    first, second = shapes[before.node.output[0]], shapes[tensor]
    axes = [
        axis if axis >= 0 else axis + len(s) for axis, s in ((_channel_axis(before), first), (_channel_axis(after), second))
    ]
    if min(axes) < 0:
        return None
    mixes = groups_of(before) == groups_of(after) == 1 and not any(op in _SCALES for op in between)
    if any("Pool" in op for op in between):  # a pool keeps axis 1 and changes those behind it
        if "Reshape" in between or axes != [1, 1] or first[1] != second[1]:
            return None
        whole = (1, first[1], 1)
        return Bond(before, after, tensor, mixes, whole, whole) if first[1] > 1 else None
    low_in, high_in = _strides(first, axes[0])
    low_out, high_out = _strides(second, axes[1])
    low, high = max(low_in, low_out), min(high_in, high_out)
    if high <= low or any((high % low, low % low_in, low % low_out, high_in % high, high_out % high)):
        return None
    written, read = ((end // high, high // low, low // start) for start, end in ((low_in, high_in), (low_out, high_out)))
    if (groups_of(before) > 1 and written[::2] != (1, 1)) or (groups_of(after) > 1 and read[::2] != (1, 1)):
        return None
    return Bond(before, after, tensor, mixes, written, read)


def _strides(shape: Sequence[int], axis: int) -> tuple[int, int]:
    """Return how far apart two neighbours along an axis are in memory, and how far the axis reaches."""
    step = int(np.prod(shape[axis + 1 :]))
    return step, step * shape[axis]


def _changed_before(bond: Bond, weight: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the weight of the first layer with scales or a matrix behind it."""
    moved = np.moveaxis(weight, bond.before.axis, 0)
    changed = _written(bond, moved.reshape(len(moved), -1), matrix)
    return np.moveaxis(changed.reshape(moved.shape), 0, bond.before.axis)


def _written(bond: Bond, rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return rows (channels, …) of the first layer, scaled or mixed along the bond."""
    parts = rows.reshape(*bond.written, -1)
    if matrix.ndim == 1:
        return np.asarray(parts * matrix[:, None, None])
    return np.asarray(np.einsum("rs,asbx->arbx", matrix, parts, optimize=True))


def _changed_after(bond: Bond, weight: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the weight of the second layer with the inverse of scales or of a matrix before it."""
    if groups_of(bond.after) > 1:
        return np.asarray(weight / _by_group(bond, matrix, weight))
    moved = np.moveaxis(weight, _input_axis(bond.after), -1)
    parts = moved.reshape(-1, *bond.read)
    if matrix.ndim == 1:
        changed = parts / matrix[:, None]
    else:
        changed = np.einsum("xcsd,sr->xcrd", parts, np.linalg.inv(matrix), optimize=True)
    return np.moveaxis(changed.reshape(moved.shape), -1, _input_axis(bond.after))


def _columns(bond: Bond, weight: np.ndarray) -> np.ndarray:
    """Return the weight of the second layer as (…, bond)."""
    groups = groups_of(bond.after)
    if groups == 1:
        moved = np.moveaxis(weight, _input_axis(bond.after), -1)
        return np.moveaxis(moved.reshape(-1, *bond.read), 2, -1).reshape(-1, bond.size)
    # Of each channel only the energy counts, so that the rows of all groups may stand beside each other.
    outputs, inputs = weight.shape[:2]
    parts = weight.reshape(groups, outputs // groups, inputs, -1)
    return parts.transpose(1, 3, 0, 2).reshape(-1, groups * inputs)


def _by_group(bond: Bond, scales: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return scales of the bond in the shape in which they multiply the weight of a convolution in groups."""
    groups, (outputs, inputs) = groups_of(bond.after), weight.shape[:2]
    by_output = np.repeat(scales.reshape(groups, inputs), outputs // groups, axis=0)
    return by_output.reshape(outputs, inputs, *([1] * (weight.ndim - 2)))


def _input_axis(layer: Weighted) -> int:
    return 1 if layer.node.op_type == "Conv" else 1 - layer.axis


def _sampled(model: onnx.ModelProto, found: Sequence[Bond], feeds: Feeds) -> tuple[dict[str, _Seen], dict[str, float]]:
    """Return samples of the tensor of each bond, and the mean squares of the inputs of first layers."""
    inputs = [data_of(bond.before) for bond in found]
    names = list(dict.fromkeys([*(bond.tensor for bond in found), *inputs]))
    read = {bond.tensor: bond for bond in found}
    run = run_to(model, names, Session())
    rng = np.random.default_rng(0)
    share = -(-_SAMPLES // len(feeds))
    samples: dict[str, list[np.ndarray]] = {name: [] for name in read}
    extremes: dict[str, np.ndarray] = {}
    squares: dict[str, list[float]] = {name: [] for name in inputs}
    for feed in feeds:
        for name, values in zip(names, run(feed), strict=True):
            if name in read and values.size:
                moved = np.moveaxis(values, _channel_axis(read[name].after), -1)
                rows = np.moveaxis(moved.reshape(-1, *read[name].read), 2, -1).reshape(-1, read[name].size)
                samples[name].append(rows[rng.choice(len(rows), min(share, len(rows)), replace=False)])
                ends = rows[np.unique(np.concatenate([rows.argmax(0), rows.argmin(0)]))]
                known = ends if name not in extremes else np.concatenate([extremes[name], ends])
                extremes[name] = known[np.unique(np.concatenate([known.argmax(0), known.argmin(0)]))]
            if name in squares and values.size:
                squares[name].append(float(np.mean(np.square(values, dtype=np.float64))))
    seen = {name: _Seen(np.concatenate(parts), extremes[name]) for name, parts in samples.items()}
    return seen, {name: float(np.mean(values)) for name, values in squares.items()}


def _channel_axis(layer: Weighted) -> int:
    """Return the axis of the channels in what a layer reads, and in what it writes."""
    if layer.node.op_type == "Conv":
        return 1
    return -1 if layer.place else -2
