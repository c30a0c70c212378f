"""Calibration inputs, and their statistics at every layer: patches, second moments, and the outputs of the dense layer.

Inputs are read from an npz file with one array per input and, optionally, `labels`, or from a folder of npy files, npz files
or images. Labels are never required.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from tensorrail_exporter.calibrate.metric import Moments
from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.graphs.parts import Network
from tensorrail_exporter.rewrite.survey import DenseLayer
from tensorrail_runtime.errors import GraphError, ModelError
from tensorrail_runtime.feeds.batches import class_column, samples_of
from tensorrail_runtime.feeds.loading import load_batches
from tensorrail_runtime.feeds.pictures import Preprocessing as Preprocessing
from tensorrail_runtime.feeds.rules import Axes, InputRules
from tensorrail_runtime.feeds.sources import Source
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import Session, open_session
from tensorrail_runtime.sessions.session import run as run_session

Feeds = Sequence[Mapping[str, np.ndarray]]

BATCH = 4  # samples that run at once, where the model takes any number: more are hardly faster, and take more memory

_ROWS = 12  # sampled rows per value of a patch: enough for a second moment that can be inverted
_LEAST = 20_000  # sampled rows at least
_ROUNDING = 2e-7  # share of the trace: the rounding of a moment in single precision
_ALIKE = 1e-5  # share of the mean square: single precision cannot represent a smaller variance
_SHRUNK = 0.01  # moments that are shrunk this much can be inverted in single precision
_WIDE = 1024  # values in a patch from which errors are computed in single precision
_BLOCK = 256  # rows of a matrix that are mirrored at once
_WIDEST = 6144  # values in the largest patch whose second moment (150 MB) is computed in full


@dataclass(frozen=True)
class Calibration:
    """Calibration data.

    Attributes:
        feeds: batches of inputs, each an array per input name.
        labels: class indices (N,) of all samples, or whatever a metric takes, (N, …); or None.
        batch: the batch size of the model if it is fixed, else None.
        axes: the batch axis of each input by name: 0 for an input that is not listed, None for one that all samples share.
        whole: whether feeds cannot be divided into samples, since they differ in shape; default False.
        sequences: for models with states, the number of the sequence (N,) that each sample is a step of; default None: samples
            have nothing to do with each other.

    """

    feeds: tuple[Mapping[str, np.ndarray], ...]
    labels: np.ndarray | None = None
    batch: int | None = None
    axes: Axes = field(default_factory=dict)
    whole: bool = False
    sequences: np.ndarray | None = None

    @property
    def samples(self) -> list[int]:
        """Number of samples in each feed."""
        return [samples_of(feed, self.axes) for feed in self.feeds]

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(self.samples)

    def first(self, count: int) -> Calibration:
        """Return the first batches that together contain at least `count` samples, or all of them."""
        kept, seen = 0, 0
        for size in self.samples:
            if seen >= count:
                break
            kept += 1
            seen += size
        labels, sequences = (None if own is None else own[:seen] for own in (self.labels, self.sequences))
        return replace(self, feeds=self.feeds[:kept], labels=labels, sequences=sequences)


def load_calibration(
    source: Source,
    model: Path | str,
    *,
    most: int = 512,
    images: Preprocessing | None = None,
    rules: InputRules | None = None,
    classes: bool = True,
) -> Calibration:
    """Read calibration inputs from an npz file, a folder or arrays in memory.

    Args:
        source: an npz file with an array (N, …) per input and optionally `labels` (N,); a folder of npy or npz files or of
            images; or such arrays by name. The name of the array does not matter if one input needs values.
        model: the ONNX file, for the names, types and shapes of its inputs.
        most: largest number of samples, which are spread evenly over the data; default 512.
        images: preprocessing of images; default that of ImageNet models.
        rules: inputs that are constants or states, or whose samples are not along the first axis; default: none.
        classes: whether labels must be class indices; default True. For a metric they may be any array (N, …).

    Returns:
        The inputs in batches of the size that the model takes, with the types of its inputs.

    Raises:
        ModelError: the data cannot be read, do not fit the model's inputs, are empty or identical in all samples, or contain
            NaN or infinite values; or the labels are not class indices from 0, one per sample.

    """
    where = source if isinstance(source, Path | str) else "calibration"
    session = open_session(model)
    if not session.get_inputs():
        raise ModelError(f"{model}: the model takes no input, so there is nothing to calibrate with data")
    batches = load_batches(source, session, rules, batch=BATCH, most=most, images=images)
    labels = class_column(batches.labels) if classes and batches.labels is not None else batches.labels
    found = Calibration(batches.feeds, labels, batches.fixed, batches.axes, batches.whole, batches.sequences)
    if found.count > 1 and _all_alike(found):
        raise ModelError(
            f"{where}: all {found.count} samples are identical, so nothing can be fitted to them; expected typical inputs"
        )
    if classes:
        _check_classes(found.labels, where)
    return found


def _check_classes(labels: np.ndarray | None, where: object) -> None:
    """Raise `ModelError` for labels that are not class indices."""
    if labels is not None and (labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer)):
        raise ModelError(
            f"{where}: expected integer labels, one per sample, got {labels.dtype} of shape {labels.shape}; "
            "give a metric that takes such labels, or leave them out"
        )
    if labels is not None and (labels < 0).any():
        raise ModelError(f"{where}: expected class indices from 0 as labels, got {labels.min()}")


def _all_alike(calibration: Calibration) -> bool:
    """Return whether all samples have the same values."""
    first = calibration.feeds[0]
    for feed in calibration.feeds:
        for name, array in feed.items():
            axis = calibration.axes.get(name, 0) if array.ndim else None
            one = first[name] if axis is None else first[name].take([0], axis)
            if one.ndim != array.ndim or any(a not in (1, b) for a, b in zip(one.shape, array.shape, strict=True)):
                return False
            if not (array == one).all():
                return False
    return True


def run_to(
    model: onnx.ModelProto, tensors: Sequence[str], settings: Session
) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    """Return a function that computes some tensors of a graph and runs no more of it than they need.

    Args:
        model: the model.
        tensors: names of inputs or inner tensors.
        settings: settings of the ONNX Runtime session.

    Returns:
        A function from inputs by name to the values of the tensors, in order. It raises `ModelError` for inputs that do not
        fit the model.

    Raises:
        GraphError: a tensor is not in the graph.

    """
    network = Network(model)
    unknown = [name for name in tensors if not network.knows(name)]
    if unknown:
        raise GraphError(f"tensor {unknown[0]!r} is not in the graph: expected the input or output of one of its nodes")
    outputs = [name for name in dict.fromkeys(tensors) if name not in network.inputs]
    if not outputs:
        return lambda feed: [feed[name] for name in tensors]
    part = network.part(network.above(outputs), list(network.inputs.values()), outputs)
    with scratch() as folder:
        save_model(part, Path(folder) / "part.onnx")
        session = open_session(Path(folder) / "part.onnx", settings=replace(settings, linger=False))
    names = [entry.name for entry in session.get_inputs()]

    def run(feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        values = run_session(session, {name: feed[name] for name in names if name in feed})
        return [values[name] if name in values else feed[name] for name in tensors]

    return run


def rows_wanted(spec: LayerSpec) -> int:
    """Return the largest number of rows from which the moments of a layer are computed."""
    return max(_LEAST, _ROWS * math.prod(spec.shape[1:]))


def fits(spec: LayerSpec) -> bool:
    """Return whether the layer has patches whose second moment is computed in full.

    Transposed convolutions have none, and the states that a recurrent weight multiplies are inside its node.
    """
    return not (spec.transposed or spec.gathers or spec.state_products) and math.prod(spec.shape[1:]) <= _WIDEST


class Sampler:
    """Samples rows of a layer's input; the same positions for every call with the same batch, whatever the network."""

    def __init__(self, layer: DenseLayer, samples: Sequence[int], nodes: int = 1, seed: int = 0) -> None:
        """Prepare to sample.

        Args:
            layer: the layer.
            samples: the number of samples in each batch.
            nodes: how many nodes share the rows that are wanted; default 1.
            seed: seed of the positions; default 0.

        """
        self.layer, self.samples, self.seed = layer, samples, seed
        self.each = max(1, -(-rows_wanted(layer.spec) // max(1, nodes * sum(samples))))

    def rows(self, data: np.ndarray, batch: int) -> np.ndarray:
        """Return patches (N, I·K) of a convolution's input (B, I, *S), or rows (N, I) of any other layer's input.

        In a convolution in groups, I counts the channels of all groups: those of the first group come first.

        `batch` is the index of the batch, which determines the positions.
        """
        spec = self.layer.spec
        rng = np.random.default_rng((self.seed, batch))
        if spec.op != "conv":
            columns = self.layer.data == 1 if self.layer.op == "MatMul" else bool(self.layer.attrs.get("transA", 0))
            if columns:
                data = np.swapaxes(data, -1, -2)
            flat = data.reshape(-1, spec.shape[1])
            count = min(len(flat), self.each * self.samples[batch])
            return np.ascontiguousarray(flat[np.sort(rng.permutation(len(flat))[:count])], np.float32)
        each = -(-self.each * self.samples[batch] // max(1, len(data)))  # the batch may be samples times frames or tiles
        return _patches(np.asarray(data, np.float32), spec, each, rng)


def _patches(data: np.ndarray, spec: LayerSpec, each: int, rng: np.random.Generator) -> np.ndarray:
    """Return `each` random patches of every image of a convolution's input, (N, I·K)."""
    if not len(data):  # such as the detections in an image without any
        return np.empty((0, data.shape[1] * math.prod(spec.kernel)), np.float32)
    nd = spec.spatial
    begins, ends = list(spec.pads[:nd]), list(spec.pads[nd:])
    if spec.auto_pad.startswith("SAME"):
        for axis in range(nd):
            size, stride = data.shape[2 + axis], spec.stride[axis]
            reach = spec.dilation[axis] * (spec.kernel[axis] - 1) + 1
            total = max(0, (-(-size // stride) - 1) * stride + reach - size)
            smaller, larger = total // 2, total - total // 2
            begins[axis], ends[axis] = (smaller, larger) if spec.auto_pad == "SAME_UPPER" else (larger, smaller)
    elif spec.auto_pad == "VALID":
        begins, ends = [0] * nd, [0] * nd
    data = np.pad(data, [(0, 0), (0, 0), *zip(begins, ends, strict=True)])
    counts = [
        (data.shape[2 + axis] - spec.dilation[axis] * (spec.kernel[axis] - 1) - 1) // spec.stride[axis] + 1
        for axis in range(nd)
    ]
    places = math.prod(counts)
    take = min(each, places)
    picks = np.stack([rng.permutation(places)[:take] for _ in range(len(data))])  # (B, take)
    corner = np.unravel_index(picks.reshape(-1), counts)
    image = np.repeat(np.arange(len(data)), take)
    patches = np.empty((len(image), data.shape[1], *spec.kernel), np.float32)
    for tap in np.ndindex(*spec.kernel):
        position = [corner[axis] * spec.stride[axis] + tap[axis] * spec.dilation[axis] for axis in range(nd)]
        patches[(slice(None), slice(None), *tap)] = data[(image, slice(None), *position)]
    return patches.reshape(len(image), -1)


@dataclass
class Statistics:
    """Sums over input rows x and target outputs y of a layer; they give the moments, the best weight and the bias.

    Attributes:
        width: number of values in a row, I·K.
        outputs: number of outputs, O.

    """

    width: int
    outputs: int

    def __post_init__(self) -> None:
        self.count = 0
        self._xx = np.zeros((self.width, self.width), np.float32, order="F")
        self._symmetric = True  # or only the part below the diagonal is right
        self.xy = np.zeros((self.width, self.outputs), np.float64)
        self.x = np.zeros(self.width, np.float64)
        self.y = np.zeros(self.outputs, np.float64)
        self.yy = 0.0

    @property
    def xx(self) -> np.ndarray:
        """The sum of x xᵀ over all rows, (I·K, I·K)."""
        for begin in range(0, 0 if self._symmetric else self.width, _BLOCK):
            end = begin + _BLOCK
            block = self._xx[begin:end, begin:end]
            self._xx[begin:end, begin:end] = np.tril(block) + np.tril(block, -1).T
            self._xx[begin:end, end:] = self._xx[end:, begin:end].T
        self._symmetric = True
        return self._xx

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add rows x (N, I·K) with their target outputs y (N, O)."""
        from scipy.linalg.blas import ssyrk

        if not len(x):
            return
        self.count += len(x)
        self._xx = ssyrk(1.0, x.T, 1.0, self._xx, lower=True, overwrite_c=True)  # one half of a symmetric matrix
        self._symmetric = False
        self.xy += x.T @ y
        self.x += x.sum(0, dtype=np.float64)
        self.y += y.sum(0, dtype=np.float64)
        self.yy += float(np.vdot(y, y))

    def moments(self, *, centred: bool) -> Moments:
        """Return the second moments of x; `centred`, for a layer with a bias, takes them about the mean."""
        gram = self.xx / np.float32(self.count)
        if centred:
            mean = (self.x / self.count).astype(np.float32)
            gram -= mean[:, None] * mean
        return Moments(gram)

    def best(self, weight: np.ndarray, moments: Moments, *, centred: bool, shrinkage: float) -> np.ndarray:
        """Return the weight T that predicts y from x with the least squared error.

        Of shrunk moments, a share of the rows is noise, for which the outputs are those of `weight`.

        Args:
            weight: the weight (O, I, *K) of the dense layer.
            moments: the shrunk moments of x.
            centred: whether a bias follows the weight.
            shrinkage: the share s that the moments were shrunk by.

        """
        from scipy.linalg import cho_factor, cho_solve

        cross = self.xy / self.count
        if centred:
            cross -= np.outer(self.x / self.count, self.y / self.count)
        size = float(np.trace(self.xx, dtype=np.float64)) / self.count
        if moments.scale * self.width < _ALIKE * size:
            return weight  # the rows are so similar that their moments about the mean are rounding errors
        noise = shrinkage * moments.scale
        floor = _ROUNDING * size + 1e-12
        dtype = np.dtype(np.float32 if shrinkage >= _SHRUNK else np.float64)  # the more noise, the better the condition
        gram = moments.gram.astype(dtype)
        gram[np.diag_indices(self.width)] += floor
        flat = weight.reshape(self.outputs, -1).astype(np.float64)
        goal = (1 - shrinkage) * cross + (noise + floor) * flat.T
        solved = cho_solve(cho_factor(gram, lower=True, overwrite_a=True), goal.astype(dtype))
        return np.ascontiguousarray(solved.T, np.float32).reshape(weight.shape)

    def __add__(self, other: Statistics) -> Statistics:
        """Return the sums over the rows of both."""
        total = Statistics(self.width, self.outputs)
        for name in ("count", "_xx", "xy", "x", "y", "yy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        total._symmetric = self._symmetric and other._symmetric
        return total

    def squares(self, weight: np.ndarray) -> float:
        """Return the sum of ‖Ŵx‖² over all rows, for a weight Ŵ (O, I, *K)."""
        dtype = np.float32 if self.width > _WIDE else np.float64
        flat = weight.reshape(self.outputs, -1)
        product = flat.astype(dtype) @ self.xx.astype(dtype, copy=False)
        return float(np.vdot(flat.astype(np.float64), product))

    def lost(self, weight: np.ndarray, *, centred: bool, bias: np.ndarray | None = None, squares: float | None = None) -> float:
        """Return the error E‖y − Ŵx − b‖² of a weight Ŵ divided by the variance of y.

        Args:
            weight: the weight (O, I, *K).
            centred: whether a bias follows the weight; without one, b is 0.
            bias: the bias (O,); default: the best one for these rows.
            squares: what `squares` returns for the weight, where it is known already.

        """
        flat = weight.reshape(self.outputs, -1).astype(np.float64)
        x, y = self.x / self.count, self.y / self.count
        squares = self.squares(weight) if squares is None else squares
        error = (self.yy - 2 * float(np.vdot(flat.T, self.xy)) + squares) / self.count
        if centred:
            rest = y - flat @ x
            error -= float(np.square(rest).sum())
            error += 0.0 if bias is None else float(np.square(rest - bias).sum())
        return max(0.0, error) / max(self.variance, 1e-30)

    @property
    def variance(self) -> float:
        """The variance of y, summed over the outputs."""
        y = self.y / self.count
        return self.yy / self.count - float(y @ y)

    def bias(self, weight: np.ndarray) -> np.ndarray:
        """Return the bias (O,) with which the mean of the weight's outputs is that of y."""
        return self.y / self.count - weight.reshape(self.outputs, -1).astype(np.float64) @ (self.x / self.count)
