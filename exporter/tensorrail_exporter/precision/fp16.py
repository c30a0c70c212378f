"""Conversion of a dense or factorized graph to fp16, with the converter that ships with ONNX Runtime.

Source: "Create Float16 and Mixed Precision Models", onnxruntime.ai/docs/performance/model-optimizations/float16.html.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper

from tensorrail_exporter.graphs.io import check_model, export_graph, import_graph, save_model
from tensorrail_exporter.precision.prepared import Prepared, plain_constants
from tensorrail_exporter.precision.ranges import LARGEST
from tensorrail_exporter.precision.weights import check_fp32, kept_nodes, require_weights, weighted, with_names
from tensorrail_runtime.errors import GraphError, first_line
from tensorrail_runtime.graphs.constants import constants_of
from tensorrail_runtime.graphs.files import bodies_of, descendants
from tensorrail_runtime.graphs.operators import CONTRIB
from tensorrail_runtime.scratch import scratch

_KEEP = "name the layer or node that cannot be converted in `keep`: it then stays in fp32"

_OFF = -1e9  # values of a mask are at most so high
_MULTIPLY = ("Conv", "ConvTranspose", "Einsum", "Gather", "Gemm", "GRU", "LSTM", "MatMul", "RNN")
"""The operators whose constants must be within the range: products, and embeddings. See also `_multiplies`."""

_CONTRIB_MULTIPLY = {"Attention": (1, 2), "MultiHeadAttention": (3,)}
"""The same of com.microsoft, with the places of weights and biases: other constants of these are masks."""


def to_fp16(model: onnx.ModelProto, *, keep: Sequence[str] = ()) -> onnx.ModelProto:
    """Return a copy of the model with float16 weights and activations, by `onnxruntime.transformers.float16`.

    Inputs and outputs stay float32, with a cast between them and the graph.

    Operators in the converter's own list (Min, Max, TopK, Range, CumSum and others) stay float32. Weights, biases and tables
    must be within ±65504, also in the bodies of If, Loop and Scan. Other constants, such as the fill value of a mask, are
    clamped to that range, and magnitudes below 5.96e-8 are raised to that value. Only a run shows whether the *activations*
    stay within the range: see `ranges.require_finite`.

    Args:
        model: the fp32 model; it is not changed.
        keep: names of layers, weights or nodes that stay float32. There is no cast between two neighbours that do. For a node
            in the body of an If, Loop or Scan, that whole node of the graph stays float32.

    Raises:
        GraphError: a weight, bias or table is outside the range of fp16, a name in `keep` is not in the graph, the model is
            already quantized or has no float32 weight, or the converter fails.

    """
    named = with_names(plain_constants(model))
    check_fp32(named, "fp16")
    require_weights(named)
    kept = _whole(named, kept_nodes(named, keep))
    _require_weights_fit(named, kept)
    kept |= _constants_of_kept(named, kept)
    prepared = Prepared(named)
    with scratch() as folder:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        path = Path(folder) / "fp32.onnx"
        save_model(prepared.model, path)
        blocked = sorted(prepared.node_code(name) for name in kept)
        try:
            # Given the path, the converter infers shapes from file to file; nothing else works above 2 GiB.
            converted = convert_float_to_float16(str(path), keep_io_types=True, node_block_list=blocked)
        except Exception as error:  # noqa: BLE001 - the library raises assertions and errors of protobuf
            reason = prepared.text(first_line(error)) or type(error).__name__
            raise GraphError(f"the graph cannot be converted to fp16 ({reason}); {_KEEP}") from None
    _cast_for_bodies(converted, prepared.model, blocked)
    _remove_repeated_casts(converted)
    graph = import_graph(converted)
    _remove_double_casts(graph)
    result = prepared.restored(export_graph(graph, converted))
    try:
        check_model(result, named)
    except GraphError as error:
        raise GraphError(f"the fp16 graph is not valid: {error}; {_KEEP}") from None
    return result


@dataclass
class LargeConstant:
    """A float32 constant with values outside the range of fp16, which the converter would clamp.

    Attributes:
        name: the constant's tensor.
        value: its largest magnitude that is finite.
        readers: the nodes of the main graph that read it, themselves or in a body.
        multiplied: whether a product or an embedding reads it; otherwise it may be a mask.

    """

    name: str
    value: float
    readers: list[str] = field(default_factory=list)
    multiplied: bool = False


def too_large(model: onnx.ModelProto) -> list[LargeConstant]:
    """Return the weights, biases and tables of all graphs of a model that have values outside the range of fp16.

    Args:
        model: a model whose nodes all have names, see `with_names`, and whose constants are tensors, see `plain_constants`.

    """
    found: list[LargeConstant] = []
    _find_large(model.graph, {}, {}, "", found)
    return [constant for constant in found if constant.multiplied]


def _find_large(
    graph: onnx.GraphProto,
    outer: Mapping[str, LargeConstant],
    outside: Mapping[str, onnx.TensorProto],
    around: str,
    found: list[LargeConstant],
) -> None:
    """Add the large constants of a graph and of its bodies.

    Args:
        graph: the graph.
        outer: the large constants around it.
        outside: all constants around it.
        around: the node of the main graph that has it as a body; empty for the main graph.
        found: receives the constants.

    """
    constants = constants_of(graph)
    large = {name: LargeConstant(name, value) for name, t in constants.items() if (value := _largest(t)) > LARGEST}
    found += large.values()
    known, constants = {**outer, **large}, {**outside, **constants}
    layers = {node.output[0] for node in graph.node if node.op_type == "MatMul" and any(n in constants for n in node.input)}
    for node in graph.node:
        adds = node.op_type == "Add" and any(name in layers for name in node.input)
        for place, name in enumerate(node.input):
            if name in known:
                known[name].readers.append(around or node.name)
                known[name].multiplied |= _multiplies(node, place) or (adds and _is_bias(constants[name]))
        for body in bodies_of(node):
            _find_large(body, known, constants, around or node.name, found)


def _largest(tensor: onnx.TensorProto) -> float:
    """Return the largest finite magnitude in a float32 tensor; 0 for other types."""
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return 0.0
    size = np.abs(numpy_helper.to_array(tensor))
    return float(size.max(initial=0.0, where=np.isfinite(size)))


def _is_bias(tensor: onnx.TensorProto) -> bool:
    """Return whether what is added to a product is a bias: a vector, and no mask that switches classes off."""
    values = numpy_helper.to_array(tensor)
    masks = np.all(values[np.abs(values) > LARGEST] <= _OFF)
    return math.prod(tensor.dims[:-1]) == 1 and not masks


def _multiplies(node: onnx.NodeProto, place: int) -> bool:
    """Return whether a constant input of a node is a weight, a bias or a table, or a statistic of a normalization.

    A vector that is added to the output of a MatMul is a bias as well, but not an input of that node.
    """
    if node.domain == CONTRIB:
        return place in _CONTRIB_MULTIPLY.get(node.op_type, ())
    return node.op_type in _MULTIPLY or (node.op_type == "BatchNormalization" and place > 0)


def _require_weights_fit(model: onnx.ModelProto, kept: frozenset[str]) -> None:
    layers = {w.node.name: w.layer for w in weighted(model)}
    for constant in too_large(model):
        reader = next((node for node in constant.readers if node not in kept), None)
        if reader is not None:
            layer = layers.get(reader, reader)
            raise GraphError(
                f"layer {layer}: its weight {constant.name} contains {constant.value:.3g}, outside the fp16 range of "
                f"±{LARGEST:.0f}; keep layer {layer} in fp32, or scale it down"
            )


def _whole(model: onnx.ModelProto, names: frozenset[str]) -> frozenset[str]:
    """Return the nodes of the main graph that have one of the names, or a node of that name in a body."""
    return frozenset(
        node.name
        for node in model.graph.node
        if node.name in names or any(inner.name in names for graph in _graphs_in(node) for inner in graph.node)
    )


def _graphs_in(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Return the bodies of a node, and all bodies inside them."""
    return [graph for body in bodies_of(node) for graph in (body, *descendants(body))]


