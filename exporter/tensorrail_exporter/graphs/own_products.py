"""Finds products whose stored weight nothing else reads, so that both may be changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import helper

from tensorrail_exporter.graphs.parts import Network

STANDARD = ("", "ai.onnx")
"""The names of ONNX's own domain."""

SIZES_AS_INPUT = 13
"""The opset from which Split takes the sizes of its parts as an input."""

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


@dataclass(frozen=True)
class OwnProduct:
    """A MatMul, or a Gemm without factors, of data and a stored matrix."""

    name: str
    """The name of the layer: that of its weight, without `.weight`."""
    place: int
    """Its place among the nodes."""
    node: onnx.NodeProto
    """The node."""
    weight: onnx.TensorProto
    """The matrix."""
    transposed: bool
    """Whether it is stored as (outputs, inputs)."""


def visible_tensors(network: Network) -> set[str]:
    """Return the inputs and outputs of the graph, which a user may set or read."""
    return {value.name for value in (*network.graph.input, *network.graph.output)}


def own_products(network: Network) -> Iterator[OwnProduct]:
    """Yield the products of a graph, outside of bodies, whose weight only they read and no user may set."""
    visible = visible_tensors(network)
    for place, node in enumerate(network.nodes):
        if node.domain not in STANDARD or node.op_type not in ("MatMul", "Gemm") or node.input[0] == node.input[1]:
            continue
        weight = network.constants.get(node.input[1])
        if weight is None or weight.name in visible or len(network.readers[weight.name]) > 1:
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = not attributes.get("transA", 0) and attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0
        if plain and len(weight.dims) == 2 and 0 not in weight.dims and weight.data_type in _FLOATS:
            name = weight.name.removesuffix(".weight")
            yield OwnProduct(name, place, node, weight, bool(attributes.get("transB", 0)))
