"""Keeping the parts of a graph that onnx-graphsurgeon drops or cannot read.

They are removed before it reads a graph, and restored after it has written it: overload, metadata and doc string of nodes;
attributes without a value, with text that is not UTF-8, or that are types, lists of tensors or sparse tensors; inputs and
outputs that are optional, sequences or maps; annotations of tensors. A node is recognised by its operator, inputs and outputs,
so that every node that was not rewritten keeps them.

An attribute that is a list of graphs is an error: what only these graphs read would be taken for unused.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.graphs.files import descendants

_A = onnx.AttributeProto
_UNKNOWN = frozenset({_A.TYPE_PROTO, _A.TYPE_PROTOS, _A.TENSORS, _A.SPARSE_TENSOR, _A.SPARSE_TENSORS})
_LISTS = {_A.FLOATS: "floats", _A.INTS: "ints", _A.STRINGS: "strings", _A.GRAPHS: "graphs"}


def presentable(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the model that onnx-graphsurgeon can read and write, or the model itself if it already can.

    Raises:
        GraphError: a node has an attribute that is a list of graphs.

    """
    graphs = [model.graph, *descendants(model.graph)]
    for node in (node for graph in graphs for node in graph.node):
        several = next((attribute.name for attribute in node.attribute if attribute.graphs), None)
        if several is not None:
            raise GraphError(
                f"node {node.name or node.op_type}: its attribute {several!r} is a list of graphs, which would be lost; "
                "expected attributes with one graph each, as in If, Loop and Scan"
            )
    clean = all(_known(a) for graph in graphs for node in graph.node for a in node.attribute) and all(
        _is_tensor(value) for graph in graphs for value in _values(graph)
    )
    if clean:
        return model
    readable = onnx.ModelProto()
    readable.CopyFrom(model)
    for graph in [readable.graph, *descendants(readable.graph)]:
        for node in graph.node:
            kept = [a for a in node.attribute if _known(a)]
            if len(kept) < len(node.attribute):
                copies = [_A.FromString(a.SerializeToString()) for a in kept]
                del node.attribute[:]
                node.attribute.extend(copies)
        for value in (*graph.input, *graph.output):
            if not _is_tensor(value):  # any type will do: `restore` puts the original one back
                value.type.CopyFrom(onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None))
        between = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in graph.value_info if _is_tensor(v)]
        del graph.value_info[:]
        graph.value_info.extend(between)
    return readable


def restore(graph: onnx.GraphProto, original: onnx.GraphProto) -> None:
    """Restore, in place, what the nodes and values of a written graph have lost compared with the original one."""
    nodes = {_identity(node): node for node in original.node}
    for node in graph.node:
        before = nodes.get(_identity(node))
        if before is None:
            continue
        node.overload, node.doc_string = before.overload, before.doc_string
        del node.metadata_props[:]
        node.metadata_props.extend(before.metadata_props)
        present = {attribute.name for attribute in node.attribute}
        node.attribute.extend(a for a in before.attribute if a.name not in present and not _known(a))
        graphs = {attribute.name: attribute.g for attribute in before.attribute if attribute.HasField("g")}
        for attribute in node.attribute:
            if attribute.name in graphs:
                restore(attribute.g, graphs[attribute.name])
    values = {value.name: value for value in (*original.input, *original.output)}
    for value in (*graph.input, *graph.output):
        if value.name in values:  # rewriting changes neither the type nor the shape of inputs and outputs
            value.CopyFrom(values[value.name])
    used = {name for node in graph.node for name in (*node.input, *node.output)}
    between = {value.name: value for value in original.value_info}
    for value in graph.value_info:
        if value.name in between:
            value.doc_string = between[value.name].doc_string
            value.metadata_props.extend(between[value.name].metadata_props)
    graph.quantization_annotation.extend(a for a in original.quantization_annotation if a.tensor_name in used)
    if not graph.metadata_props:
        graph.metadata_props.extend(original.metadata_props)


def _identity(node: onnx.NodeProto) -> tuple[object, ...]:
    """Return what a node is recognised by."""
    return node.domain, node.op_type, _without_trailing_empty(node.input), _without_trailing_empty(node.output)


def _without_trailing_empty(names: Iterable[str]) -> tuple[str, ...]:
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return tuple(kept)


def _values(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    return [*graph.input, *graph.output, *graph.value_info]


def _is_tensor(value: onnx.ValueInfoProto) -> bool:
    return value.type.WhichOneof("value") in (None, "tensor_type")


def _known(attribute: onnx.AttributeProto) -> bool:
    """Return whether onnx-graphsurgeon can read and write an attribute."""
    if attribute.type in _UNKNOWN or (attribute.type in _LISTS and not len(getattr(attribute, _LISTS[attribute.type]))):
        return False
    try:
        for text in (attribute.s, *attribute.strings):
            text.decode()
    except UnicodeDecodeError:
        return False
    return True
