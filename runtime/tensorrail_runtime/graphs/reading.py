"""Reading a model's file in one form, whatever its producer wrote.

ONNX Runtime runs files that onnx's checker and shape inference refuse, and the other way round. Here the standard domain gets
its short name, sparse initializers become dense ones, and declared shapes that contradict the graph are dropped. What ONNX
Runtime refuses is an error here, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from tensorrail_runtime.errors import ModelError, first_line
from tensorrail_runtime.graphs.files import descendants
from tensorrail_runtime.graphs.operators import constant_tensor
from tensorrail_runtime.records import require_utf8

_LARGEST = 2**31  # bytes of a sparse tensor in dense form
_FREE_INITIALIZERS = 4  # the IR version from which initializers need not be inputs
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_SMALL = 1024  # bytes up to which a constant keeps its values: shape inference may need them


def read_model(path: Path | str) -> tuple[onnx.ModelProto, bool]:
    """Read an ONNX file with its external data.

    Args:
        path: the file, with any extension.

    Returns:
        The model, and whether it differs from the file: see `standardized`.

    Raises:
        ModelError: the file cannot be read or parsed, or ONNX Runtime refuses such a graph.

    """
    require_utf8(path)
    try:
        model = onnx.load(path, format="protobuf")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}): expected an ONNX model") from None
    except DecodeError:
        raise ModelError(f"{path}: not an ONNX model, or a truncated one: it cannot be parsed as protobuf") from None
    except (onnx.checker.ValidationError, ValueError) as error:  # of external data
        raise ModelError(f"{path}: not a valid ONNX model ({first_line(error)})") from None
    try:
        return model, standardized(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def standardized(model: onnx.ModelProto) -> bool:
    """Bring a model into one form, in place.

    The domain `ai.onnx` is written as the empty name, sparse initializers become dense ones, weights in Constant nodes become
    initializers, and declared shapes that contradict what onnx infers are dropped.

    Args:
        model: the model.

    Returns:
        Whether the model was changed.

    Raises:
        ModelError: two nodes have the same name, or a sparse initializer is not valid or too large in dense form.

    """
    graphs = [model.graph, *descendants(model.graph)]
    for graph in graphs:
        _require_unique_names(graph)
    changed = [_with_short_domain(model), *(_densified(graph) for graph in graphs)]
    if model.ir_version >= _FREE_INITIALIZERS:
        changed += [_with_initializers(graph) for graph in graphs]
    return any([*changed, _without_stale_shapes(model)])


def _require_unique_names(graph: onnx.GraphProto) -> None:
    seen: dict[str, int] = {}
    for place, node in enumerate(graph.node):
        if not node.name:
            continue
        if node.name in seen:
            raise ModelError(
                f"two nodes have the name {node.name!r}, number {seen[node.name]} ({graph.node[seen[node.name]].op_type}) and "
                f"number {place} ({node.op_type}) of graph {graph.name!r}: ONNX Runtime refuses such a model; rename one"
            )
        seen[node.name] = place


def _with_short_domain(model: onnx.ModelProto) -> bool:
    """Write the domain `ai.onnx` as the empty name, which ONNX says is the same."""
    changed = False
    graphs = [model.graph, *descendants(model.graph)]
    nodes: list[Iterable[onnx.NodeProto]] = [graph.node for graph in graphs]
    for function in model.functions:
        nodes.append(function.node)
        nodes += [graph.node for node in function.node for a in node.attribute for graph in _graphs_of(a)]
    for node in (node for group in nodes for node in group):
        if node.domain == "ai.onnx":
            node.domain, changed = "", True
    for holder in (model, *model.functions):
        versions = {opset.version for opset in holder.opset_import if opset.domain in ("", "ai.onnx")}
        spelled = [opset for opset in holder.opset_import if opset.domain == "ai.onnx"]
        for opset in spelled if len(versions) == 1 else ():
            changed = True
            if any(other.domain == "" for other in holder.opset_import):
                holder.opset_import.remove(opset)
            else:
                opset.domain = ""
    return changed


def _graphs_of(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    own = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
    return [graph for body in own for graph in (body, *descendants(body))]


def _densified(graph: onnx.GraphProto) -> bool:
    """Replace a graph's sparse initializers by dense ones, as ONNX Runtime does when it loads a model."""
    dense = [_dense(sparse) for sparse in graph.sparse_initializer]
    del graph.sparse_initializer[:]
    graph.initializer.extend(dense)
    return bool(dense)