def _constants_of_kept(model: onnx.ModelProto, kept: frozenset[str]) -> frozenset[str]:
    """Return the Constant nodes that only kept nodes read, because the converter would round their values."""
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for reader in (node, *(inner for graph in _graphs_in(node) for inner in graph.node)):
            for name in reader.input:
                readers.setdefault(name, set()).add(node.name)
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    return frozenset(node.name for node in constants if readers.get(node.output[0]) and readers[node.output[0]] <= kept)


def _cast_for_bodies(converted: onnx.ModelProto, before: onnx.ModelProto, kept: Collection[str]) -> None:
    """Give the bodies of kept nodes float32 tensors, in place: the converter casts what a node reads, but not what bodies read.

    Args:
        converted: the converted model, in which no name is used twice, also not in bodies.
        before: the model that it was made from.
        kept: names of nodes that stay float32.

    """
    halves = _halves(converted.graph)
    for name in _halves(before.graph):
        halves.pop(name, None)
    graphs = [graph for node in converted.graph.node if node.name in kept for graph in _graphs_in(node)]
    read: dict[str, None] = {}
    for node in (node for graph in graphs for node in graph.node):
        for place, name in enumerate(node.input):
            if name in halves:
                node.input[place] = f"{name}_cast_to_fp32"  # as the converter names it
                read[name] = None
    for name in read:
        value = converted.graph.value_info.add()
        value.CopyFrom(halves[name])
        value.name, value.type.tensor_type.elem_type = f"{name}_cast_to_fp32", onnx.TensorProto.FLOAT
        cast = helper.make_node("Cast", [name], [value.name], f"{value.name}_node", to=onnx.TensorProto.FLOAT)
        converted.graph.node.append(cast)


