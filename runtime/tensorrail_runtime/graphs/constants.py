"""The constants of a graph, and which of its weights cannot be computed with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from tensorrail_runtime.graphs.files import descendants
from tensorrail_runtime.graphs.operators import CONTRIB, constant_tensor

FLOATING = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
MATRIX = 2  # axes of a weight

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN")


def constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Return the initializers and the tensors of Constant nodes of a graph, by name."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        tensor = constant_tensor(node)
        if tensor is not None:
            constants[node.output[0]] = tensor
    return constants


def file_fault(path: Path | str) -> str:
    """Do the same as `weight_fault` for a file; empty as well for a file that cannot be read, which opening it reports."""
    try:
        return weight_fault(onnx.load(path, format="protobuf", load_external_data=False), Path(path).parent)
    except (OSError, ValueError, TypeError, NotImplementedError, DecodeError, onnx.checker.ValidationError):
        return ""


def weight_fault(model: onnx.ModelProto, folder: Path | str | None = None) -> str:
    """Return which weight cannot be computed with, in one line; empty if all can.

    Args:
        model: the model.
        folder: the folder of its external data; default: external data that are not loaded are left out.

    Returns:
        A constant that holds NaN, or a matrix of a product that holds infinite values: other constants may be masks.

    """
    graphs = (model.graph, *descendants(model.graph))
    multiplied = {name for graph in graphs for node in graph.node for name in _multiplied(node)}
    for graph in graphs:
        for name, tensor in constants_of(graph).items():
            external = tensor.data_location == onnx.TensorProto.EXTERNAL
            if tensor.data_type not in FLOATING or (external and folder is None):
                continue
            values = onnx.numpy_helper.to_array(tensor, str(folder or "")).astype(np.float32, copy=False)
            is_weight = name in multiplied and values.ndim >= MATRIX
            wrong = ~np.isfinite(values) if is_weight else np.isnan(values)
            if wrong.any():
                place = [int(index) for index in np.argwhere(wrong)[0]]
                what = "NaN" if np.isnan(values[tuple(place)]) else "an infinite value"
                return f"weight {name!r} holds {what} at {place}, one of {int(wrong.sum()):,} such values: repair the model"
    return ""


def _multiplied(node: onnx.NodeProto) -> Sequence[str]:
    """Return the inputs of a node that may be matrices of a product; what an Attention adds to its scores may be infinite."""
    if node.op_type == "Attention":
        return node.input[1:2] if node.domain == CONTRIB else ()
    return node.input if node.op_type in _PRODUCTS else ()
