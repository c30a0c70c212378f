"""What models are run on: random inputs of their own types and shapes, or arrays from an npz file."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError, first_line

TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}

_MOST = 2**29  # values that are drawn for one run: 2 GiB as float32

_DIGITS = 18  # of a size in 64 bits

Shapes = Mapping[str, Sequence[int]]


def random_inputs(
    session: ort.InferenceSession, batch: int = 1, seed: int = 0, shapes: Shapes | None = None
) -> dict[str, np.ndarray]:
    """Return inputs of the model's own types: standard normal, or integers 0 and 1.

    `shapes` gives an input's shape; where it does not, dynamic axes are `batch`. `ModelError` for a shape of an input that
    is not there or has other axes, for types that cannot be drawn, and for more than 2²⁹ values, which take the memory of
    the machine.
    """
    entries = {entry.name: entry for entry in session.get_inputs()}
    for name in shapes or {}:
        if name not in entries:
            raise ModelError(f"shapes: unknown input {name!r}; the model's inputs are {', '.join(entries) or 'none'}")
    rng = np.random.default_rng(seed)
    feed: dict[str, np.ndarray] = {}
    left = _MOST
    for name, entry in entries.items():
        if entry.type not in TYPES:
            raise ModelError(f"input {name!r} has type {entry.type}, which cannot be drawn at random: give its values")
        shape = _shape(entry, batch, (shapes or {}).get(name))
        left -= math.prod(shape)
        if left < 0:
            raise ModelError(
                f"input {name!r} of shape {shape} is too large: at most {_MOST:,} random values are drawn for one run"
            )
        dtype = np.dtype(TYPES[entry.type])
        normal = np.issubdtype(dtype, np.floating)
        feed[name] = (rng.standard_normal(shape) if normal else rng.integers(0, 2, shape)).astype(dtype)
    return feed


def batch_of(inputs: Sequence[Sequence[object]], batch: int = 1, shapes: Sequence[Sequence[int] | None] = ()) -> int:
    """Return how many samples a run holds when the dynamic axes of the inputs are `batch`, or where given of `shapes`.

    An axis that is no number is dynamic. The batch is the first axis of an input, or the second where time comes first; where
    neither is dynamic it is the first axis of the first input, but of one with three fixed axes, of which nobody knows. Raises
    `ModelError` for a batch above 1 that no axis takes.
    """
    given = [*shapes, *[None] * (len(inputs) - len(shapes))]
    sizes = [
        [None if wanted is None and not isinstance(size, int) else int(str(size)) for size in (wanted or axes)]
        for axes, wanted in zip(inputs, given, strict=True)
    ]
    if any(size is None for axes in sizes for size in axes[:2]):
        return batch
    first, declared = next(((axes, own) for axes, own in zip(sizes, inputs, strict=True) if axes), ([1], [1]))
    own = 1 if len(first) == 3 and isinstance(declared[0], int) else first[0] or 1
    free = any(size is None for axes in sizes for size in axes)
    if free or batch in (1, own):
        return own
    if any(batch in axes[:2] for axes in sizes):
        return batch
    raise ModelError(f"expected batch {own}, got {batch}: the model has no dynamic axis that could be {batch}")


def open_axes(model: onnx.ModelProto, shapes: Shapes) -> list[str]:
    """Return a line for each input without a shape that has dynamic axes beside its batch: they are run as long as that is."""
    stored = {tensor.name for tensor in model.graph.initializer}
    lines = []
    for value in model.graph.input:
        axes = [axis.dim_value if axis.dim_value > 0 else None for axis in value.type.tensor_type.shape.dim]
        if value.name in stored or value.name in shapes or axes.count(None) < 2:
            continue
        example = ",".join(str(size or (50 if place else 1)) for place, size in enumerate(axes))
        lines.append(
            f"input {value.name!r} has {axes.count(None)} dynamic axes, all set to the batch size: give its shape, "
            f"such as --shape {value.name}={example}"
        )
    return lines


def _shape(entry: ort.NodeArg, batch: int, wanted: Sequence[int] | None) -> list[int]:
    own = [size if isinstance(size, int) else batch for size in entry.shape]
    if wanted is None:
        return own
    fits = len(wanted) == len(entry.shape)
    if not fits or any(isinstance(a, int) and a != b for a, b in zip(entry.shape, wanted, strict=True)):
        raise ModelError(f"input {entry.name!r}: expected shape {entry.shape}, got {list(wanted)}")
    return list(wanted)


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of texts such as `x=1,3,224,224`; `ModelError` says how one is written."""
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        parts = [part.strip() for part in sizes.replace("x", ",").split(",")]
        if not name or not all(part.isascii() and part.isdecimal() and len(part) <= _DIGITS and int(part) for part in parts):
            raise ModelError(f"expected a shape such as name=1,3,224,224, got {text!r}")
        shapes[name] = tuple(int(part) for part in parts)
    return shapes


