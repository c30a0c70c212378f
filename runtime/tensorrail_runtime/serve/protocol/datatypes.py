"""The datatypes of the protocol, with NumPy's and ONNX Runtime's names, and reading and writing of tensor values.

JSON values are lists, flat or nested as the shape says. Binary values are little-endian, row-major and without padding; a
BYTES element is its length as a 4-byte unsigned integer followed by its bytes (Open Inference Protocol 2 and its extension for
binary tensor data). Every function raises `ProtocolError` with the name of the tensor.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from tensorrail_runtime.serve.protocol.errors import ProtocolError

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
ONNX = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
_MOST_AXES = 64  # NumPy's own limit
_LONGEST = 2**31 - 1  # largest size of an axis
MOST_STRINGS = 1 << 20  # in a tensor: reading more takes longer than half a second
_LENGTH = struct.Struct("<I")


def check_shape(name: str, shape: object) -> tuple[int, ...]:
    """Return a shape from JSON as a tuple of sizes of 1 or more; raises `ProtocolError` for other values."""
    if not isinstance(shape, list) or any(type(size) is not int for size in shape):
        raise ProtocolError(f"tensor {name!r}: expected its shape as a list of integers, got {shape!r:.80}")
    if any(not 1 <= size <= _LONGEST for size in shape):
        raise ProtocolError(f"tensor {name!r}: expected axes of size 1 to {_LONGEST}, got shape {_short(shape)}")
    if len(shape) > _MOST_AXES:
        raise ProtocolError(f"tensor {name!r}: expected a shape of at most {_MOST_AXES} axes, got {len(shape)}")
    return tuple(shape)


def _short(shape: list[int]) -> str:
    return str([size if abs(size) <= _LONGEST else "more" for size in shape[:8]])


def from_json(name: str, datatype: str, shape: tuple[int, ...], data: object) -> np.ndarray:
    """Return JSON values as an array; their kind must fit the datatype, their number the shape, and they must be finite."""
    if datatype == "FP16":
        raise ProtocolError(f"tensor {name!r}: JSON has no FP16: send its values as binary data")
    dtype = DATATYPES[datatype]
    if datatype == "BYTES":
        _check_number(name, shape)
    values = _flat(name, shape, data)
    kinds = set(map(type, values))
    allowed = _KINDS.get(dtype.kind, {int})
    if not kinds <= allowed:
        unexpected = ", ".join(sorted(_JSON.get(kind, kind.__name__) for kind in kinds - allowed))
        raise ProtocolError(
            f"tensor {name!r}: expected {_KIND_NAMES.get(dtype.kind, 'integers')} for {datatype}, got {unexpected}"
        )
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype).reshape(shape)
    except OverflowError:
        raise ProtocolError(f"tensor {name!r}: contains a number outside the range of {datatype}") from None
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise ProtocolError(f"tensor {name!r}: contains a number outside the range of {datatype}: send infinity as binary data")
    return array


def to_json(name: str, array: np.ndarray) -> list[Any]:
    """Return the values of an array as a flat list; raises `ProtocolError` for values that JSON cannot represent."""
    if array.dtype == np.float16:
        raise ProtocolError(f"output {name!r} is FP16, which JSON cannot represent: request it as binary data")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ProtocolError(f"output {name!r} holds NaN or infinity, which JSON cannot represent: request it as binary data")
    values: list[Any] = array.ravel().tolist()
    return values


def from_binary(name: str, datatype: str, shape: tuple[int, ...], data: memoryview) -> np.ndarray:
    """Return binary values as an array, a view of `data` if possible; their length must fit the shape."""
    count = math.prod(shape)
    if datatype == "BYTES":
        return _strings(name, shape, count, data)
    dtype = DATATYPES[datatype]
    if len(data) != count * dtype.itemsize:
        raise ProtocolError(
            f"tensor {name!r}: expected {count * dtype.itemsize} bytes for {datatype} of shape {list(shape)}, got {len(data)}"
        )
    if datatype == "BOOL" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise ProtocolError(f"tensor {name!r}: expected bytes 0 or 1 for BOOL, got another value")
    return np.frombuffer(data, dtype).reshape(shape)


def to_binary(array: np.ndarray) -> bytes:
    """Return the values of an array as binary data."""
    if array.dtype == object:
        encoded = [value.encode() for value in array.ravel()]
        return b"".join(chain.from_iterable((_LENGTH.pack(len(value)), value) for value in encoded))
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


_KINDS: dict[str, set[type]] = {"b": {bool}, "f": {float, int}, "O": {str}}  # all others: integers
_KIND_NAMES = {"b": "true or false", "f": "numbers", "O": "strings"}
_JSON = {
    bool: "true or false",
    int: "an integer",
    float: "a fraction",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def _flat(name: str, shape: tuple[int, ...], data: object) -> Sequence[Any]:
    """Return the values in row-major order: `data` itself if it is flat, else its leaves."""
    if not isinstance(data, list):
        raise ProtocolError(f"tensor {name!r}: expected its data as a list, got {_JSON.get(type(data), type(data).__name__)}")
    count, values = math.prod(shape), data
    if len(shape) > 1 and values and type(values[0]) is list:
        for axis in range(len(shape)):
            if len(values) != math.prod(shape[: axis + 1]):
                break
            if axis == len(shape) - 1:
                return values
            if set(map(type, values)) != {list} or set(map(len, values)) != {shape[axis + 1]}:
                break
            values = list(chain.from_iterable(values))
        raise ProtocolError(f"tensor {name!r}: expected nested data of shape {list(shape)}, got another nesting")
    if len(values) != count:
        raise ProtocolError(f"tensor {name!r}: expected {count} values for shape {list(shape)}, got {len(values)}")
    return values


def _check_number(name: str, shape: tuple[int, ...]) -> None:
    """Raise `ProtocolError` for more strings than a tensor may hold."""
    if math.prod(shape) > MOST_STRINGS:
        raise ProtocolError(f"tensor {name!r}: expected at most {MOST_STRINGS:,} strings, got shape {list(shape)}")


def _strings(name: str, shape: tuple[int, ...], count: int, data: memoryview) -> np.ndarray:
    """Return an array of strings from length-prefixed UTF-8 bytes."""
    _check_number(name, shape)
    values: list[str] = []
    position = 0
    while position < len(data) and len(values) < count:
        remaining = len(data) - position - _LENGTH.size
        if remaining < 0 or remaining < _LENGTH.unpack_from(data, position)[0]:
            raise ProtocolError(f"tensor {name!r}: a BYTES element is longer than the rest of its tensor")
        start = position + _LENGTH.size
        position = start + _LENGTH.unpack_from(data, position)[0]
        try:
            values.append(bytes(data[start:position]).decode())
        except UnicodeDecodeError:
            raise ProtocolError(f"tensor {name!r}: expected UTF-8 in a BYTES element, got other bytes") from None
    if position != len(data) or len(values) != count:
        raise ProtocolError(f"tensor {name!r}: expected {count} elements for shape {list(shape)}, got bytes of another number")
    return np.array(values, object).reshape(shape)
