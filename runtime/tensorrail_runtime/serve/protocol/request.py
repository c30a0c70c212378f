"""Reads an inference request of the Open Inference Protocol 2: JSON, or JSON followed by binary tensors.

The functions turn bytes into arrays and need no server. `signature.py` checks that the arrays fit the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic_core import from_json as parse_json

from tensorrail_runtime.errors import first_line
from tensorrail_runtime.serve.protocol import datatypes
from tensorrail_runtime.serve.protocol.errors import ProtocolError

_REQUEST = {"id", "inputs", "model_name", "model_version", "outputs", "parameters"}
_INPUT = {"data", "datatype", "name", "parameters", "shape"}
_LONGEST_NAME = 1000
_OUTPUT = {"name", "parameters"}
MOST_JSON = 8 << 20  # bytes: parsing them takes about a second
# Parameters that would change the answer and that this server does not support. Others are hints, which it ignores.
_REFUSED = {"sequence_end", "sequence_id", "sequence_start", "shared_memory_region"}


@dataclass(frozen=True)
class Wish:
    """An output that was requested by name.

    `binary` is None if the setting of the request applies. `classes` is how many best classes are asked for in place of the
    values; 0: none.
    """

    name: str
    binary: bool | None = None
    classes: int = 0


@dataclass(frozen=True)
class InferRequest:
    """A request: its inputs and their datatypes by name, and the requested outputs, empty for all."""

    inputs: Mapping[str, np.ndarray]
    datatypes: Mapping[str, str]
    outputs: tuple[Wish, ...] = ()
    binary: bool = False
    id: str | None = None
    model_name: str | None = None
    model_version: str | None = None


def parse_request(body: bytes, header_length: str | None = None, known: Mapping[str, str] | None = None) -> InferRequest:
    """Return the request in the body of an HTTP request.

    Args:
        body: JSON, or JSON followed by binary tensors.
        header_length: the text of the header `Inference-Header-Content-Length`, the length of the JSON part in bytes; without
            it, the whole body is JSON.
        known: the datatypes of the model's inputs by name; a tensor that does not fit is rejected before its values are read.

    Raises:
        ProtocolError: the request is not valid; the message says why, in one line.

    """
    view = memoryview(body)
    length = _header_length(header_length, len(view))
    if length > MOST_JSON:
        raise ProtocolError(
            f"expected at most {MOST_JSON:,} bytes of JSON, got {length:,}: send large tensors as binary data",
            413,
        )
    tail = view[length:] if header_length is not None else None
    try:
        content = parse_json(bytes(view[:length]), allow_inf_nan=False)
    except ValueError as error:
        raise ProtocolError(f"the request is not JSON: {first_line(error)}") from None
    content = _object("the request", content, _REQUEST)
    binary = _flag(_parameters("the request", content), "binary_data_output", "the request")
    inputs, kinds = _inputs(content.get("inputs"), tail, known)
    return InferRequest(
        inputs=inputs,
        datatypes=kinds,
        outputs=_outputs(content.get("outputs")),
        binary=bool(binary),
        id=_text(content, "id", "the request"),
        model_name=_text(content, "model_name", "the request"),
        model_version=_text(content, "model_version", "the request"),
    )


def _header_length(text: str | None, size: int) -> int:
    if text is None:
        return size
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= size):
        raise ProtocolError(
            f"expected Inference-Header-Content-Length to be the length of the JSON part, 0 to {size}, got {text!r:.40}"
        )
    return int(text)


def _inputs(
    entries: object, tail: memoryview | None, expected: Mapping[str, str] | None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return arrays and datatypes by name; binary tensors are read from `tail` one after another."""
    if not isinstance(entries, list) or not entries:
        raise ProtocolError("the request: expected `inputs` as a list of one or more tensors")
    arrays: dict[str, np.ndarray] = {}
    kinds: dict[str, str] = {}
    position = 0
    for entry in entries:
        tensor = _object("an input", entry, _INPUT)
        name = _text(tensor, "name", "an input")
        if name is None:
            raise ProtocolError("an input: expected a `name`, got none")
        if len(name) > _LONGEST_NAME:
            raise ProtocolError(
                f"an input: expected a name of at most {_LONGEST_NAME:,} characters, got {len(name):,}: {name!r:.40} …"
            )
        if name in arrays:
            raise ProtocolError(f"tensor {name!r}: given twice")
        datatype = tensor.get("datatype")
        if not isinstance(datatype, str) or datatype not in datatypes.DATATYPES:
            known = ", ".join(datatypes.DATATYPES)
            raise ProtocolError(f"tensor {name!r}: expected a datatype among {known}, got {datatype!r:.40}")
        if expected is not None:
            require_input(name, datatype, expected)
        shape = datatypes.check_shape(name, tensor.get("shape"))
        size = _parameters(f"tensor {name!r}", tensor).get("binary_data_size")
        if ("data" in tensor) == (size is not None):
            raise ProtocolError(f"tensor {name!r}: expected its values either as `data` or as `binary_data_size` bytes")
        if size is None:
            arrays[name] = datatypes.from_json(name, datatype, shape, tensor["data"])
        else:
            values = _slice(name, size, position, tail)
            position += len(values)
            arrays[name] = datatypes.from_binary(name, datatype, shape, values)
        kinds[name] = datatype
    if tail is not None and position != len(tail):
        raise ProtocolError(f"expected {position} bytes of tensors after the JSON part, got {len(tail)}")
    return arrays, kinds