def _with_initializers(graph: onnx.GraphProto) -> bool:
    """Store the floats of Constant nodes with an axis as initializers, as ONNX Runtime does when it loads a model."""
    outputs = {value.name for value in graph.output}
    places = []
    for place, node in enumerate(graph.node):
        tensor = constant_tensor(node)
        if tensor is not None and tensor.dims and tensor.data_type in _FLOATS and node.output[0] not in outputs:
            places.append(place)
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = node.output[0]
    for place in reversed(places):
        del graph.node[place]
    return bool(places)


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    name, shape = sparse.values.name, list(sparse.dims)
    values, indices = (numpy_helper.to_array(tensor) for tensor in (sparse.values, sparse.indices))
    if math.prod(shape) * values.itemsize > _LARGEST:
        raise ModelError(f"sparse initializer {name!r} of shape {shape}: it would exceed 2 GiB in dense form; store it dense")
    flat = indices if indices.ndim == 1 else None
    if indices.ndim == 2 and indices.shape[1] == len(shape) and ((indices >= 0) & (indices < shape)).all():
        flat = np.ravel_multi_index(tuple(indices.T), shape)
    size = math.prod(shape)
    if flat is None or flat.shape != values.shape or (flat.size and not 0 <= flat.min() <= flat.max() < size):
        raise ModelError(
            f"sparse initializer {name!r} of shape {shape}: expected one index within that shape for each of its "
            f"{values.size} values, got indices of shape {list(indices.shape)}"
        )
    array = np.zeros(size, values.dtype)
    array[flat] = values
    return numpy_helper.from_array(array.reshape(shape), name)


def light(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy without large weights, which are inputs instead: shape inference needs their shapes alone."""
    copy = onnx.ModelProto(ir_version=model.ir_version)
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    listed = {value.name for value in model.graph.input}
    for part in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(copy.graph, part).extend(getattr(model.graph, part))
    copy.graph.name = "shapes"
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) <= _SMALL:
            copy.graph.initializer.append(tensor)
        elif tensor.name not in listed:
            copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return copy


def _without_stale_shapes(model: onnx.ModelProto) -> bool:
    """Drop declared shapes where onnx infers others: those of inner tensors, or of outputs too; return whether any was dropped.

    Outputs of the model get the inferred shapes. Nothing changes if onnx finds fault with something else, such as an operator
    that it does not know.
    """
    graphs = [model.graph, *descendants(model.graph)]
    if _inferred(light(model)) is not None:
        return False
    trial = light(model)
    bodies = list(descendants(trial.graph))
    for graph in (trial.graph, *bodies):
        del graph.value_info[:]
    if _inferred(trial) is not None:
        for graph in graphs:
            del graph.value_info[:]
        return True
    for value in (value for graph in (trial.graph, *bodies) for value in graph.output):
        value.type.tensor_type.ClearField("shape")
    inferred = _inferred(trial)
    if inferred is None:
        return False
    for graph in graphs:
        del graph.value_info[:]
    for value in (value for graph in graphs[1:] for value in graph.output):
        value.type.tensor_type.ClearField("shape")
    for value, known in zip(model.graph.output, inferred.graph.output, strict=True):
        if known.type.tensor_type.HasField("shape"):
            value.type.CopyFrom(known.type)
    return True


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return the model with inferred shapes; None where declared ones contradict them, or onnx finds another fault."""
    try:
        inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return None
    return inferred
