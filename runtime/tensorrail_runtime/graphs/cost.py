"""Computes the cost of a graph from its shapes: parameters, MACs, FLOPs, bytes moved and kernels. FLOPs = 2 × MACs.

Only products are counted: Conv, ConvTranspose, Einsum, Gemm, MatMul, their quantized forms, those of LSTM, GRU, RNN and the
body of a Scan at every time step, and those of com.microsoft's Attention and MultiHeadAttention. An operator that `operators`
does not know is listed in `uncounted` and never silently counted as zero; so are If and Loop, whose bodies run an unknown
number of times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from tensorrail_runtime.errors import ModelError, first_line
from tensorrail_runtime.graphs.constants import FLOATING, MATRIX, constants_of
from tensorrail_runtime.graphs.files import bytes_of, descendants, opset_of
from tensorrail_runtime.graphs.inlining import without_functions
from tensorrail_runtime.graphs.operators import (
    CONTRIB,
    CONTRIB_MACS,
    CONTRIB_NO_MACS,
    DOMAINS,
    NO_MACS,
    CountMacs,
    macs_function,
    operands_of,
)
from tensorrail_runtime.graphs.reading import read_model
from tensorrail_runtime.graphs.shapes import bind_shapes, inferred_shapes, known_shapes, seen_shapes, with_shapes
from tensorrail_runtime.records import Record
from tensorrail_runtime.sessions.inputs import Shapes, batch_of, open_axes
from tensorrail_runtime.sessions.values import Values
from tensorrail_runtime.tables import Part, PrintedRecord, Table

_SCAN_OPSET = 9  # in older versions a Scan has an extra batch axis


_NO_KERNEL = frozenset({"Constant", "Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze"})
"""Nodes that launch no kernel: views, and nodes that ONNX Runtime folds into constants."""


class NodeCost(Record):
    """The cost of one node that multiplies."""

    name: str
    op: str
    weight: str  # name of the constant operand; empty when both operands are computed
    input: tuple[int, ...]
    output: tuple[int, ...]
    params: int
    macs: int

    @property
    def flops(self) -> int:
        """2 × MACs."""
        return 2 * self.macs


class GraphCost(PrintedRecord):
    """The cost of a whole graph at one batch size."""

    model: str
    batch: int
    params: int  # values in floating-point constants, including those of bodies, each counted once
    bytes: int  # of the files on disk, including external data
    macs: int
    activation_bytes: int  # read and written by all nodes, without constants and without fusion
    kernels: int  # nodes that compute, without fusion; those of a Scan's body at every step, if the number of steps is known
    nodes: int  # including those of bodies, each counted once
    unshaped: int  # tensors of unknown size, which activation_bytes leaves out
    layers: tuple[NodeCost, ...]
    uncounted: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what else is not counted, and sizes that were not given

    @property
    def flops(self) -> int:
        """2 × MACs."""
        return 2 * self.macs

    def shown(self) -> tuple[Part, ...]:
        """Return the table of layers and that of the whole graph."""
        rows = [
            (
                layer.weight or layer.name,
                layer.op,
                "×".join(map(str, layer.input)),
                "×".join(map(str, layer.output)),
                f"{layer.params:,}",
                f"{layer.params / (self.params or 1):.1%}",
                f"{layer.flops:,}",
                f"{layer.macs / (self.macs or 1):.1%}",
            )
            for layer in self.layers
        ]
        rows.append(("whole graph", "", "", "", f"{self.params:,}", "", f"{self.flops:,}", ""))
        title = (
            f"{self.model}, batch {self.batch}: {self.nodes} nodes, {self.kernels} kernels, {self.bytes:,} bytes, "
            f"{self.activation_bytes:,} bytes of activations moved"
        )
        head = ("layer", "op", "input", "output", "parameters", "share", "FLOPs (2 × MACs)", "share")
        left_out = (f"not counted: {', '.join(self.uncounted)}",) if self.uncounted else ()
        return (Table(title, head, rows), *left_out, *self.notes)


def cost(path: Path | str, batch: int = 1, shapes: Shapes | None = None, values: Values | None = None) -> GraphCost:
    """Return the cost of a model, computed from its shapes.

    Args:
        path: the ONNX file.
        batch: the size of dynamic axes that `shapes` does not set.
        shapes: shapes of inputs, by name.
        values: known values of inputs by name, where a shape can only be found by a run; default: random ones.

    Returns:
        Parameters, MACs, bytes and kernels of the graph, and the cost of each node that multiplies.

    Raises:
        ModelError: the file is not a valid model, a shape that is needed cannot be inferred, or `shapes` names an unknown
            input or does not fit an input's axes.

    """
    path = Path(path)
    try:
        model = _loaded(path)
        given = {**{name: np.shape(array) for name, array in (values or {}).items()}, **(shapes or {})}
        notes = [f"warning: {line}; FLOPs are those of this size" for line in (*open_axes(model, given), *_times(model, given))]
        samples = _samples(model, batch, shapes or {})
        bound = bind_shapes(model, batch, shapes or {})
        inferred = inferred_shapes(bound)
    except ModelError:
        raise
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}): expected an ONNX model") from None
    except Exception as error:  # noqa: BLE001 - protobuf and onnx raise unrelated classes
        raise ModelError(
            f"{path}: not an ONNX model, or one whose shapes cannot be inferred ({first_line(error)}): give the "
            "shapes of the inputs, such as x=1,3,224,224, or an ONNX file that onnx.checker accepts"
        ) from None
    known = known_shapes(inferred.graph)
    counted = [
        node for node in inferred.graph.node if macs_function(node) or (node.domain in DOMAINS and node.op_type == "Scan")
    ]
    if any(name and name not in known for node in counted for name in (*node.input, node.output[0])):
        observed = seen_shapes(bound, batch, shapes, values)
        inferred = with_shapes(inferred, observed)
        known = known_shapes(inferred.graph) | observed
    try:
        counted_cost = _counted(inferred, known, path, samples)
        return counted_cost.model_copy(update={"notes": (*notes, *_not_counted(inferred))})
    except ModelError:
        raise
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path}: contains a node that is not valid ONNX: its inputs, outputs or weights do not fit ({error})"
        ) from None


def _loaded(path: Path) -> onnx.ModelProto:
    model, _ = read_model(path)
    if not model.graph.node:
        raise ModelError(f"{path}: contains no nodes: expected an ONNX model")
    return without_functions(model)


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
            elif (macs := macs_function(node)) and (node.op_type not in CONTRIB_MACS or _has_shapes(node, scope)):
                layers.append(_node(node, scope, path, macs))
            elif node.op_type == "Scan" and (body := _body(node, scope, opset)) is not None:
                scopes.append(body)  # which this loop reaches later
                continue
            elif node.op_type not in (CONTRIB_NO_MACS if node.domain == CONTRIB else NO_MACS):
                uncounted.add(node.op_type)
            if node.op_type not in _NO_KERNEL:
                kernels += scope.times
                sizes = {name: scope.size_of(name) for name in {*node.input, *node.output} - scope.constants.keys() - {""}}
                moved += scope.times * sum(size or 0 for size in sizes.values())
                unshaped |= {name for name, size in sizes.items() if size is None}
    graphs = [inferred.graph, *descendants(inferred.graph)]
    return GraphCost(
        model=path.name,
        batch=batch,
        params=sum(math.prod(t.dims) for graph in graphs for t in constants_of(graph).values() if t.data_type in FLOATING),
        bytes=bytes_of(path),
        macs=sum(layer.macs for layer in layers),
        activation_bytes=moved,
        kernels=kernels,
        unshaped=len(unshaped),
        nodes=sum(len(graph.node) for graph in graphs),
        layers=tuple(layers),
        uncounted=tuple(sorted(uncounted)),
    )


def _times(model: onnx.ModelProto, shapes: Shapes) -> list[str]:
    """Return a warning for each input whose only dynamic axis is not known to be the batch: it may be a number of frames."""
    stored = {tensor.name for tensor in model.graph.initializer}
    axes = {v.name: v.type.tensor_type.shape.dim for v in model.graph.input if v.name not in stored}
    batches = {own[0].dim_param for own in axes.values() if own and own[0].dim_param}
    lines = []
    for name, own in axes.items():
        dynamic = [axis for axis in own if not axis.dim_value]
        if name not in shapes and len(dynamic) == 1 and dynamic[0] is not own[0] and dynamic[0].dim_param not in batches:
            axis = repr(dynamic[0].dim_param) if dynamic[0].dim_param else list(own).index(dynamic[0])
            example = ",".join(str(axis.dim_value or 50) for axis in own)
            lines.append(
                f"input {name!r} has axis {axis} of any size, set to the batch size: give its shape, such as {name}={example}"
            )
    return lines


def _not_counted(model: onnx.ModelProto) -> list[str]:
    """Return lines about weights whose products are not counted, in bodies of If and Loop, and about quantized weights."""
    lines = []
    for node in (node for graph in (model.graph, *descendants(model.graph)) for node in graph.node):
        if node.op_type in ("If", "Loop") and node.domain in ("", "ai.onnx"):
            inner = [graph for a in node.attribute for graph in ([a.g] if a.HasField("g") else a.graphs)]
            own = {n: t for graph in inner for n, t in constants_of(graph).items() if len(t.dims) >= MATRIX}
            if own:
                named = ", ".join(f"{n} ({math.prod(t.dims):,})" for n, t in sorted(own.items()))
                lines.append(f"FLOPs not counted in the bodies of {node.op_type} {node.name!r}, whose weights are: {named}")
    narrow = [t for t in constants_of(model.graph).values() if t.data_type not in FLOATING and _is_quantized(t)]
    if narrow:
        lines.append(f"quantized weights, not among the parameters: {sum(math.prod(t.dims) for t in narrow):,} values")
    return lines


def _is_quantized(tensor: onnx.TensorProto) -> bool:
    kinds = ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2", "FLOAT4E2M1", "FLOAT8E4M3FN", "FLOAT8E5M2")
    return len(tensor.dims) >= MATRIX and onnx.TensorProto.DataType.Name(tensor.data_type) in kinds


def _computed(graph: onnx.GraphProto) -> set[str]:
    """Return the tensors that nodes compute from constants alone, such as weights of a parametrization."""
    constant = set(constants_of(graph)) | {""}
    computed: set[str] = set()
    for node in graph.node:
        if node.input and all(name in constant for name in node.input) and not any(a.HasField("g") for a in node.attribute):
            constant.update(node.output)
            computed.update(node.output)
    return computed


@dataclass(frozen=True)
class _Scope:
    """A graph or the body of a Scan, how often it runs, and the shapes and constants that are visible in it."""

    graph: onnx.GraphProto
    times: int
    shapes: dict[str, tuple[int, ...]]
    itemsizes: dict[str, int]
    constants: dict[str, onnx.TensorProto | None]  # None for a constant that is not a tensor
    computed: frozenset[str] = frozenset()  # from constants alone

    @classmethod
    def of(
        cls, graph: onnx.GraphProto, shapes: dict[str, tuple[int, ...]], outer: _Scope | None = None, times: int = 1
    ) -> _Scope:
        values = [*graph.input, *graph.value_info, *graph.output]
        not_tensors = {name: None for node in graph.node if node.op_type == "Constant" for name in node.output}
        return cls(
            graph=graph,
            times=times * (outer.times if outer else 1),
            shapes={**(outer.shapes if outer else {}), **shapes},
            itemsizes={**(outer.itemsizes if outer else {}), **{value.name: _itemsize(value) for value in values}},
            constants={**(outer.constants if outer else {}), **not_tensors, **constants_of(graph)},
            computed=frozenset(_computed(graph)),
        )

    def size_of(self, name: str) -> int | None:
        """Return the size of a tensor in bytes; None where its shape or type is unknown."""
        known = name in self.shapes and name in self.itemsizes
        return math.prod(self.shapes[name]) * self.itemsizes[name] if known else None


def _body(node: onnx.NodeProto, scope: _Scope, opset: int) -> _Scope | None:
    """Return the body of a Scan; None where the number of steps, or a shape that its products need, is unknown."""
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
    body = _Scope.of(graph, known_shapes(graph), scope, scanned[axis])
    products = [inner for inner in graph.node if macs_function(inner)]
    needed = (name for inner in products for name in (*operands_of(inner), inner.output[0]) if name)
    return body if all(name in body.shapes for name in needed) else None


def _has_shapes(node: onnx.NodeProto, scope: _Scope) -> bool:
    """Return whether the shapes are known by which the MACs of a node are counted; onnx does not infer all of them."""
    return all(name in scope.shapes for name in (*operands_of(node), node.output[0]) if name)


def _node(node: onnx.NodeProto, scope: _Scope, path: Path, macs: CountMacs) -> NodeCost:
    operands, shapes = operands_of(node), scope.shapes
    for name in (*operands, node.output[0]):
        if name and name not in shapes:
            raise ModelError(
                f"{path}: the shape of {name!r} at node {node.name or node.op_type!r} cannot be inferred: give the shapes of "
                "the inputs, such as x=1,3,224,224"
            )
    sizes, out = [shapes.get(name, ()) for name in operands], shapes.get(node.output[0], ())
    constants = {name: tensor for name in node.input if (tensor := scope.constants.get(name)) is not None}
    computed = [name for name in operands if name in scope.computed and len(shapes[name]) >= MATRIX]
    return NodeCost(
        name=node.name,
        op=node.op_type,
        weight=next((name for name in operands if name in constants), next(iter(computed), "")),
        input=sizes[0],
        output=out,
        params=sum(math.prod(constants[name].dims) for name in _weights(node, operands) if name in constants)
        + sum(math.prod(shapes[name]) for name in computed),
        macs=scope.times * macs(node, sizes, out),
    )


def _weights(node: onnx.NodeProto, operands: list[str]) -> list[str]:
    """Return the operands that may be weights: both of a product, or W and R of a recurrent layer."""
    return list(node.input[1:3]) if node.op_type in ("LSTM", "GRU", "RNN") else operands


def _itemsize(value: onnx.ValueInfoProto) -> int:
    kind = value.type.tensor_type.elem_type
    return int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize) if kind else 4


def _samples(model: onnx.ModelProto, batch: int, shapes: Shapes) -> int:
    """Return the number of samples in a run, as `inputs.batch_of` computes it."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initializers]
    axes = [
        [a.dim_value if a.HasField("dim_value") and a.dim_value >= 0 else None for a in v.type.tensor_type.shape.dim]
        for v in inputs
    ]
    return batch_of(axes, batch, [shapes.get(value.name) for value in inputs])
