"""Values of a model's inputs: of the type that the model takes, in the machine's byte order, contiguous and finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError

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

Values = Mapping[str, np.ndarray]


class Drawn(dict[str, np.ndarray]):
    """Inputs that were drawn at random, of which an error says so: integers may be no valid indices."""

    integers: tuple[str, ...] = ()
    """The inputs with random integers, which are 0 and 1."""

    @property
    def hint(self) -> str:
        """What to do if a model does not run on these inputs; empty if none of them are random integers."""
        if not self.integers:
            return ""
        return (
            f"; the values of {', '.join(self.integers)} are random, 0 and 1: give valid inputs from a file, or a constant "
            f"such as {self.integers[0]}=0"
        )


def native(array: object) -> np.ndarray:
    """Return values as an array in the machine's byte order and C-contiguous, which other libraries take for granted.

    Arrays of FITS and HDF5 files and of `np.fromfile` may have another byte order, and flipped ones have negative strides.

    Args:
        array: the values, of any shape; they are copied only where they have another order.

    Raises:
        ValueError: the values are no array, or an array that leaves some of its values out by a mask.

    """
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise ValueError("some of its values are masked; fill them first, with array.filled(…)")
    array = np.asarray(array)
    ordered = np.asarray(array, array.dtype.newbyteorder("="), order="C")
    return ordered.copy() if any(stride < 0 for stride in ordered.strides) else ordered  # along an axis of length 1


def typed(array: object, entry: ort.NodeArg, where: str) -> np.ndarray:
    """Return values in the type of a model's input, in native byte order and contiguous.

    Floats of any width become the model's; integers and booleans where no value changes.

    Args:
        array: the values, of any shape.
        entry: the input.
        where: the file or parameter that the values are from, for error messages.

    Raises:
        ModelError: the values are of another kind, such as bytes where the model takes floats, or not finite.

    """
    try:
        array = native(array)
    except ValueError as error:
        raise ModelError(f"{where}: input {entry.name!r} expects an array of numbers ({error})") from None
    expected = TYPES.get(entry.type)
    if expected is None:  # such as text
        return array
    if array.dtype.kind not in "fiub":
        what = "complex values" if array.dtype.kind == "c" else f"values of type {array.dtype}"
        raise ModelError(f"{where}: input {entry.name!r} expects {entry.type}, got {what}")
    with np.errstate(over="ignore", invalid="ignore"):  # found below
        cast: np.ndarray = np.asarray(array, expected, order="C")
    if np.issubdtype(expected, np.floating):
        if array.dtype == np.uint8:
            raise ModelError(
                f"{where}: input {entry.name!r} expects {entry.type}, got bytes, such as raw pixels; scale them as in training "
                "first"
            )
        if not np.isfinite(cast).all():
            raise ModelError(
                f"{where}: the array of input {entry.name!r} contains NaN or infinite values; expected finite ones"
            )
        return cast
    if array.dtype.kind == "f" or not np.array_equal(cast, array):
        raise ModelError(f"{where}: input {entry.name!r} expects {entry.type}, got values of type {array.dtype}")
    return cast


def require_shape(array: np.ndarray, entry: ort.NodeArg, axis: int | None, where: str) -> None:
    """Raise `ModelError` for an array with another number of axes, or another size of a fixed axis but `axis`."""
    if not entry.shape:  # a scalar, or a shape that is not declared
        return
    sizes = list(zip(entry.shape, array.shape, strict=False))
    wrong = [place for place, (size, actual) in enumerate(sizes) if isinstance(size, int) and size != actual and place != axis]
    if array.ndim != len(entry.shape) or wrong:
        expected = ", ".join(str(size or "?") for size in entry.shape)
        raise ModelError(f"{where}: input {entry.name!r} expects shape [{expected}], got an array of shape {list(array.shape)}")


def at_shape(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return values in another shape: axes in front are added, and every axis is cut, or repeated from its start.

    Args:
        array: the values, of at most as many axes as `shape`.
        shape: the shape to return.

    """
    array = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    for axis, size in enumerate(shape):
        if array.shape[axis] != size:
            array = np.take(array, np.arange(size) % array.shape[axis], axis)
    return np.asarray(array, order="C")


def save_values(values: Values, folder: Path) -> dict[str, object]:
    """Write values to a file for a fresh process, and return what `load_values` reads them by."""
    path = folder / "values.npz"
    np.savez(path, *values.values())
    return {"path": str(path), "names": list(values)}


def load_values(saved: Mapping[str, object] | None) -> dict[str, np.ndarray]:
    """Return the values that `save_values` wrote; none without a file."""
    if saved is None:
        return {}
    with np.load(str(saved["path"]), allow_pickle=False) as arrays:
        return dict(zip(saved["names"], (arrays[name] for name in arrays.files), strict=True))  # type: ignore[call-overload] # names
