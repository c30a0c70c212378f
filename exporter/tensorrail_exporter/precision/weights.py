"""The nodes of a graph that hold a constant weight, the layer that each belongs to, and what `keep` names among them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.graphs.cost import constants_of
from tensorrail_runtime.graphs.files import descendants

_WEIGHTS = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gemm": (1, 0),
    "MatMul": (1, 0),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
}
"""Where the operators that multiply take their weights: the first of these places that is constant is *the* weight."""

_CORE = re.compile(r"(.+)/(?:\d+(?:\+\d+)*|identity|dense)(?:_\d+)?")
"""How the exporter names its constants: `<layer>/<cores>`, `_2` behind it where the name was taken."""

_QUANTIZED = re.compile(r"QuantizeLinear|DequantizeLinear|DynamicQuantizeLinear|QLinear.+|.+Integer|MatMulNBits|QGemm")


@dataclass(frozen=True)
class Weighted:
    """A node with a constant weight. `axis` is that of the weight's output channels, `place` the weight's input."""

    layer: str
    node: onnx.NodeProto
    place: int
    weight: str
    values: np.ndarray
    axis: int


def weighted(model: onnx.ModelProto) -> tuple[Weighted, ...]:
    """Return the nodes of the graph that hold a constant weight, in its order; those of If, Loop and Scan bodies left out."""
    constants = constants_of(model.graph)
    found = []
    for node in model.graph.node:
        place = next((p for p in _WEIGHTS.get(node.op_type, ()) if p < len(node.input) and node.input[p] in constants), None)
        if place is not None:
            name = node.input[place]
            values = numpy_helper.to_array(constants[name])
            found.append(Weighted(_layer(node, name), node, place, name, values, _axis(node, place, values.ndim)))
    return tuple(found)


def kept_nodes(model: onnx.ModelProto, keep: Sequence[str]) -> frozenset[str]:
    """Return the names of the nodes that `keep` calls by their layer's name, their weight's or their own.

    Raises `GraphError` for a name that nothing has. All nodes must have names, see `with_names`.
    """
    layers = weighted(model)
    found: set[str] = set()
    for name in keep:
        called = {w.node.name for w in layers if name in (w.layer, w.weight)}
        called |= {node.name for node in _all_nodes(model.graph) if node.name == name or node.name.startswith(f"{name}/")}
        if not called:
            known = ", ".join(dict.fromkeys(w.layer for w in layers)) or "none"
            raise GraphError(f"layer {name}: listed in keep, but not in the graph; its layers with weights are {known}")
        found |= called
    return frozenset(found)


def with_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every node has a name of its own, made of its operator and place where it had none."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    taken: set[str] = set()
    for index, node in enumerate(_all_nodes(copy.graph)):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}_{index}"
        while node.name in taken:
            node.name += "_"
        taken.add(node.name)
    return copy


def check_fp32(model: onnx.ModelProto, what: str) -> None:
    """Raise `GraphError` for a model that is quantized already, or that has no float32 weight to convert."""
    quantized = next((node for node in _all_nodes(model.graph) if _QUANTIZED.fullmatch(node.op_type)), None)
    if quantized is not None:
        raise GraphError(
            f"the model is already quantized: node {quantized.name or quantized.op_type} is {quantized.op_type}; "
            f"{what} needs the fp32 model it was made from"
        )
    types = {tensor.data_type for tensor in constants_of(model.graph).values()}
    if onnx.TensorProto.FLOAT not in types:
        found = ", ".join(sorted(onnx.TensorProto.DataType.Name(kind).lower() for kind in types)) or "none at all"
        raise GraphError(f"{what} expects a model with float32 weights, got constants of type {found}; provide the fp32 model")


def _layer(node: onnx.NodeProto, weight: str) -> str:
    """Return the name that a plan or a user would give: of the cores, of the module, of the node, or of the weight."""
    if core := _CORE.fullmatch(weight):
        return core[1]
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    return node.name or weight


def _axis(node: onnx.NodeProto, place: int, rank: int) -> int:
    match node.op_type:
        case "Conv":
            return 0
        case "Gemm":
            flag = any(attribute.name == ("transB" if place else "transA") and attribute.i for attribute in node.attribute)
            return int(flag) if place == 0 else 1 - int(flag)
        case "MatMul":
            return rank - (1 if place else 2) if rank > 1 else 0
    return 1  # ConvTranspose (I, O / groups, *K); W of recurrent layers (directions, gates · hidden, I)


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for part in (graph, *descendants(graph)):
        yield from part.node
