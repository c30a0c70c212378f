"""What a graph costs on paper: parameters, MACs, FLOPs, bytes moved and kernels, from its shapes. FLOPs = 2 × MACs.

Only products are counted: Conv, ConvTranspose, Einsum, Gemm, MatMul, their quantized forms, and those of LSTM, GRU, RNN and the
body of a Scan at every time step. Any operator that `operators` knows neither to multiply nor not to is listed in `uncounted`,
never taken for zero in silence: If and Loop among them, whose bodies run an unknown number of times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort

from tensorrail_runtime.errors import ModelError, first_line
from tensorrail_runtime.graphs.files import bytes_of, descendants, opset_of
from tensorrail_runtime.graphs.operators import CONTRIB_NO_MACS, DOMAINS, MACS, NO_MACS, operands_of
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.inputs import Shapes, batch_of, random_inputs

_SCAN_OPSET = 9  # before it a Scan has a batch axis of its own

_NO_KERNEL = frozenset({"Constant", "Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze"})
"""Nodes that compute nothing: views of what is there, and what ONNX Runtime folds away."""


class NodeCost(Record):
    """One node that multiplies."""

    name: str
    op: str
    weight: str  # the constant operand's name; empty when both are computed
    input: tuple[int, ...]
    output: tuple[int, ...]
    params: int
    macs: int

    @property
    def flops(self) -> int:
        """2 × MACs."""
        return 2 * self.macs


class GraphCost(Record):
    """A whole graph at one batch size."""

    model: str
    batch: int
    params: int  # values in floating-point constants, those of bodies included, each counted once
    bytes: int  # of the files on disk, external data included
    macs: int
    activation_bytes: int  # read and written by all nodes, constants left out, nothing fused
    kernels: int  # nodes that compute, nothing fused, those of a Scan's body at every step if their number is known
    nodes: int  # those of bodies included, once
    unshaped: int  # tensors whose size is not known, left out of activation_bytes
    layers: tuple[NodeCost, ...]
    uncounted: tuple[str, ...]

    @property
    def flops(self) -> int:
        """2 × MACs."""
        return 2 * self.macs


def cost(path: Path | str, batch: int = 1, shapes: Shapes | None = None) -> GraphCost:
    """Return the cost of a model, its dynamic axes set by `shapes` or else to `batch`.

    Raises `ModelError` when shapes cannot be inferred, and for a shape of an input that is not there or has other axes.
    """
    path = Path(path)
    try:
        model = _loaded(path)
        samples = _samples(model, batch, shapes or {})
        bound = bind_shapes(model, batch, shapes or {})
        inferred = onnx.shape_inference.infer_shapes(bound, strict_mode=True, data_prop=True)
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}): expected an ONNX model") from None
    except Exception as error:  # noqa: BLE001 - protobuf and onnx raise unrelated classes
        raise ModelError(f"{path}: not an ONNX model whose shapes can be inferred ({first_line(error)})") from None
    known = _shapes(inferred.graph)
    asked = [node for node in inferred.graph.node if node.domain in DOMAINS and node.op_type in (*MACS, "Scan")]
    if any(name and name not in known for node in asked for name in (*node.input, node.output[0])):
        seen = seen_shapes(bound, batch, shapes)
        inferred = _with_shapes(inferred, seen)
        known = _shapes(inferred.graph) | seen
    try:
        return _counted(inferred, known, path, samples)
    except ModelError:
        raise
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path}: contains a node that is not valid ONNX: its inputs, outputs or weights do not fit ({error})"
        ) from None


def _loaded(path: Path) -> onnx.ModelProto:
    model = onnx.load(path)
    if not model.graph.node:
        raise ModelError(f"{path}: contains no nodes: expected an ONNX model")
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def _counted(inferred: onnx.ModelProto, known: dict[str, tuple[int, ...]], path: Path, batch: int) -> GraphCost:
    layers: list[NodeCost] = []
    uncounted: set[str] = set()
    unshaped: set[str] = set()
    moved = kernels = 0
    opset = opset_of(inferred)
    scopes = [_Scope.of(inferred.graph, known)]
    for scope in scopes:
        for node in scope.graph.node:
            if node.domain not in DOMAINS:
                uncounted.add(f"{node.domain}:{node.op_type}")
            elif node.op_type in MACS:
                layers.append(_node(node, scope, path))
            elif node.op_type == "Scan" and (body := _body(node, scope, opset)) is not None:
                scopes.append(body)  # and counted in its turn
                continue
            elif node.op_type not in (CONTRIB_NO_MACS if node.domain == "com.microsoft" else NO_MACS):
                uncounted.add(node.op_type)
            if node.op_type not in _NO_KERNEL:
                kernels += scope.times
                sizes = {name: scope.size_of(name) for name in {*node.input, *node.output} - scope.constants.keys() - {""}}
                moved += scope.times * sum(size or 0 for size in sizes.values())
                unshaped |= {name for name, size in sizes.items() if size is None}
    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
    graphs = [inferred.graph, *descendants(inferred.graph)]
    return GraphCost(
        model=path.name,
        batch=batch,
        params=sum(math.prod(t.dims) for graph in graphs for t in constants_of(graph).values() if t.data_type in floating),
        bytes=bytes_of(path),
        macs=sum(layer.macs for layer in layers),
        activation_bytes=moved,
        kernels=kernels,
        unshaped=len(unshaped),
        nodes=sum(len(graph.node) for graph in graphs),
        layers=tuple(layers),
        uncounted=tuple(sorted(uncounted)),
    )


def constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Return initializers and the tensors of Constant nodes by name."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                constants[node.output[0]] = attribute.t
    return constants


@dataclass(frozen=True)
class _Scope:
    """A graph or a Scan's body, how often it runs, and what is known of the tensors that are seen there."""

    graph: onnx.GraphProto
    times: int
    shapes: dict[str, tuple[int, ...]]
    itemsizes: dict[str, int]
    constants: dict[str, onnx.TensorProto | None]  # None: one that is no tensor

    @classmethod
    def of(
        cls, graph: onnx.GraphProto, shapes: dict[str, tuple[int, ...]], around: _Scope | None = None, times: int = 1
    ) -> _Scope:
        values = [*graph.input, *graph.value_info, *graph.output]
        other = {name: None for node in graph.node if node.op_type == "Constant" for name in node.output}
        return cls(
            graph=graph,
            times=times * (around.times if around else 1),
            shapes={**(around.shapes if around else {}), **shapes},
            itemsizes={**(around.itemsizes if around else {}), **{value.name: _itemsize(value) for value in values}},
            constants={**(around.constants if around else {}), **other, **constants_of(graph)},
        )

    def size_of(self, name: str) -> int | None:
        """Return the bytes of a tensor; None where its shape or type is not known."""
        known = name in self.shapes and name in self.itemsizes
        return math.prod(self.shapes[name]) * self.itemsizes[name] if known else None


