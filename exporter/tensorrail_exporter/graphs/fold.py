"""Constant folding of weights that nodes such as Slice, Concat, Transpose and Cast compute from constants.

torch's exporter writes the weights of recurrent layers as slices of the module's parameters, concatenated in ONNX's gate
order. Only the weights of planned layers are folded; the rest of the graph is not changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tensorrail_exporter.graphs.io import inferred_shapes
from tensorrail_runtime.errors import GraphError, first_line

_LARGEST = 2**29  # values that a single node may compute: 2 GiB in float32
_TOGETHER = 2**32  # values that all nodes above a weight may compute
_MACS = 2**38  # multiply-accumulates of a product: minutes
_FEW = 1024  # values of a tensor that shape inference is told, such as a shape

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
        GraphError: the nodes cannot be computed, or take too much memory or time: a node has more than 2**29 values, all of
            them together have more than 2**32, or a product takes more than 2**38 multiply-accumulates.

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
    shapes = inferred_shapes(model, data_prop=True)  # before anything is computed
    sizes = {output: math.prod(axis for axis in shape if isinstance(axis, int)) for output, shape in shapes.items()}
    if sizes:
        largest = max(sizes, key=sizes.__getitem__)
        _require_size(sizes[largest], largest, tensor.name)
    return gs.Constant(name, np.ascontiguousarray(_computed(model, tensor.name)))


def _require_size(count: int, output: str, weight: str) -> None:
    if count > _LARGEST:
        raise GraphError(f"its weight {weight!r} is too large to fold: {output!r} would hold {count:,} values")


def _computed(model: onnx.ModelProto, weight: str) -> np.ndarray:
    """Return what a model without inputs computes, node by node: sizes are known before a node is computed.

    Results that no later node reads are dropped.
    """
    values: dict[str, np.ndarray] = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    last = {name: place for place, node in enumerate(model.graph.node) for name in node.input}
    computed = 0
    for place, node in enumerate(model.graph.node):
        given = {name: values[name] for name in node.input if name}
        single = _single(model, node, given)
        computed += _size(single, given, weight)
        if computed > _TOGETHER:
            raise GraphError(f"its weight {weight!r} is too large to fold: its nodes compute more than {_TOGETHER:,} values")
        try:
            results = ReferenceEvaluator(single).run(None, given)
        except Exception as error:  # noqa: BLE001 - NumPy raises many classes for nodes that do not fit their constants
            reason = first_line(error) or type(error).__name__
            raise GraphError(f"its weight {weight!r} cannot be computed from constants ({reason})") from None
        values |= zip((name for name in node.output if name), map(np.asarray, results), strict=True)
        for name in given:
            if last[name] == place:
                del values[name]
    return values[model.graph.output[0].name]


def _single(model: onnx.ModelProto, node: onnx.NodeProto, given: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """Return a node as a model whose inputs have the shapes of these values."""
    kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in given.items()}
    inputs = [helper.make_tensor_value_info(name, kinds[name], value.shape) for name, value in given.items()]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    return helper.make_model(helper.make_graph([node], "single", inputs, outputs), opset_imports=model.opset_import)


def _size(single: onnx.ModelProto, given: Mapping[str, np.ndarray], weight: str) -> int:
    """Return how many values a node computes; raise `GraphError` if it computes too many, or nobody knows how many."""
    told = onnx.ModelProto()
    told.CopyFrom(single)
    told.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in given.items() if value.size <= _FEW)
    shapes = inferred_shapes(told, data_prop=True)
    total = 0
    for output in single.graph.output:
        shape = shapes.get(output.name)
        sizes = [axis for axis in shape or () if isinstance(axis, int)]
        if shape is None or len(sizes) < len(shape):
            raise GraphError(f"its weight {weight!r} is not folded: the size of {output.name!r} is unknown")
        _require_size(math.prod(sizes), output.name, weight)
        total += math.prod(sizes)
    node = single.graph.node[0]
    if node.op_type == "MatMul" and total * given[node.input[0]].shape[-1] > _MACS:
        raise GraphError(f"its weight {weight!r} is not folded: the product {node.output[0]!r} would take too long")
    return total


def _ancestors(tensor: gs.Tensor) -> tuple[list[gs.Node], list[gs.Constant]] | None:
    """Return the nodes and constants above a tensor, or None if they include an input or an operator that is not folded."""
    nodes: dict[int, gs.Node] = {}
    constants: list[gs.Constant] = []
    for current in tensors_above(tensor):
        if isinstance(current, gs.Constant):
            constants.append(current)
            continue
        if len(current.inputs) != 1 or current.inputs[0].op not in _FOLDABLE or not is_standard(current.inputs[0]):
            return None
        nodes[id(current.inputs[0])] = current.inputs[0]
    return list(nodes.values()), constants


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
