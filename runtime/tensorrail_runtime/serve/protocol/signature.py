"""What a model takes and gives: names, datatypes and shapes, and whether a request fits them."""

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


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model."""

    name: str
    datatype: str
    shape: tuple[Axis, ...]

    def metadata(self) -> dict[str, Any]:
        """Return it as the protocol describes it; a dynamic axis is −1."""
        return {
            "name": self.name,
            "datatype": self.datatype,
            "shape": [size if isinstance(size, int) else -1 for size in self.shape],
        }


@dataclass(frozen=True)
class Signature:
    """A model's inputs and outputs."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, session: ort.InferenceSession) -> Signature:
        """Return a session's signature; `ModelError` for a model that takes or gives what the protocol has no datatype for."""
        return cls(_tensors("input", session.get_inputs()), _tensors("output", session.get_outputs()))

    @property
    def datatypes(self) -> dict[str, str]:
        """The inputs' datatypes by name."""
        return {tensor.name: tensor.datatype for tensor in self.inputs}

    def feed(self, request: InferRequest) -> dict[str, np.ndarray]:
        """Return the arrays that the session takes; `ProtocolError` says what does not fit the model.

        Axes of the same name have the same size in all inputs.
        """
        wanted = {tensor.name: tensor for tensor in self.inputs}
        for name in request.inputs:
            require_input(name, request.datatypes[name], self.datatypes)
        missing = [name for name in wanted if name not in request.inputs]
        if missing:
            raise ProtocolError(f"the model's input {missing[0]!r} is missing; its inputs are {', '.join(wanted)}")
        names = [tensor.name for tensor in self.outputs]
        for wish in request.outputs:
            if wish.name not in names:
                raise ProtocolError(f"the model has no output {wish.name!r:.80}; its outputs are {', '.join(names)}")
        sizes: dict[str, tuple[int, str]] = {}
        for name, tensor in wanted.items():
            _fits(tensor, request.inputs[name].shape, sizes)
        return {name: request.inputs[name] for name in wanted}

    def like(self, other: Signature) -> str | None:
        """Return in what another model differs from this one, None when it can answer the same requests in the same form."""
        for kind, ours, theirs in (("inputs", self.inputs, other.inputs), ("outputs", self.outputs, other.outputs)):
            mine = {tensor.name: tensor.datatype for tensor in ours}
            its = {tensor.name: tensor.datatype for tensor in theirs}
            if mine != its:
                return f"expected {kind} {_listed(mine)}, got {_listed(its)}"
        return None


def _tensors(kind: str, entries: Sequence[ort.NodeArg]) -> tuple[TensorSpec, ...]:
    made = []
    for entry in entries:
        if entry.type not in ONNX:
            raise ModelError(f"{kind} {entry.name!r} has type {entry.type}, which cannot be served: expected {', '.join(ONNX)}")
        made.append(TensorSpec(entry.name, ONNX[entry.type], tuple(entry.shape)))
    return tuple(made)


def _fits(tensor: TensorSpec, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
    """Raise `ProtocolError` unless the shape is one of the tensor's; `sizes` keeps those of the named axes."""
    if len(shape) != len(tensor.shape) or any(isinstance(a, int) and a != b for a, b in zip(tensor.shape, shape, strict=True)):
        raise ProtocolError(f"input {tensor.name!r}: expected shape {tensor.metadata()['shape']}, got {list(shape)}")
    for axis, size in zip(tensor.shape, shape, strict=True):
        if isinstance(axis, str) and sizes.setdefault(axis, (size, tensor.name))[0] != size:
            first, where = sizes[axis]
            raise ProtocolError(f"input {tensor.name!r}: expected {first} for axis {axis!r}, as in input {where!r}, got {size}")


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"
