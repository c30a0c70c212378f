"""Nodes and stored tensors of an ONNX graph, in the form in which torch runs them.

float16 and bfloat16 are computed in float32: initializers, constants and casts of these types become float32. Trained values
are converted back when they are written to a model.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, TensorProto, numpy_helper
from torch import Tensor

from tensorrail_runtime.errors import GraphError

Inputs = Sequence[Any]
"""The input tensors of a node, with None for an optional input that is absent."""

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float32,
    TensorProto.BFLOAT16: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.BOOL: torch.bool,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
}
"""The element types of ONNX that are supported, with the dtype that torch computes them in."""

_SMALL = 256  # elements: constant inputs up to this size (shapes, axes, scalars) are read once, at construction


@dataclass(frozen=True)
class Node:
    """A node: operator, name, decoded attributes, opset, and the names of its inputs and outputs."""

    op: str
    name: str
    attributes: Mapping[str, Any]
    opset: int
    inputs: tuple[str, ...]  # "" for an optional input that is absent
    outputs: tuple[str, ...]
    constants: Mapping[int, Any] = field(default_factory=dict)  # values of small constant inputs, by their index

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the default if the node does not have it."""
        return self.attributes.get(name, default)

    def integers(self, inputs: Inputs, index: int, attribute: str = "") -> list[int] | None:
        """Return a list that is an attribute in old opsets and an input in new ones, or None if it is absent."""
        if attribute in self.attributes:
            return list(self.attributes[attribute])
        if index in self.constants:
            values = self.constants[index]
            return list(values) if isinstance(values, list) else [values]
        if index >= len(inputs) or inputs[index] is None:
            return None
        return [int(value) for value in inputs[index].reshape(-1).tolist()]

    def scalar(self, inputs: Inputs, index: int, attribute: str = "") -> Any:
        """Return a scalar that is an attribute or an input: a number if it is constant, else a tensor, or None if absent."""
        if attribute in self.attributes:
            return self.attributes[attribute]
        constant = self.constants.get(index)
        if constant is not None and not isinstance(constant, list):
            return constant
        return inputs[index] if index < len(inputs) else None

    def __str__(self) -> str:
        name = self.name or next((output for output in self.outputs if output), "")
        return f"node {name!r} ({self.op})"


def read_node(proto: onnx.NodeProto, opset: int, constants: Mapping[str, Tensor], used: Container[str]) -> Node:
    """Convert a node to the form that the operators take.

    Args:
        proto: the node.
        opset: the opset of the model.
        constants: the tensors that depend on neither the inputs nor the training, by name.
        used: the tensors that some node or graph output uses; other outputs are dropped, except for the first one.

    Returns:
        The node.

    Raises:
        GraphError: an attribute holds a graph, or refers to an attribute of a function.

    """
    outputs = tuple(name if name in used or not index else "" for index, name in enumerate(proto.output))
    node = Node(proto.op_type, proto.name, {}, opset, tuple(proto.input), outputs)
    attributes = {attribute.name: _attribute(attribute, node) for attribute in proto.attribute}
    known = {
        index: constants[name].tolist()
        for index, name in enumerate(proto.input)
        if name in constants and constants[name].numel() <= _SMALL and constants[name].dim() <= 1
    }
    return Node(node.op, node.name, attributes, opset, node.inputs, node.outputs, known)


def read_tensor(proto: TensorProto) -> Tensor:
    """Return a stored tensor in the dtype of `DTYPES`. Raises `GraphError` for other types and for external data."""
    if proto.data_location == TensorProto.EXTERNAL:
        raise GraphError(f"tensor {proto.name!r}: its external data was not loaded; load the model with load_model")
    if proto.data_type not in DTYPES:
        supported = ", ".join(map(_type_name, DTYPES))
        raise GraphError(f"tensor {proto.name!r}: expected one of the types {supported}, got {_type_name(proto.data_type)}")
    try:
        values = numpy_helper.to_array(proto)
    except ValueError as error:
        raise GraphError(f"tensor {proto.name!r}: {error}") from None
    dtype = DTYPES[proto.data_type]
    if dtype is torch.float32:
        values = values.astype(np.float32)  # torch does not accept the bfloat16 arrays of NumPy
    return torch.from_numpy(np.array(values))


def _attribute(attribute: AttributeProto, node: Node) -> Any:
    if attribute.ref_attr_name or attribute.type == AttributeProto.UNDEFINED:
        raise GraphError(
            f"{node}: attribute {attribute.name!r} has no value; attributes that refer to a function are not supported"
        )
    value = onnx.helper.get_attribute_value(attribute)
    match value:
        case bytes():
            return value.decode(errors="replace")
        case TensorProto():
            return read_tensor(value)
        case int() | float():
            return value
        case _ if attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS):
            return list(value)
        case _ if attribute.type == AttributeProto.STRINGS:
            return [text.decode(errors="replace") for text in value]
        case _:
            raise GraphError(f"{node}: attribute {attribute.name!r} is a {type(value).__name__}, which is not supported")


def _type_name(data_type: int) -> str:
    return str(TensorProto.DataType.Name(data_type)) if data_type in TensorProto.DataType.values() else str(data_type)
