"""The shapes of the tensors of a graph: set for its inputs, inferred, or seen in a run."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import EncodeError

from tensorrail_runtime.errors import ModelError
from tensorrail_runtime.graphs.files import descendants
from tensorrail_runtime.graphs.reading import light
from tensorrail_runtime.graphs.tap import with_outputs
from tensorrail_runtime.sessions.inputs import Shapes, random_inputs
from tensorrail_runtime.sessions.kernels import ends_the_process
from tensorrail_runtime.sessions.values import Values


def inferred_shapes(bound: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the model with inferred shapes; without those behind operators that onnx does not know."""
    weightless = light(bound)  # onnx cannot read a model above 2 GiB
    try:
        inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(weightless, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError:
        if all(node.domain in ("", "ai.onnx") for graph in (bound.graph, *descendants(bound.graph)) for node in graph.node):
            raise
        inferred = onnx.shape_inference.infer_shapes(weightless, data_prop=True)
    for part in ("input", "initializer"):
        inferred.graph.ClearField(part)
        getattr(inferred.graph, part).extend(getattr(bound.graph, part))
    return inferred


def bind_shapes(model: onnx.ModelProto, batch: int, shapes: Shapes) -> onnx.ModelProto:
    """Set every dynamic axis of the inputs, and remove the stored shapes of all other tensors.

    An axis that is stored as −1 is dynamic too, as in ONNX Runtime.

    Args:
        model: the model, which is changed.
        batch: the size of dynamic axes of inputs that `shapes` does not name.
        shapes: shapes of inputs, by name.

    Returns:
        The same model.

    Raises:
        ModelError: `shapes` names an unknown input or does not fit an input's axes.

    """
    del model.graph.value_info[:]
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initializers]
    for name in set(shapes) - {value.name for value in inputs}:
        raise ModelError(
            f"shapes: unknown input {name!r}; the model's inputs are {', '.join(v.name for v in inputs) or 'none'}"
        )
    for value in inputs:
        axes = value.type.tensor_type.shape.dim
        shape = shapes.get(value.name, [batch] * len(axes))
        if len(shape) != len(axes):
            raise ModelError(f"input {value.name!r}: expected a shape of {len(axes)} axes, got {list(shape)}")
        declared = _declared(value)
        for axis, size in zip(axes, shape, strict=True):
            if not axis.HasField("dim_value") or axis.dim_value < 0:
                axis.dim_value = size
            elif value.name in shapes and axis.dim_value != size:
                raise ModelError(f"input {value.name!r}: expected shape {declared}, got {list(shape)}")
    for value in model.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    return model


def _declared(value: onnx.ValueInfoProto) -> str:
    """Return the shape of an input as text; `?` is an axis of any size."""
    axes = value.type.tensor_type.shape.dim
    return f"[{', '.join(str(axis.dim_value) if axis.HasField('dim_value') else axis.dim_param or '?' for axis in axes)}]"


def with_shapes(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """Set these shapes where the types of the tensors are known, and infer the shapes in the bodies from them."""
    for value in model.graph.value_info:
        if value.name in shapes and value.type.tensor_type.elem_type:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shapes[value.name]))
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, EncodeError, ValueError, RuntimeError):
        return model


def seen_shapes(
    bound: onnx.ModelProto, batch: int, shapes: Shapes | None, values: Values | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors in a run of the model, where they cannot be inferred; see `seen_tensors`."""
    return {name: shape for name, (_, shape) in seen_tensors(bound, batch, shapes, values).items()}


def seen_tensors(
    bound: onnx.ModelProto, batch: int, shapes: Shapes | None, values: Values | None = None
) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return the types and shapes of all tensors in a run of the model, also behind operators that onnx does not know.

    Args:
        bound: the model, with inputs of fixed shapes.
        batch: the size of dynamic axes that `shapes` does not set.
        shapes: shapes of inputs, by name.
        values: known values of inputs by name, in place of random ones.

    Returns:
        ONNX's element type and the shape of each tensor by name; empty if the model does not run, must not be run, or is too
        large to be passed in memory.

    """
    if any(ends_the_process(node) for graph in (bound.graph, *descendants(bound.graph)) for node in graph.node):
        return {}
    exposed = with_outputs(bound, (name for node in bound.graph.node for name in node.output if name))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
        arrays = session.run(None, random_inputs(session, batch, shapes=shapes, values=values))
    except Exception:  # noqa: BLE001 - a missing shape is reported later, with the node that needs it
        return {}
    return {
        entry.name: (_element_type(entry.type), tuple(np.shape(array)))
        for entry, array in zip(session.get_outputs(), arrays, strict=True)
        if entry.type.startswith("tensor(")
    }


def _element_type(name: str) -> int:
    """Return ONNX's number of a type such as `tensor(float)`; 0 for one that it does not have."""
    kinds = onnx.TensorProto.DataType
    text = name.removeprefix("tensor(").removesuffix(")").upper()
    return int(kinds.Value(text)) if text in kinds.keys() else 0  # noqa: SIM118 - not a dict


def known_shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Return the shapes that are stored in a graph, by the names of its tensors; without those that have an open axis."""
    shapes: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        axes = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(
            axis.HasField("dim_value") and axis.dim_value >= 0 for axis in axes
        ):
            shapes[value.name] = tuple(int(np.int64(axis.dim_value)) for axis in axes)
    return shapes
