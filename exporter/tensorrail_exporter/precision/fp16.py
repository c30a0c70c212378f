"""The fp16 copy of a dense or factored graph, by the converter that ships with ONNX Runtime.

Source: "Create Float16 and Mixed Precision Models", onnxruntime.ai/docs/performance/model-optimizations/float16.html.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tensorrail_exporter.graphs.io import check_model, export_graph, import_graph, save_model
from tensorrail_exporter.precision.ranges import LARGEST
from tensorrail_exporter.precision.weights import check_fp32, kept_nodes, weighted, with_names
from tensorrail_runtime.errors import GraphError

_KEEP = "name the layer or node that cannot be converted in `keep`: it then stays in fp32"


def to_fp16(model: onnx.ModelProto, *, keep_io: bool = True, keep: Sequence[str] = ()) -> onnx.ModelProto:
    """Return the graph with float16 weights and activations, by `onnxruntime.transformers.float16`.

    `keep_io` leaves inputs and outputs float32, between casts. `keep` names layers or nodes that stay float32; neighbours
    among them are joined without a cast between. Operators of the converter's own list (Min, Max, TopK, Range, CumSum and
    others) stay float32 as well. Weights must lie within ±65504; other constants beyond are clamped to it, as the fill of a
    mask wants it, and magnitudes below 5.96e-8 are raised to that. Raises `GraphError` for a weight that fp16 does not hold,
    a name in `keep` that is not there, and a graph that cannot be converted. Whether the *activations* fit is shown only by
    running it: `ranges.require_finite`.
    """
    check_fp32(model, "fp16")
    named = with_names(model)
    kept = kept_nodes(named, keep)
    _require_weights_fit(named, kept)
    kept |= _constants_of_kept(named, kept)
    with tempfile.TemporaryDirectory() as folder:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        path = Path(folder) / "fp32.onnx"
        save_model(named, path)
        try:
            # By its path: shapes are then inferred file to file, which alone works above 2 GiB.
            converted = convert_float_to_float16(str(path), keep_io_types=keep_io, node_block_list=sorted(kept))
        except Exception as error:  # noqa: BLE001 - assertions and protobuf's errors, of a library that defines none
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise GraphError(f"the graph cannot be converted to fp16 ({reason}); {_KEEP}") from None
    graph = import_graph(converted)
    _join(graph)
    result = export_graph(graph, converted)
    try:
        check_model(result)
    except GraphError as error:
        raise GraphError(f"the fp16 graph is not valid: {error}; {_KEEP}") from None
    return result


def _require_weights_fit(model: onnx.ModelProto, kept: frozenset[str]) -> None:
    for layer in weighted(model):
        if layer.node.name in kept or layer.values.dtype != np.float32:
            continue
        worst = float(np.abs(layer.values).max(initial=0.0))
        if not worst <= LARGEST:
            raise GraphError(
                f"layer {layer.layer}: its weight {layer.weight} contains {worst:.3g}, outside the fp16 range of "
                f"±{LARGEST:.0f}; keep it in fp32 (--keep {layer.layer}), or scale it down"
            )


def _constants_of_kept(model: onnx.ModelProto, kept: frozenset[str]) -> frozenset[str]:
    """Return the Constant nodes that only kept nodes read; the converter would round their values."""
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.name)
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    return frozenset(node.name for node in constants if readers.get(node.output[0]) and readers[node.output[0]] <= kept)


def _join(graph: gs.Graph) -> None:
    """X → Cast(fp16) → Cast(fp32) → Y  becomes  X → Y, where the converter put the casts between two float32 nodes."""
    for up in [node for node in graph.nodes if node.op == "Cast"]:
        down = up.inputs[0].inputs[0] if up.inputs and up.inputs[0].inputs else None
        if down is None or down.op != "Cast" or not (_made(up.name, "fp32", "output") and _made(down.name, "fp16", "input")):
            continue
        source, target = down.inputs[0], up.outputs[0]
        up.outputs.clear()
        if any(target is output for output in graph.outputs):
            if not source.inputs:  # an input that is an output as well: the casts are all there is between
                up.outputs.append(target)
                continue
            for taker in list(source.outputs):
                taker.inputs = [target if tensor is source else tensor for tensor in taker.inputs]
            maker = source.inputs[0]
            maker.outputs = [target if tensor is source else tensor for tensor in maker.outputs]
        else:
            for taker in list(target.outputs):
                taker.inputs = [source if tensor is target else tensor for tensor in taker.inputs]


def _made(name: str, to: str, side: str) -> bool:
    return name.endswith(f"_cast_to_{to}_node") or name.startswith(f"graph_{side}_cast")
