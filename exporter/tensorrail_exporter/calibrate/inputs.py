"""Calibration inputs, and what they look like at each layer: patches, second moments, the outputs that the dense layer gave.

Inputs come as one npz file (arrays by input name, and `labels` where there are any), or as a folder of npy or npz files or of
images. No label is needed.
"""

from __future__ import annotations

import math
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from tensorrail_exporter.calibrate.metric import Moments
from tensorrail_exporter.calibrate.pictures import eight_bits
from tensorrail_exporter.formats.contraction import LayerSpec
from tensorrail_exporter.graphs.io import save_model
from tensorrail_exporter.graphs.parts import Network
from tensorrail_exporter.rewrite.survey import DenseLayer
from tensorrail_runtime.errors import GraphError, ModelError
from tensorrail_runtime.sessions.inputs import TYPES, batches_of, load_arrays
from tensorrail_runtime.sessions.session import Session, open_session
from tensorrail_runtime.sessions.session import run as run_session

Feeds = Sequence[Mapping[str, np.ndarray]]

_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
_LABELS = "labels"
_BATCH = 25
_ROWS = 12  # sampled rows for each value of a patch: enough for a second moment that can be inverted
_LEAST = 20_000
_LEAST_RIDGE = 1e-6  # of the mean eigenvalue: what rounding leaves of a moment in single precision
_ALIKE = 1e-5  # of the mean square: a variance below it is lost in single precision
_WIDEST = 6144  # values of a patch whose second moment (150 MB) is still made in full


@dataclass(frozen=True)
class Calibration:
    """Batches of inputs by name; `labels` (N,) when the data hold some."""

    feeds: tuple[Mapping[str, np.ndarray], ...]
    labels: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(len(next(iter(feed.values()))) for feed in self.feeds)

    def first(self, count: int) -> Calibration:
        """Return the first batches that hold at least `count` samples."""
        kept: list[Mapping[str, np.ndarray]] = []
        seen = 0
        for feed in self.feeds:
            if seen >= count:
                break
            kept.append(feed)
            seen += len(next(iter(feed.values())))
        return Calibration(tuple(kept), None if self.labels is None else self.labels[:seen])


