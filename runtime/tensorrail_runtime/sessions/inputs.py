"""Inputs for models: random values of the right types and shapes where none are known, and arrays from an npz file."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError, first_line
from tensorrail_runtime.sessions.values import TYPES, Drawn, Values, at_shape, native, typed

if TYPE_CHECKING:
    import onnx

_MOST_VALUES = 2**29  # random values for one run: 2 GiB as float32

_DIGITS = 18  # largest number of digits of a size, which has 64 bits

Shapes = Mapping[str, Sequence[int]]


def random_inputs(
    session: ort.InferenceSession,
    batch: int = 1,
    seed: int = 0,
    shapes: Shapes | None = None,
    values: Values | None = None,
    order: Iterable[str] = (),
) -> dict[str, np.ndarray]:
    """Return random inputs for a model: standard normal values, or integers 0 and 1, of the types of its inputs.

    Inputs whose values are known are not random.

    Args:
        session: a session of the model.
        batch: the size of every dynamic axis of inputs that `shapes` does not name.
        seed: the seed of the random numbers.
        shapes: shapes of inputs, by name.
        values: known values of inputs, by name, which are cut or repeated to the shapes of this run; default: none.
        order: the inputs of another model, in its order: the inputs of these names are drawn first, and get the same values.

    Returns:
        One array for each input, by name.

    Raises:
        ModelError: `shapes` or `values` names an unknown input or does not fit an input, an input has a type for which no
            random values can be drawn, or the inputs have more than 2²⁹ values.

    """
    entries = {entry.name: entry for entry in session.get_inputs()}
    for what, given in (("shapes", shapes or {}), ("values", values or {})):
        for name in given:
            if name not in entries:
                raise ModelError(f"{what}: unknown input {name!r}; the model's inputs are {', '.join(entries) or 'none'}")
    rng = np.random.default_rng(seed)
    feed = Drawn()
    remaining = _MOST_VALUES
    for name in dict.fromkeys([*(name for name in order if name in entries), *entries]):
        entry = entries[name]
        known = values is not None and name in values
        if not known and entry.type not in TYPES:
            raise ModelError(f"input {name!r} has type {entry.type}, which cannot be drawn at random: give its values")
        shape = _shape(entry, batch, (shapes or {}).get(name))
        remaining -= math.prod(shape)
        if remaining < 0:
            raise ModelError(
                f"input {name!r} of shape {shape} is too large: at most {_MOST_VALUES:,} random values are drawn for one run"
            )
        if values is not None and known:
            feed[name] = _known(entry, values[name], shape)
            continue
        dtype = np.dtype(TYPES[entry.type])
        normal = np.issubdtype(dtype, np.floating)
        feed.integers += () if normal else (name,)
        feed[name] = (rng.standard_normal(shape) if normal else rng.integers(0, 2, shape)).astype(dtype)
    return feed


def batch_of(inputs: Sequence[Sequence[object]], batch: int = 1, shapes: Sequence[Sequence[int] | None] = ()) -> int:
    """Return the number of samples in one run of a model.

    The batch axis is the first axis of an input, or the second one where time comes first. Where neither is dynamic, it is the
    first axis of the first input, except for an input of three fixed axes, whose batch axis is ambiguous: it counts as one
    sample.

    Args:
        inputs: the shape of each input as the model declares it; an axis that is not a number is dynamic.
        batch: the size of the dynamic axes.
        shapes: the shape of each input where one is given, else None.

    Returns:
        The number of samples.

    Raises:
        ModelError: `batch` is above 1, and no axis of the model can have that size.

    """
    given = [*shapes, *[None] * (len(inputs) - len(shapes))]
    sizes = [
        [None if shape is None and not isinstance(size, int) else int(str(size)) for size in (shape or axes)]
        for axes, shape in zip(inputs, given, strict=True)
    ]
    if any(size is None for axes in sizes for size in axes[:2]):
        return batch
    first, declared = next(((axes, own) for axes, own in zip(sizes, inputs, strict=True) if axes), ([1], [1]))
    own = 1 if len(first) == 3 and isinstance(declared[0], int) else first[0] or 1
    dynamic = any(size is None for axes in sizes for size in axes)
    if dynamic or batch in (1, own):
        return own
    if any(batch in axes[:2] for axes in sizes):
        return batch
    raise ModelError(f"expected batch {own}, got {batch}: the model has no dynamic axis that could be {batch}")


def open_axes(model: onnx.ModelProto, shapes: Shapes) -> list[str]:
    """Return a warning for each input whose dynamic axes are all set to the batch size, although there are several.

    Args:
        model: the model.
        shapes: the given shapes of inputs, by name; these inputs get no warning.

    """
    initializers = {tensor.name for tensor in model.graph.initializer}
    lines = []
    for value in model.graph.input:
        axes = [axis.dim_value if axis.dim_value > 0 else None for axis in value.type.tensor_type.shape.dim]
        if value.name in initializers or value.name in shapes or axes.count(None) < 2:
            continue
        example = ",".join(str(size or (50 if place else 1)) for place, size in enumerate(axes))
        lines.append(
            f"input {value.name!r} has {axes.count(None)} dynamic axes, all set to the batch size: give its shape, "
            f"such as {value.name}={example}"
        )
    return lines


def _shape(entry: ort.NodeArg, batch: int, shape: Sequence[int] | None) -> list[int]:
    declared = [size if isinstance(size, int) else batch for size in entry.shape]
    if shape is None:
        return declared
    fits = len(shape) == len(entry.shape)
    if not fits or any(isinstance(a, int) and a != b for a, b in zip(entry.shape, shape, strict=True)):
        raise ModelError(f"input {entry.name!r}: expected shape {entry.shape}, got {list(shape)}")
    return list(shape)


def _known(entry: ort.NodeArg, values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return known values of an input, cut or repeated to a shape."""
    array = typed(values, entry, "values")
    if not entry.shape and array.ndim:  # an input of undeclared shape
        return array
    missing = any(not own and size for own, size in zip(array.shape[::-1], shape[::-1], strict=False))  # nothing to repeat
    if array.ndim > len(shape) or missing:
        raise ModelError(f"values: input {entry.name!r} expects shape {entry.shape}, got an array of shape {list(array.shape)}")
    return at_shape(array, shape)


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Parse the shapes of inputs.

    Args:
        texts: texts such as `x=1,3,224,224` or `x=1x3x224x224`.

    Returns:
        The shape of each input, by name.

    Raises:
        ModelError: a text has another form, or an axis is not a number of 0 or more. An axis of 0 is one that holds nothing
            yet, such as the past of a decoder's first step; the first axis is 1 or more.

    """
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        numbers = [number.strip() for number in sizes.replace("x", ",").split(",")]
        if not name or not all(_is_size(number) for number in numbers) or not int(numbers[0]):
            raise ModelError(f"expected a shape such as name=1,3,224,224, got {text!r}")
        if name in shapes:
            raise ModelError(f"shape of input {name!r}: given twice")
        shapes[name] = tuple(int(number) for number in numbers)
    return shapes


def _is_size(text: str) -> bool:
    return bool(text.isascii() and text.isdecimal() and len(text) <= _DIGITS)


def load_arrays(path: Path | str) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file, without unpickling.

    Args:
        path: the npz file.

    Returns:
        The arrays, by name.

    Raises:
        ModelError: the file cannot be read, is not an npz file of plain arrays, or has no data.

    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with Path(path).open("rb") as file:
            single = _is_array(file)
            if not single:
                with zipfile.ZipFile(file) as members:
                    arrays = {member.filename.removesuffix(".npy"): _array(members, member) for member in members.infolist()}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}): expected an npz file") from None
    except Exception as error:  # noqa: BLE001 - zipfile, its decompressors and NumPy raise a dozen unrelated classes
        reason = first_line(error) or type(error).__name__
        raise ModelError(f"{path}: not an npz file of plain arrays ({reason})") from None
    if single:
        raise ModelError(f"{path}: expected an npz file of named arrays, got a single array")
    if not any(array.size for array in arrays.values()):
        raise ModelError(f"{path}: holds no data")
    return arrays


def _array(members: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Return one array of an npz file, without unpickling; the shape in its header may not exceed its bytes."""
    with members.open(member) as stream:
        if not _is_array(stream):
            raise ValueError(f"{member.filename} is not an array")
    with members.open(member) as stream:
        first_version = np.lib.format.read_magic(stream) == (1, 0)
        read_header = np.lib.format.read_array_header_1_0 if first_version else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
        available = member.file_size - stream.tell()
    if math.prod(shape) * dtype.itemsize > available:
        raise ValueError(f"{member.filename}: its header says shape {shape}, but it has {available:,} bytes")
    with members.open(member) as stream:
        return native(np.lib.format.read_array(stream, allow_pickle=False))


def _is_array(stream: IO[bytes]) -> bool:
    return stream.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
