"""The inputs and outputs of a model (names, datatypes and shapes), and the check that a request fits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.serve.protocol.datatypes import ONNX
from tensorrail_runtime.serve.protocol.errors import ProtocolError
from tensorrail_runtime.serve.protocol.request import InferRequest, require_input

Axis = int | str | None  # a fixed size, the name of a dynamic axis, or a dynamic axis without a name


_TRITON = {"BYTES": "STRING"}  # the datatypes that have another name in a configuration


@dataclass(frozen=True)
class TensorSpec:
    """The name, datatype and shape of one input or output."""

    name: str
    datatype: str
    shape: tuple[Axis, ...]

    def metadata(self) -> dict[str, Any]:
        """Return the tensor's metadata in the form of the protocol; a dynamic axis is −1."""
        return {
            "name": self.name,
            "datatype": self.datatype,
            "shape": [size if isinstance(size, int) else -1 for size in self.shape],
        }


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a model."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, session: ort.InferenceSession) -> Signature:
        """Return the signature of a session's model; raises `ModelError` for a type that the protocol does not have."""
        return cls(_tensors("input", session.get_inputs()), _tensors("output", session.get_outputs()))

    def configuration(self, name: str) -> dict[str, Any]:
        """Return the configuration of the model in the form of Triton, as its clients ask for it; dims include the batch."""
        described = {
            kind: [
                {"name": t.name, "data_type": f"TYPE_{_TRITON.get(t.datatype, t.datatype)}", "dims": t.metadata()["shape"]}
                for t in tensors
            ]
            for kind, tensors in (("input", self.inputs), ("output", self.outputs))
        }
        return {"name": name, "platform": "onnxruntime_onnx", "backend": "onnxruntime", "max_batch_size": 0, **described}

    @property
    def datatypes(self) -> dict[str, str]:
        """The datatypes of the inputs, by name."""
        return {tensor.name: tensor.datatype for tensor in self.inputs}

    def feed(self, request: InferRequest) -> dict[str, np.ndarray]:
        """Return the inputs of the session; raises `ProtocolError` for a request that does not fit the model.

        Axes of the same name must have the same size in all inputs.
        """
        expected = {tensor.name: tensor for tensor in self.inputs}
        for name in request.inputs:
            require_input(name, request.datatypes[name], self.datatypes)
        missing = [name for name in expected if name not in request.inputs]
        if missing:
            raise ProtocolError(f"the model's input {missing[0]!r} is missing; its inputs are {', '.join(expected)}")
        names = [tensor.name for tensor in self.outputs]
        for wish in request.outputs:
            if wish.name not in names:
                raise ProtocolError(f"the model has no output {wish.name!r:.80}; its outputs are {', '.join(names)}")
        sizes: dict[str, tuple[int, str]] = {}
        for name, tensor in expected.items():
            _fits(tensor, request.inputs[name].shape, sizes)
        return {name: request.inputs[name] for name in expected}

    def like(self, other: Signature) -> str | None:
        """Return how another model differs from this one; None if it answers the same requests in the same form."""
        for kind, ours, theirs in (("inputs", self.inputs, other.inputs), ("outputs", self.outputs, other.outputs)):
            expected = {tensor.name: tensor.datatype for tensor in ours}
            found = {tensor.name: tensor.datatype for tensor in theirs}
            if expected != found:
                return f"expected {kind} {_listed(expected)}, got {_listed(found)}"
        return None


def _tensors(kind: str, entries: Sequence[ort.NodeArg]) -> tuple[TensorSpec, ...]:
    tensors = []
    for entry in entries:
        if entry.type not in ONNX:
            raise ModelError(f"{kind} {entry.name!r} has type {entry.type}, which cannot be served: expected {', '.join(ONNX)}")
        tensors.append(TensorSpec(entry.name, ONNX[entry.type], tuple(entry.shape)))
    return tuple(tensors)


def _fits(tensor: TensorSpec, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
    """Raise `ProtocolError` for a shape that does not fit; `sizes` holds the sizes of named axes so far, and is updated."""
    if len(shape) != len(tensor.shape) or any(isinstance(a, int) and a != b for a, b in zip(tensor.shape, shape, strict=True)):
        raise ProtocolError(f"input {tensor.name!r}: expected shape {tensor.metadata()['shape']}, got {list(shape)}")
    for axis, size in zip(tensor.shape, shape, strict=True):
        if isinstance(axis, str) and sizes.setdefault(axis, (size, tensor.name))[0] != size:
            first, owner = sizes[axis]
            raise ProtocolError(f"input {tensor.name!r}: expected {first} for axis {axis!r}, as in input {owner!r}, got {size}")


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"