@dataclass(frozen=True)
class Preprocessing:
    """How images of a folder become inputs: shorter side to `resize`, the centre cut out, then (x / 255 − mean) / std.

    The defaults are those of ImageNet models; `resize` 0 stands for 256/224 of the input's size.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resize: int = 0


def load_calibration(
    path: Path | str, model: Path | str, *, most: int = 512, images: Preprocessing | None = None
) -> Calibration:
    """Return the inputs of an npz file or a folder, in batches; at most `most` samples, evenly spread.

    Raises `ModelError` for data that do not fit the model's inputs, that hold none or the same in all samples, or that hold
    NaN or infinite values, and for labels that are not integers from 0, one a sample.
    """
    path = Path(path)
    session = open_session(model)
    arrays = _folder(path, session, most, images or Preprocessing()) if path.is_dir() else load_arrays(path)
    entries = {entry.name: entry for entry in session.get_inputs()}
    if not entries:
        raise ModelError(f"{model}: takes no input: there is nothing that calibration data could be given to")
    labels = None if _LABELS in entries else arrays.pop(_LABELS, None)
    if len(entries) == 1 and len(arrays) == 1:
        arrays = dict(zip(entries, arrays.values(), strict=True))  # one array for one input needs no name
    missing = [name for name in entries if name not in arrays]
    if missing:
        raise ModelError(
            f"{path}: no array for input {missing[0]!r}; expected {', '.join(entries)}, and {', '.join(arrays) or 'none'} came"
        )
    arrays = {name: _typed(path, arrays[name], entry) for name, entry in entries.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ModelError(f"{path}: the arrays of the inputs differ in length: {lengths}; expected one row a sample in each")
    total = next(iter(lengths.values()))
    if total > 1 and all((array == array[:1]).all() for array in arrays.values()):
        raise ModelError(f"{path}: all {total} samples are the same: nothing can be fitted to them; expected typical inputs")
    if labels is not None and labels.shape[:1] != (total,):
        raise ModelError(f"{path}: {total} samples and labels of shape {labels.shape} came; expected one label a sample")
    if labels is not None and (labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer)):
        raise ModelError(f"{path}: labels are integers, one a sample, and {labels.dtype} of shape {labels.shape} came")
    if labels is not None and (labels < 0).any():
        raise ModelError(f"{path}: labels are numbers of classes from 0 on, and {labels.min()} is among them")
    fixed = next((entry.shape[0] for entry in entries.values() if isinstance(entry.shape[0], int)), 1)
    most = max(fixed, most - most % fixed)  # whole batches of a model that takes no other
    if total > most:
        picks = np.linspace(0, total - 1, most).astype(int)
        arrays = {name: array[picks] for name, array in arrays.items()}
        labels = None if labels is None else labels[picks]
    return Calibration(tuple(batches_of(session, arrays, _BATCH)), labels)


def run_to(
    model: onnx.ModelProto, tensors: Sequence[str], settings: Session
) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    """Return a function that runs the part of a graph above some tensors and returns their values, in order.

    `GraphError` for a tensor that is not in the graph; the function raises `ModelError` for inputs that do not fit.
    """
    network = Network(model)
    unknown = [name for name in tensors if not network.knows(name)]
    if unknown:
        raise GraphError(f"tensor {unknown[0]!r} is not in the graph: expected the input or output of one of its nodes")
    outputs = [name for name in dict.fromkeys(tensors) if name not in network.inputs]
    if not outputs:
        return lambda feed: [feed[name] for name in tensors]
    part = network.part(network.above(outputs), list(network.inputs.values()), outputs)
    with tempfile.TemporaryDirectory() as folder:
        save_model(part, Path(folder) / "part.onnx")
        session = open_session(Path(folder) / "part.onnx", settings=replace(settings, linger=False))
    wanted = [entry.name for entry in session.get_inputs()]

    def run(feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        values = run_session(session, {name: feed[name] for name in wanted if name in feed})
        return [values[name] if name in values else feed[name] for name in tensors]

    return run


def rows_wanted(spec: LayerSpec) -> int:
    """Return how many rows a layer's moments are made of, at most."""
    return max(_LEAST, _ROWS * math.prod(spec.shape[1:]))


def fits(spec: LayerSpec) -> bool:
    """Return whether the second moment of the layer's patches is small enough to be made in full."""
    return math.prod(spec.shape[1:]) <= _WIDEST


