"""Constant folding of weights that nodes such as Slice, Concat, Transpose and Cast compute from constants.

torch's exporter writes the weights of recurrent layers as slices of the module's parameters, concatenated in ONNX's gate
order. Only the weights of planned layers are folded; the rest of the graph is not changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from tensorrail_exporter.graphs.io import inferred_shapes
from tensorrail_runtime.errors import GraphError, first_line

_LARGEST = 2**29  # values that a single node may compute: 2 GiB in float32

# fmt: off
_FOLDABLE = frozenset((  # of shapes, of weight normalization, and of a change that is added to a weight
    "Abs", "Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Expand", "Flatten", "Gather", "Identity", "MatMul",
    "Mul", "Neg", "Pow", "Reciprocal", "ReduceL2", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Reshape",
    "Shape", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
))
# fmt: on


def is_standard(node: gs.Node) -> bool:
    """Return whether a node's operator is ONNX's own; in another domain the same name means something else."""
    return node.domain in (None, "", "ai.onnx")


def is_constant(tensor: gs.Tensor) -> bool:
    """Return whether a tensor is a constant or computed from constants only."""
    return _ancestors(tensor) is not None


def constant_value(tensor: gs.Tensor) -> np.ndarray | None:
    """Return the value of a constant, or of a Constant node; None for any other tensor."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    maker = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    value = maker.attrs.get("value") if maker is not None and maker.op == "Constant" else None
    return np.asarray(value.values) if isinstance(value, gs.Constant) else None


def sources(tensor: gs.Tensor) -> tuple[str, ...]:
    """Return the names of the stored matrices and kernels that a tensor is computed from; none if it is not constant."""
    ancestors = _ancestors(tensor)
    if ancestors is None:
        return ()
    return tuple(c.name for c in ancestors[1] if _floating(c.dtype) and len(c.shape) > 1)


def type_name(dtype: object) -> str:
    """Return the name of a constant's type: NumPy's, or ONNX's for a type that NumPy lacks."""
    return onnx.TensorProto.DataType.Name(dtype).lower() if isinstance(dtype, int) else str(dtype)


def _floating(dtype: object) -> bool:
    """Return whether a type is floating point; graphsurgeon gives bfloat16 and the 8-bit types as ONNX's type numbers."""
    return "float" in type_name(dtype)


def folded(tensor: gs.Tensor, opset: int, name: str) -> gs.Constant | None:
    """Return the constant that the nodes above a tensor compute.

    Args:
        tensor: the tensor, which is not changed.
        opset: opset of the graph.
        name: name of the new constant.

    Returns:
        The tensor itself if it is a constant, None if it is not computed from constants only.

    Raises:
        GraphError: the nodes cannot be computed, or one of them has more than 2**29 values.

    """
    if isinstance(tensor, gs.Constant):
        return tensor
    ancestors = _ancestors(tensor)
    if ancestors is None:
        return None
    graph = gs.Graph(nodes=ancestors[0], outputs=[tensor], opset=opset).copy().toposort()  # the nodes stay in their graph
    model = gs.export_onnx(graph, do_type_check=False)
    for output in model.graph.output:
        output.ClearField("type")
    shapes = inferred_shapes(model, data_prop=True)
    sizes = {output: math.prod(axis for axis in shape if isinstance(axis, int)) for output, shape in shapes.items()}
    largest = max(sizes, key=sizes.__getitem__, default="")
    if sizes.get(largest, 0) > _LARGEST:
        raise GraphError(f"its weight {tensor.name!r} is too large to fold: {largest!r} would hold {sizes[largest]:,} values")
    try:
        (values,) = ReferenceEvaluator(model).run(None, {})
    except Exception as error:  # noqa: BLE001 - NumPy raises many classes for nodes that do not fit their constants
        reason = first_line(error) or type(error).__name__
        raise GraphError(f"its weight {tensor.name!r} cannot be computed from constants ({reason})") from None
    return gs.Constant(name, np.ascontiguousarray(values))


def _ancestors(tensor: gs.Tensor) -> tuple[list[gs.Node], list[gs.Constant]] | None:
    """Return the nodes and constants above a tensor, or None if they include an input or an operator that is not folded."""
    nodes: list[gs.Node] = []
    constants: list[gs.Constant] = []
    for current in tensors_above(tensor):
        if isinstance(current, gs.Constant):
            constants.append(current)
            continue
        if len(current.inputs) != 1 or current.inputs[0].op not in _FOLDABLE or not is_standard(current.inputs[0]):
            return None
        node = current.inputs[0]
        if not any(node is other for other in nodes):
            nodes.append(node)
    return nodes, constants


def tensors_above(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """Yield a tensor and those that it is computed from, each once; inputs that a node leaves out are not among them."""
    seen: set[int] = set()
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        if id(current) in seen or current.is_empty():
            continue
        seen.add(id(current))
        yield current
        waiting.extend(above for node in current.inputs for above in reversed(node.inputs))