def _body(node: onnx.NodeProto, scope: _Scope, opset: int) -> _Scope | None:
    """Return a Scan's body; None where its number of steps, or a shape that its products need, is not known."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    count = attributes["num_scan_inputs"].i if "num_scan_inputs" in attributes else 0
    known = node.domain in ("", "ai.onnx") and opset >= _SCAN_OPSET and "body" in attributes and 0 < count <= len(node.input)
    if not known:
        return None
    axis = attributes["scan_input_axes"].ints[0] if "scan_input_axes" in attributes else 0
    scanned = scope.shapes.get(node.input[-count], ())
    if not -len(scanned) <= axis < len(scanned) or not scanned[axis]:
        return None
    graph = attributes["body"].g
    body = _Scope.of(graph, _shapes(graph), scope, scanned[axis])
    products = [inner for inner in graph.node if inner.domain in DOMAINS and inner.op_type in MACS]
    needed = (name for inner in products for name in (*operands_of(inner), inner.output[0]) if name)
    return body if all(name in body.shapes for name in needed) else None


def _node(node: onnx.NodeProto, scope: _Scope, path: Path) -> NodeCost:
    operands, shapes = operands_of(node), scope.shapes
    for name in (*operands, node.output[0]):
        if name and name not in shapes:
            raise ModelError(f"{path}: the shape of {name!r} at node {node.name or node.op_type!r} cannot be inferred")
    sizes, out = [shapes[name] for name in operands], shapes.get(node.output[0], ())
    stored = {name: tensor for name in node.input if (tensor := scope.constants.get(name)) is not None}
    return NodeCost(
        name=node.name,
        op=node.op_type,
        weight=next((name for name in operands if name in stored), ""),
        input=sizes[0],
        output=out,
        params=sum(math.prod(stored[name].dims) for name in _weights(node, operands) if name in stored),
        macs=scope.times * MACS[node.op_type](node, sizes, out),
    )


def _weights(node: onnx.NodeProto, operands: list[str]) -> list[str]:
    """Return the operands that may be weights: both of a product, W and R of a recurrent layer."""
    return list(node.input[1:3]) if node.op_type in ("LSTM", "GRU", "RNN") else operands


def _itemsize(value: onnx.ValueInfoProto) -> int:
    kind = value.type.tensor_type.elem_type
    return int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize) if kind else 4


def _samples(model: onnx.ModelProto, batch: int, shapes: Shapes) -> int:
    """Return the samples of a run, as `inputs.batch_of` tells them."""
    names = {tensor.name for tensor in model.graph.initializer}
    free = [value for value in model.graph.input if value.name not in names]
    axes = [
        [a.dim_value if a.HasField("dim_value") and a.dim_value >= 0 else None for a in v.type.tensor_type.shape.dim]
        for v in free
    ]
    return batch_of(axes, batch, [shapes.get(value.name) for value in free])


def bind_shapes(model: onnx.ModelProto, batch: int, shapes: Shapes) -> onnx.ModelProto:
    """Set every dynamic axis of the inputs and forget the shapes that were stored for others.

    An axis that is stored as −1 is dynamic too, as ONNX Runtime takes it.
    """
    del model.graph.value_info[:]
    names = {tensor.name for tensor in model.graph.initializer}
    free = [value for value in model.graph.input if value.name not in names]
    for name in set(shapes) - {value.name for value in free}:
        raise ModelError(f"shapes: unknown input {name!r}; the model's inputs are {', '.join(v.name for v in free) or 'none'}")
    for value in free:
        axes = value.type.tensor_type.shape.dim
        wanted = shapes.get(value.name, [batch] * len(axes))
        if len(wanted) != len(axes):
            raise ModelError(f"input {value.name!r}: expected a shape of {len(axes)} axes, got {list(wanted)}")
        for axis, size in zip(axes, wanted, strict=True):
            if not axis.HasField("dim_value") or axis.dim_value < 0:
                axis.dim_value = size
            elif value.name in shapes and axis.dim_value != size:
                raise ModelError(f"input {value.name!r}: expected {axis.dim_value} for a fixed axis, got shape {list(wanted)}")
    for value in model.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    return model


def _with_shapes(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """Return the model with these shapes where the types of tensors are known, and inferred anew: for the bodies within it."""
    for value in model.graph.value_info:
        if value.name in shapes and value.type.tensor_type.elem_type:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shapes[value.name]))
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return model


def seen_shapes(bound: onnx.ModelProto, batch: int, shapes: Shapes | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a run of the model shows, where inference cannot follow how they are computed.

    Nothing where the model does not run, or is too large to be handed over in memory.
    """
    shown = onnx.ModelProto()
    shown.CopyFrom(bound)
    given = {value.name for value in bound.graph.output}
    names = [name for node in bound.graph.node for name in node.output if name and name not in given]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
        arrays = session.run(None, random_inputs(session, batch, shapes=shapes))
    except Exception:  # noqa: BLE001 - what cannot be seen is reported by its node, where it is needed
        return {}
    found = {value.name: np.shape(array) for value, array in zip(session.get_outputs(), arrays, strict=True)}
    return {name: tuple(shape) for name, shape in found.items()}


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        axes = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(
            axis.HasField("dim_value") and axis.dim_value >= 0 for axis in axes
        ):
            shapes[value.name] = tuple(int(np.int64(axis.dim_value)) for axis in axes)
    return shapes