def load_arrays(path: Path | str) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file, nothing of it unpickled; `ModelError` when it is not one, or is empty."""
    arrays: dict[str, np.ndarray] = {}
    try:
        with Path(path).open("rb") as file:
            single = _is_array(file)
            if not single:
                with zipfile.ZipFile(file) as members:
                    arrays = {one.filename.removesuffix(".npy"): _array(members, one) for one in members.infolist()}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}): expected an npz file") from None
    except Exception as error:  # noqa: BLE001 - zipfile, its decompressors and NumPy raise a dozen unrelated classes
        reason = first_line(error) or type(error).__name__
        raise ModelError(f"{path}: not an npz file of plain arrays ({reason})") from None
    if single:
        raise ModelError(f"{path}: expected an npz file of named arrays, got a single array")
    if not arrays or any(not array.size for array in arrays.values()):
        raise ModelError(f"{path}: holds no data")
    return arrays


def batches_of(session: ort.InferenceSession, arrays: Mapping[str, np.ndarray], batch: int) -> list[dict[str, np.ndarray]]:
    """Return the arrays that are the model's inputs, cut along their first axis into batches of `batch` or fewer.

    A model with a batch axis of fixed size gets batches of that size; an array without axes, a scalar, goes into each batch.
    `ModelError` names an input without an array, and arrays of unequal length.
    """
    entries = session.get_inputs()
    if not entries:
        raise ModelError("the model has no inputs, so it cannot be run on data")
    missing = [entry.name for entry in entries if entry.name not in arrays]
    if missing:
        raise ModelError(f"expected an array for input {missing[0]!r}, got {', '.join(arrays) or 'none'}")
    feeds = {entry.name: arrays[entry.name] for entry in entries}
    lengths = {name: len(array) for name, array in feeds.items() if array.ndim}
    if len(set(lengths.values())) > 1:
        raise ModelError(f"expected input arrays of equal length, got {lengths}")
    total = next(iter(lengths.values()), 1)
    fixed = next((entry.shape[0] for entry in entries if entry.shape and isinstance(entry.shape[0], int)), None)
    if fixed is not None:
        if not fixed or total % fixed:
            raise ModelError(f"the model takes batches of {fixed}, got {total} samples: give a multiple of {fixed}")
        batch = fixed
    return [
        {name: array[start : start + batch] if array.ndim else array for name, array in feeds.items()}
        for start in range(0, total, batch)
    ]


def samples_of(feed: Mapping[str, np.ndarray]) -> int:
    """Return how many samples a batch holds: 1 where no input has an axis."""
    return next((len(array) for array in feed.values() if array.ndim), 1)


def _array(members: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Return one array of an npz file; its header may not claim more than the member holds, and nothing is unpickled."""
    with members.open(member) as stream:
        if not _is_array(stream):
            raise ValueError(f"{member.filename} is not an array")
    with members.open(member) as stream:
        old = np.lib.format.read_magic(stream) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        held = member.file_size - stream.tell()
    if math.prod(shape) * dtype.itemsize > held:
        raise ValueError(f"{member.filename}: its header says shape {shape}, but it has {held:,} bytes")
    with members.open(member) as stream:
        found: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    return found


def _is_array(stream: IO[bytes]) -> bool:
    return stream.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
