"""The nodes of a graph with a constant weight, the layer that each belongs to, and the nodes that `keep` selects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.graphs.constants import constants_of, weight_fault
from tensorrail_runtime.graphs.files import descendants
from tensorrail_runtime.graphs.operators import CONTRIB

_WEIGHTS = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gemm": (1, 0),
    "MatMul": (1, 0),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
}
"""The inputs that may be the weight of an operator; the first of them that is constant is the weight."""

_CONTRIB_WEIGHTS = {"Attention": (1,)}
"""The same of operators of com.microsoft whose names mean something else in ONNX."""

_CORE = re.compile(r"(.+)/(?:\d+(?:\+\d+)*|identity|dense)(?:_\d+)?")
"""The exporter's names of constants: `<layer>/<cores>`, followed by `_2` if the name was taken."""

_QUANTIZED = re.compile(r"QuantizeLinear|DequantizeLinear|DynamicQuantizeLinear|QLinear.+|.+Integer|MatMulNBits|QGemm")


@dataclass(frozen=True)
class Weighted:
    """A node with a constant weight.

    Attributes:
        layer: name of the layer, as a plan or `keep` writes it.
        node: the node.
        place: index of the node's input that is the weight.
        weight: name of the weight's tensor.
        values: the weight.
        axis: axis of the weight's output channels.

    """

    layer: str
    node: onnx.NodeProto
    place: int
    weight: str
    values: np.ndarray
    axis: int


def weighted(model: onnx.ModelProto) -> tuple[Weighted, ...]:
    """Return the nodes of the main graph that have a constant weight, in order, without those in If, Loop and Scan bodies."""
    constants = constants_of(model.graph)
    layers = []
    for node in model.graph.node:
        places = (_CONTRIB_WEIGHTS if node.domain == CONTRIB else _WEIGHTS).get(node.op_type, ())
        place = next((p for p in places if p < len(node.input) and node.input[p] in constants), None)
        if place is not None:
            name = node.input[place]
            values = numpy_helper.to_array(constants[name])
            layers.append(Weighted(_layer(node, name), node, place, name, values, _axis(node, place, values.ndim)))
    return tuple(layers)


def kept_nodes(model: onnx.ModelProto, keep: Sequence[str]) -> frozenset[str]:
    """Return the names of the nodes that `keep` selects.

    Args:
        model: a model whose nodes all have names, see `with_names`.
        keep: names of layers, weights or nodes; the name of a layer includes all nodes that start with `<name>/`.

    Raises:
        GraphError: nothing in the graph has one of the names.

    """
    layers = weighted(model)
    kept: set[str] = set()
    for name in keep:
        selected = {w.node.name for w in layers if name in (w.layer, w.weight)}
        selected |= {node.name for node in _all_nodes(model.graph) if node.name == name or node.name.startswith(f"{name}/")}
        if not selected:
            known = ", ".join(dict.fromkeys(w.layer for w in layers)) or "none"
            raise GraphError(f"layer {name}: listed in keep, but not in the graph; its layers with weights are {known}")
        kept |= selected
    return frozenset(kept)


def with_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every node has a unique name; a node without one is named by its operator and position."""
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
    """Raise `GraphError` if the model is already quantized or has no float32 constant; `what` starts the message."""
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


def is_row(stored: onnx.TensorProto, width: int) -> bool:
    """Return whether a bias holds one value for each output, the same in all rows."""
    return tuple(stored.dims) in ((width,), (1, width))


def require_weights(model: onnx.ModelProto) -> None:
    """Raise `GraphError` for a weight that holds NaN or infinite values."""
    fault = weight_fault(model)
    if fault:
        raise GraphError(fault)


def _layer(node: onnx.NodeProto, weight: str) -> str:
    """Return the name by which a plan or a user would call the layer: of the cores, the module, the node or the weight."""
    if core := _CORE.fullmatch(weight):
        return core[1]
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    return node.name or weight


def _axis(node: onnx.NodeProto, place: int, rank: int) -> int:
    """Return the axis of the output channels in a weight with `rank` axes."""
    match node.op_type:
        case "Conv":
            return 0
        case "Gemm":
            flag = any(attribute.name == ("transB" if place else "transA") and attribute.i for attribute in node.attribute)
            return int(flag) if place == 0 else 1 - int(flag)
        case "MatMul":
            return rank - (1 if place else 2) if rank > 1 else 0
    return 1  # ConvTranspose (I, O / groups, *K); Attention (I, O); W of recurrent layers (directions, gates · hidden, I)


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for part in (graph, *descendants(graph)):
        yield from part.node
