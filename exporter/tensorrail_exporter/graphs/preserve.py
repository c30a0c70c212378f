"""What onnx-graphsurgeon does not carry through a graph: taken out before it reads, and put back after it has written.

It knows neither a node's overload, metadata and doc string, nor attributes without a value, of text that is not UTF-8, or that
are types or sparse tensors, nor inputs and outputs that are optional, sequences or maps, nor what is noted at tensors. A node
that was not rewritten keeps all of them: it is known by its operator, inputs and outputs.
"""

from __future__ import annotations

import onnx

from tensorrail_runtime.graphs.files import descendants

_A = onnx.AttributeProto
_UNKNOWN = frozenset({_A.TYPE_PROTO, _A.TYPE_PROTOS, _A.SPARSE_TENSOR, _A.SPARSE_TENSORS})
_LISTS = {_A.FLOATS: "floats", _A.INTS: "ints", _A.STRINGS: "strings", _A.TENSORS: "tensors", _A.GRAPHS: "graphs"}


def presentable(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model as onnx-graphsurgeon can read and write it; the argument itself where nothing is in its way."""
    graphs = [model.graph, *descendants(model.graph)]
    clean = all(_known(a) for graph in graphs for node in graph.node for a in node.attribute) and all(
        _is_tensor(value) for graph in graphs for value in _values(graph)
    )
    if clean:
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for graph in [made.graph, *descendants(made.graph)]:
        for node in graph.node:
            kept = [a for a in node.attribute if _known(a)]
            if len(kept) < len(node.attribute):
                copies = [_A.FromString(a.SerializeToString()) for a in kept]
                del node.attribute[:]
                node.attribute.extend(copies)
        for value in (*graph.input, *graph.output):
            if not _is_tensor(value):  # any type will do: the original's is put back
                value.type.CopyFrom(onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None))
        between = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in graph.value_info if _is_tensor(v)]
        del graph.value_info[:]
        graph.value_info.extend(between)
    return made


def restore(graph: onnx.GraphProto, original: onnx.GraphProto) -> None:
    """Put back, in place, what the nodes and values of a written graph have lost against the original one."""
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
        if value.name in values:  # a rewriting changes neither type nor shape of what comes in and goes out
            value.CopyFrom(values[value.name])
    there = {name for node in graph.node for name in (*node.input, *node.output)}
    between = {value.name: value for value in original.value_info}
    for value in graph.value_info:
        if value.name in between:
            value.doc_string = between[value.name].doc_string
            value.metadata_props.extend(between[value.name].metadata_props)
    graph.quantization_annotation.extend(a for a in original.quantization_annotation if a.tensor_name in there)
    if not graph.metadata_props:
        graph.metadata_props.extend(original.metadata_props)


def _identity(node: onnx.NodeProto) -> tuple[object, ...]:
    return node.domain, node.op_type, _used(node.input), _used(node.output)


def _used(names: object) -> tuple[str, ...]:
    found = list(names)  # type: ignore[call-overload] # protobuf's own list
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def _values(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    return [*graph.input, *graph.output, *graph.value_info]


def _is_tensor(value: onnx.ValueInfoProto) -> bool:
    return value.type.WhichOneof("value") in (None, "tensor_type")


def _known(attribute: onnx.AttributeProto) -> bool:
    if attribute.type in _UNKNOWN or (attribute.type in _LISTS and not len(getattr(attribute, _LISTS[attribute.type]))):
        return False
    try:
        for text in (attribute.s, *attribute.strings):
            text.decode()
    except UnicodeDecodeError:
        return False
    return True
