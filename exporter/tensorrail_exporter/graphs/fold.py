"""Weights that are computed from constants only, made constants: Slice, Concat, Transpose, Cast and their like.

torch's exporter writes the weights of recurrent layers as slices of the module's parameters, put together again in ONNX's
gate order. Only the weights that a plan names are folded; the rest of the graph stays as it is.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from tensorrail_exporter.graphs.io import inferred_shapes
from tensorrail_runtime.errors import GraphError

_LARGEST = 2**29  # values that one of the nodes may make: 2 GiB in float32

_FOLDABLE = frozenset(
    {
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Mul",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)


def is_standard(node: gs.Node) -> bool:
    """Return whether a node's operator is ONNX's own: others mean something else by the same name."""
    return node.domain in (None, "", "ai.onnx")


def is_constant(tensor: gs.Tensor) -> bool:
    """Return whether a tensor is a constant, or made of constants only."""
    return _ancestors(tensor) is not None


def sources(tensor: gs.Tensor) -> tuple[str, ...]:
    """Return the names of the stored matrices and kernels that a tensor is made of; none when it is not constant."""
    found = _ancestors(tensor)
    if found is None:
        return ()
    return tuple(c.name for c in found[1] if _floating(c.dtype) and len(c.shape) > 1)


def type_name(dtype: object) -> str:
    """Return a constant's type in words: NumPy's, or ONNX's for those that NumPy has not."""
    return onnx.TensorProto.DataType.Name(dtype).lower() if isinstance(dtype, int) else str(dtype)


def _floating(dtype: object) -> bool:
    """Return whether numbers are stored with an exponent; graphsurgeon tells bfloat16 and the 8-bit types by ONNX's number."""
    return "float" in type_name(dtype)


def folded(tensor: gs.Tensor, opset: int, name: str) -> gs.Constant | None:
    """Return the constant that a tensor's nodes compute; None when something of it is not constant.

    `GraphError` when they cannot be computed, or would take more than 2 GiB.
    """
    if isinstance(tensor, gs.Constant):
        return tensor
    found = _ancestors(tensor)
    if found is None:
        return None
    graph = gs.Graph(nodes=found[0], outputs=[tensor], opset=opset).copy().toposort()  # a copy: the nodes keep their graph
    model = gs.export_onnx(graph, do_type_check=False)
    for output in model.graph.output:
        output.ClearField("type")
    shapes = inferred_shapes(model, data_prop=True)
    sizes = {made: math.prod(axis for axis in shape if isinstance(axis, int)) for made, shape in shapes.items()}
    largest = max(sizes, key=sizes.__getitem__, default="")
    if sizes.get(largest, 0) > _LARGEST:
        raise GraphError(f"its weight {tensor.name!r} is too large to fold: {largest!r} would hold {sizes[largest]:,} values")
    try:
        (values,) = ReferenceEvaluator(model).run(None, {})
    except Exception as error:  # noqa: BLE001 - what NumPy raises for nodes that do not fit their constants, of many classes
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise GraphError(f"its weight {tensor.name!r} cannot be computed from constants ({reason})") from None
    return gs.Constant(name, np.ascontiguousarray(values))


def _ancestors(tensor: gs.Tensor) -> tuple[list[gs.Node], list[gs.Constant]] | None:
    """Return the nodes and constants above a tensor; None when an input or an operator that is not folded is among them."""
    nodes: list[gs.Node] = []
    constants: list[gs.Constant] = []
    seen: set[int] = set()
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        if id(current) in seen or current.is_empty():
            continue
        seen.add(id(current))
        if isinstance(current, gs.Constant):
            constants.append(current)
            continue
        if len(current.inputs) != 1 or current.inputs[0].op not in _FOLDABLE or not is_standard(current.inputs[0]):
            return None
        node = current.inputs[0]
        if not any(node is other for other in nodes):
            nodes.append(node)
            waiting.extend(reversed(node.inputs))
    return nodes, constants
