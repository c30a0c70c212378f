"""Conversion of a dense or factorized graph to fp16, with the converter that ships with ONNX Runtime.

Source: "Create Float16 and Mixed Precision Models", onnxruntime.ai/docs/performance/model-optimizations/float16.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tensorrail_exporter.graphs.io import check_model, export_graph, import_graph, save_model
from tensorrail_exporter.precision.prepared import Prepared, plain_constants
from tensorrail_exporter.precision.ranges import LARGEST
from tensorrail_exporter.precision.weights import Weighted, check_fp32, kept_nodes, require_weights, weighted, with_names
from tensorrail_runtime.errors import GraphError, first_line
from tensorrail_runtime.graphs.files import descendants
from tensorrail_runtime.scratch import scratch

_KEEP = "name the layer or node that cannot be converted in `keep`: it then stays in fp32"


def to_fp16(model: onnx.ModelProto, *, keep_io: bool = True, keep: Sequence[str] = ()) -> onnx.ModelProto:
    """Return a copy of the model with float16 weights and activations, by `onnxruntime.transformers.float16`.

    Operators in the converter's own list (Min, Max, TopK, Range, CumSum and others) stay float32. Weights must be within
    ±65504. Other constants, such as the fill value of a mask, are clamped to that range, and magnitudes below 5.96e-8 are
    raised to that value. Only a run shows whether the *activations* stay within the range: see `ranges.require_finite`.

    Args:
        model: the fp32 model; it is not changed.
        keep_io: whether inputs and outputs stay float32, with a cast between them and the graph; default True.
        keep: names of layers, weights or nodes that stay float32. There is no cast between two neighbours that do.

    Raises:
        GraphError: a weight is outside the range of fp16, a name in `keep` is not in the graph, the model is already
            quantized or has no float32 weight, or the converter fails.

    """
    named = with_names(plain_constants(model))
    check_fp32(named, "fp16")
    require_weights(named)
    kept = kept_nodes(named, keep)
    _require_weights_fit(named, kept)
    kept |= _constants_of_kept(named, kept)
    prepared = Prepared(named)
    with scratch() as folder:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        path = Path(folder) / "fp32.onnx"
        save_model(prepared.model, path)
        try:
            # Given the path, the converter infers shapes from file to file; nothing else works above 2 GiB.
            blocked = sorted(prepared.node_code(name) for name in kept)
            converted = convert_float_to_float16(str(path), keep_io_types=keep_io, node_block_list=blocked)
        except Exception as error:  # noqa: BLE001 - the library raises assertions and errors of protobuf
            reason = prepared.text(first_line(error)) or type(error).__name__
            raise GraphError(f"the graph cannot be converted to fp16 ({reason}); {_KEEP}") from None
    _remove_repeated_casts(converted)
    graph = import_graph(converted)
    _remove_double_casts(graph)
    result = prepared.restored(export_graph(graph, converted))
    try:
        check_model(result, named)
    except GraphError as error:
        raise GraphError(f"the fp16 graph is not valid: {error}; {_KEEP}") from None
    return result


def too_large(model: onnx.ModelProto) -> tuple[Weighted, ...]:
    """Return the nodes with a float32 weight that has values outside the range of fp16."""
    return tuple(layer for layer in weighted(model) if layer.values.dtype == np.float32 and leaves_range(layer.values))


def leaves_range(values: np.ndarray) -> bool:
    """Return whether values are outside the range of fp16, or not numbers."""
    return not float(np.abs(values).max(initial=0.0)) <= LARGEST


def _require_weights_fit(model: onnx.ModelProto, kept: frozenset[str]) -> None:
    for layer in too_large(model):
        if layer.node.name not in kept:
            raise GraphError(
                f"layer {layer.layer}: its weight {layer.weight} contains {float(np.abs(layer.values).max()):.3g}, outside the "
                f"fp16 range of ±{LARGEST:.0f}; keep layer {layer.layer} in fp32, or scale it down"
            )


def _constants_of_kept(model: onnx.ModelProto, kept: frozenset[str]) -> frozenset[str]:
    """Return the Constant nodes that only kept nodes read, because the converter would round their values."""
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.name)
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    return frozenset(node.name for node in constants if readers.get(node.output[0]) and readers[node.output[0]] <= kept)


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