class Sampler:
    """Draws the same places of every batch whenever it is asked: of the dense network and of the compressed one."""

    def __init__(self, layer: DenseLayer, samples: int, seed: int = 0) -> None:
        self.layer, self.seed = layer, seed
        self.each = max(1, -(-rows_wanted(layer.spec) // max(1, samples)))

    def rows(self, data: np.ndarray, batch: int) -> np.ndarray:
        """Return the patches (N, I·K) of a convolution's input (B, I, *S), or the rows of a matrix's; `batch` is its number."""
        spec = self.layer.spec
        rng = np.random.default_rng((self.seed, batch))
        if spec.op != "conv":
            columns = self.layer.data == 1 if self.layer.op == "MatMul" else bool(self.layer.attrs.get("transA", 0))
            if columns:
                data = np.swapaxes(data, -1, -2)
            flat = data.reshape(-1, spec.shape[1])
            count = min(len(flat), self.each * _BATCH)
            return np.ascontiguousarray(flat[np.sort(rng.permutation(len(flat))[:count])], np.float32)
        return _patches(np.asarray(data, np.float32), spec, self.each, rng)


def _patches(data: np.ndarray, spec: LayerSpec, each: int, rng: np.random.Generator) -> np.ndarray:
    nd = spec.spatial
    begins, ends = list(spec.pads[:nd]), list(spec.pads[nd:])
    if spec.auto_pad.startswith("SAME"):
        for axis in range(nd):
            size, stride = data.shape[2 + axis], spec.stride[axis]
            reach = spec.dilation[axis] * (spec.kernel[axis] - 1) + 1
            total = max(0, (-(-size // stride) - 1) * stride + reach - size)
            small, large = total // 2, total - total // 2
            begins[axis], ends[axis] = (small, large) if spec.auto_pad == "SAME_UPPER" else (large, small)
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
        at = [corner[axis] * spec.stride[axis] + tap[axis] * spec.dilation[axis] for axis in range(nd)]
        patches[(slice(None), slice(None), *tap)] = data[(image, slice(None), *at)]
    return patches.reshape(len(image), -1)


@dataclass
class Statistics:
    """Sums over rows x (n) and wanted outputs y (O), from which moments, the best weight and the bias follow."""

    width: int  # I·K
    outputs: int

    def __post_init__(self) -> None:
        self.count = 0
        self.xx = np.zeros((self.width, self.width), np.float32)
        self.xy = np.zeros((self.width, self.outputs), np.float64)
        self.x = np.zeros(self.width, np.float64)
        self.y = np.zeros(self.outputs, np.float64)
        self.yy = 0.0

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Take in rows x (N, n) and outputs y (N, O)."""
        self.count += len(x)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.x += x.sum(0, dtype=np.float64)
        self.y += y.sum(0, dtype=np.float64)
        self.yy += float(np.vdot(y, y))

    def moments(self, *, centred: bool) -> Moments:
        """Return the second moments of x, about its mean when a bias follows the weight."""
        gram = self.xx / np.float32(self.count)
        if centred:
            mean = (self.x / self.count).astype(np.float32)
            gram -= mean[:, None] * mean
        return Moments(gram)

    def best(self, weight: np.ndarray, moments: Moments, *, centred: bool, ridge: float) -> np.ndarray:
        """Return the weight (O, I, *K) that gives y from x with the least error, drawn toward `weight` by a ridge."""
        from scipy.linalg import cho_factor, cho_solve

        gram = moments.gram.astype(np.float64)
        cross = self.xy / self.count
        if centred:
            cross -= np.outer(self.x / self.count, self.y / self.count)
        spread = float(np.trace(gram))
        if spread < _ALIKE * float(np.trace(self.xx)) / self.count:
            return weight  # rows that are all alike, whose sums about their mean are rounding
        load = max(ridge, _LEAST_RIDGE) * spread / self.width + 1e-12
        gram[np.diag_indices(self.width)] += load
        flat = weight.reshape(self.outputs, -1).astype(np.float64)
        solved = cho_solve(cho_factor(gram, lower=True, overwrite_a=True), cross + load * flat.T)
        return np.ascontiguousarray(solved.T, np.float32).reshape(weight.shape)

    def lost(self, weight: np.ndarray, *, centred: bool) -> float:
        """Return E‖y − Ŵx‖² as a share of the variance of y; with `centred` the best bias is taken first."""
        flat = weight.reshape(self.outputs, -1).astype(np.float64)
        x, y = self.x / self.count, self.y / self.count
        gram = self.xx.astype(np.float64) / self.count
        error = self.yy / self.count - 2 * float(np.vdot(flat.T, self.xy)) / self.count + float(np.vdot(flat, flat @ gram))
        if centred:
            error -= float(np.square(y - flat @ x).sum())
        return max(0.0, error) / max(self.yy / self.count - float(y @ y), 1e-30)

    def bias(self, weight: np.ndarray) -> np.ndarray:
        """Return what must be added to the weight's outputs (O,) so that their mean is that of y."""
        return self.y / self.count - weight.reshape(self.outputs, -1).astype(np.float64) @ (self.x / self.count)


def _typed(path: Path, array: np.ndarray, entry: ort.NodeArg) -> np.ndarray:
    """Return an input's array in the type that the model takes; `ModelError` for another shape, and for NaN."""
    if not entry.shape:
        raise ModelError(f"{path}: input {entry.name!r} is a single value; calibration needs inputs of one row a sample")
    axes = list(zip(entry.shape[1:], array.shape[1:], strict=False))
    if array.ndim != len(entry.shape) or any(isinstance(size, int) and size != came for size, came in axes):
        raise ModelError(f"{path}: input {entry.name!r} has shape {entry.shape}, and an array of {list(array.shape)} came")
    if np.iscomplexobj(array):
        raise ModelError(f"{path}: the array of input {entry.name!r} is complex; expected a {entry.type}")
    numeric = np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_
    if array.dtype == np.uint8 and entry.type in _FLOATS:
        raise ModelError(
            f"{path}: input {entry.name!r} is a {entry.type}, and bytes came, such as pixels: scale them as in training first"
        )
    if numeric and entry.type in _FLOATS:
        array = array.astype(_FLOATS[entry.type], copy=False)
        if not np.isfinite(array).all():
            raise ModelError(f"{path}: the array of input {entry.name!r} holds NaN or infinite values; expected finite ones")
        return array
    wanted = TYPES.get(entry.type)
    if numeric and wanted is not None and array.dtype != wanted:
        cast = array.astype(wanted) if array.dtype.kind in "iub" else array
        if array.dtype.kind not in "iub" or not np.array_equal(cast.astype(np.int64), array.astype(np.int64)):
            raise ModelError(f"{path}: input {entry.name!r} is a {entry.type}, and values of {array.dtype} came")
        return cast
    return array


def _folder(path: Path, session: ort.InferenceSession, most: int, images: Preprocessing) -> dict[str, np.ndarray]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    arrays = [file for file in files if file.suffix in (".npy", ".npz")]
    pictures = [file for file in files if file.suffix.lower() in _IMAGES]
    if not arrays and not pictures:
        kinds = ", ".join(sorted(_IMAGES))
        raise ModelError(f"{path}: holds no calibration data; expected npz or npy files, or images ({kinds})")
    if arrays:
        parts = list(_array_files(arrays, session.get_inputs()[0].name))
        return {name: _joined(path, name, arrays, parts) for name in parts[0]}
    if len(session.get_inputs()) != 1:
        count = len(session.get_inputs())
        raise ModelError(f"{path}: images came for a model of {count} inputs; give an npz file with one array an input")
    entry = session.get_inputs()[0]
    sized = len(entry.shape) == 4 and all(isinstance(size, int) for size in entry.shape[1:])
    if not sized or entry.shape[1] not in (1, 3) or entry.type not in _FLOATS:
        raise ModelError(
            f"{path}: images came for input {entry.name!r}, {entry.type} of shape {entry.shape}; expected floats "
            "(batch, 1 or 3, height, width) of known size: give an npz file instead"
        )
    picks = np.linspace(0, len(pictures) - 1, min(most, len(pictures))).astype(int)
    return {entry.name: np.stack([_picture(pictures[k], entry.shape[1:], images) for k in picks])}


def _array_files(files: Sequence[Path], name: str) -> Iterator[dict[str, np.ndarray]]:
    for file in files:
        if file.suffix == ".npz":
            yield load_arrays(file)
            continue
        try:
            array = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ModelError(f"{file}: not a plain npy array ({str(error).partition(chr(10))[0]})") from None
        if not isinstance(array, np.ndarray):
            array.close()
            raise ModelError(f"{file}: not a plain npy array, but several in one file: call it .npz")
        yield {name: array}


def _joined(folder: Path, name: str, files: Sequence[Path], parts: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Return the rows of one array in all files; `ModelError` names a file that lacks it or has rows of another shape."""
    first = parts[0][name]
    for file, part in zip(files, parts, strict=True):
        if part.keys() != parts[0].keys():
            names = ", ".join(parts[0])
            raise ModelError(f"{folder}: {file.name} holds {', '.join(part)}; expected {names} as in {files[0].name}")
        array = part[name]
        if not array.ndim or array.shape[1:] != first.shape[1:]:
            raise ModelError(
                f"{folder}: array {name!r} of {file.name} has shape {list(array.shape)}; expected a batch of rows "
                f"{list(first.shape[1:])} as in {files[0].name}"
            )
    return np.concatenate([part[name] for part in parts])


def _picture(path: Path, shape: Sequence[int], how: Preprocessing) -> np.ndarray:
    from PIL import Image

    channels, height, width = shape
    try:
        with Image.open(path) as opened:
            image = eight_bits(opened).convert("RGB" if channels == 3 else "L")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # PIL raises all of these
        raise ModelError(f"{path}: not a readable image ({str(error).partition(chr(10))[0]})") from None
    short = how.resize or round(min(height, width) * 256 / 224)
    scale = short / min(image.size)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    values = np.asarray(image.crop((left, top, left + width, top + height)), np.float32).reshape(height, width, channels) / 255
    mean, std = (np.resize(np.array(one, np.float32), channels) for one in (how.mean, how.std))
    return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1))