def require_input(name: str, datatype: str, known: Mapping[str, str]) -> None:
    """Raise `ProtocolError` for a tensor that is not an input of the model, or has another datatype."""
    if name not in known:
        raise ProtocolError(f"the model has no input {name!r:.80}; its inputs are {', '.join(known)}")
    if datatype != known[name]:
        raise ProtocolError(f"input {name!r}: expected datatype {known[name]}, got {datatype}")


def _slice(name: str, size: object, start: int, tail: memoryview | None) -> memoryview:
    if type(size) is not int or size < 0:
        raise ProtocolError(f"tensor {name!r}: expected `binary_data_size` as a number of bytes, got {size!r:.40}")
    if tail is None:
        raise ProtocolError(f"tensor {name!r}: binary data needs the header Inference-Header-Content-Length")
    if size > len(tail) - start:
        raise ProtocolError(f"tensor {name!r}: expected {size} bytes of binary data, got {len(tail) - start}")
    return tail[start : start + size]


def _outputs(entries: object) -> tuple[Wish, ...]:
    if entries is None:
        return ()
    if not isinstance(entries, list):
        raise ProtocolError("the request: expected `outputs` as a list of outputs")
    wishes: dict[str, Wish] = {}
    for entry in entries:
        output = _object("an output", entry, _OUTPUT)
        name = _text(output, "name", "an output")
        if name is None:
            raise ProtocolError("an output: expected a `name`, got none")
        if name in wishes:
            raise ProtocolError(f"output {name!r:.80}: requested twice")
        parameters = _parameters(f"output {name!r}", output, of_output=True)
        classes = parameters.get("classification") or 0
        if type(classes) is not int or classes < 0:
            raise ProtocolError(f"output {name!r:.80}: expected `classification` as a number of classes, got {classes!r:.40}")
        wishes[name] = Wish(name, _flag(parameters, "binary_data", f"output {name!r:.80}"), classes)
    return tuple(wishes.values())


def _object(what: str, value: object, known: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ProtocolError(f"{what}: expected an object, got {type(value).__name__}")
    unknown = sorted(set(value) - known)
    if unknown:
        raise ProtocolError(f"{what}: unknown key {unknown[0]!r:.40}; expected {', '.join(sorted(known))}")
    return value


def _parameters(what: str, owner: dict[str, Any], *, of_output: bool = False) -> dict[str, Any]:
    parameters = owner.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise ProtocolError(f"{what}: expected `parameters` as an object")
    refused = sorted(
        (_REFUSED if of_output else _REFUSED | {"classification"}) & {key for key, value in parameters.items() if value}
    )
    if refused:
        raise ProtocolError(f"{what}: the parameter {refused[0]!r} is not supported by this server")
    return parameters


def _flag(parameters: Mapping[str, Any], key: str, what: str) -> bool | None:
    value = parameters.get(key)
    if value is not None and not isinstance(value, bool):
        raise ProtocolError(f"{what}: expected `{key}` as true or false, got {value!r:.40}")
    return value


def _text(owner: Mapping[str, Any], key: str, what: str) -> str | None:
    value = owner.get(key)
    if value is not None and not isinstance(value, str):
        raise ProtocolError(f"{what}: expected `{key}` as a string, got {value!r:.40}")
    return value