def _halves(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    """Return the float16 tensors of a graph, without those of its bodies, as far as types are known."""
    half = onnx.TensorProto.FLOAT16
    stored = [helper.make_tensor_value_info(t.name, half, t.dims) for t in graph.initializer if t.data_type == half]
    values = (*graph.value_info, *graph.input, *graph.output, *stored)
    return {value.name: value for value in values if value.type.tensor_type.elem_type == half}


def _remove_repeated_casts(model: onnx.ModelProto) -> None:
    """Leave one of the casts of each tensor: the converter adds one of the same name for every kept node that reads it."""
    written: set[str] = set()
    for graph in (model.graph, *descendants(model.graph)):
        for node in [node for node in graph.node if node.op_type == "Cast"]:
            if node.output[0] in written:
                graph.node.remove(node)
            written.add(node.output[0])


def _remove_double_casts(graph: gs.Graph) -> None:
    """X → Cast(fp16) → Cast(fp32) → Y  becomes  X → Y, where the converter put the casts between two float32 nodes."""
    for up in [node for node in graph.nodes if node.op == "Cast"]:
        down = up.inputs[0].inputs[0] if up.inputs and up.inputs[0].inputs else None
        if down is None or down.op != "Cast" or not (_added(up.name, "fp32", "output") and _added(down.name, "fp16", "input")):
            continue
        source, target = down.inputs[0], up.outputs[0]
        up.outputs.clear()
        if any(target is output for output in graph.outputs):
            if not source.inputs:  # an input that is also an output: there is nothing but the casts in between
                up.outputs.append(target)
                continue
            for reader in list(source.outputs):
                reader.inputs = [target if tensor is source else tensor for tensor in reader.inputs]
            producer = source.inputs[0]
            producer.outputs = [target if tensor is source else tensor for tensor in producer.outputs]
        else:
            for reader in list(target.outputs):
                reader.inputs = [source if tensor is target else tensor for tensor in reader.inputs]


def _added(name: str, to: str, side: str) -> bool:
    """Return whether the converter has added the Cast of this name."""
    return name.endswith(f"_cast_to_{to}_node") or name.startswith(f"graph_{side}_cast")
