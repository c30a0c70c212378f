"""Inner tensors of a graph as outputs, so that a run of the model returns their values."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from tensorrail_runtime.errors import GraphError


def with_outputs(model: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """Return a copy of the model that also has the given tensors among its outputs.

    The added outputs have no declared type: ONNX Runtime infers it when it loads the model.

    Args:
        model: any ONNX model; it is not changed.
        tensors: names of tensors of the main graph, not of the body of an If, Loop or Scan.

    Returns:
        A new model. A tensor that is named twice, or that is an output already, is listed once.

    Raises:
        GraphError: a tensor is not in the graph.

    """
    names = list(dict.fromkeys(tensors))
    known = {value.name for value in (*model.graph.input, *model.graph.output)} | {
        name for node in model.graph.node for name in (*node.input, *node.output) if name
    }
    unknown = [name for name in names if name not in known]
    if unknown:
        raise GraphError(f"tensor {unknown[0]!r} is not in the graph: expected the input or output of one of its nodes")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    return copy
