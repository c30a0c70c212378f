"""A graph as the converters of ONNX Runtime can read it, and the way back to the names that it came with.

The converters name new tensors and nodes after old ones (`w_scale`, `w_zero_point`, `b0`, `x_cast_to_fp32`) and do not look
whether a name is taken: with one that is, a graph computes something else, or none is written. Therefore every tensor and node
gets a code as its name first, `#0#`, `#1#` and so on, which no other name can equal, also where names repeat between bodies.
Afterwards codes become names again, and a new name that the graph already has gets a number.

Besides, a converter overlooks constants that are not stored as tensors, and what stands in functions of the model, and fails on
outputs that no node computes. So constants become tensors, functions are inlined, and such outputs are left out meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from tensorrail_exporter.graphs.names import defined_names, free_name
from tensorrail_runtime.graphs.files import descendants
from tensorrail_runtime.graphs.inlining import without_functions
from tensorrail_runtime.graphs.operators import constant_tensor

_CODE = re.compile(r"#(\d+)#")


class Prepared:
    """A model that a converter can read, and how its result is read.

    Args:
        model: a model whose nodes all have names of their own, see `weights.with_names`; it is not changed.

    Attributes:
        model: the model with codes for names.

    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        graph = self.model.graph
        self._names: list[str] = []
        computed = {name for node in graph.node for name in node.output}
        self._outputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in graph.output]
        kept = [value for value in self._outputs if value.name in computed]
        if kept:
            del graph.output[:]
            graph.output.extend(kept)
        named = {value.name for value in self._outputs} - {value.name for value in kept}
        self._stored = [tensor for tensor in model.graph.initializer if tensor.name in named]
        self._sparse = [tensor for tensor in model.graph.sparse_initializer if tensor.values.name in named]
        self._node_codes: dict[str, str] = {}
        self._codes = self._coded(graph, {})

    def code(self, name: str) -> str:
        """Return the code of a tensor of the main graph."""
        return self._codes.get(name, name)

    def node_code(self, name: str) -> str:
        """Return the code of a node, also of one in a body; a tensor may have the same name."""
        return self._node_codes.get(name, name)

    def feed(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return inputs by the codes of their names."""
        return {self.code(name): array for name, array in feed.items()}

    def text(self, text: str) -> str:
        """Return a message with names in place of codes."""
        return _CODE.sub(self._name, text)

    def restored(self, converted: onnx.ModelProto) -> onnx.ModelProto:
        """Give a converted model its names, in place, and the outputs that no node computes; returns it.

        An output that was a stored weight keeps its values, also where the weight itself has changed.
        """
        taken = set(self._names)
        own = set(self._codes.values())
        moved = [name for name in defined_names(converted.graph) if _CODE.fullmatch(name) and name not in own]  # out of a body
        renamed = {name: free_name(self.text(name), taken) for name in moved}

        def name_of(name: str) -> str:
            if not name:
                return name
            if name not in renamed:
                code = _CODE.fullmatch(name)
                renamed[name] = self._name(code) if code else free_name(self.text(name), taken)
            return renamed[name]

        for graph in (converted.graph, *descendants(converted.graph)):
            _rename(graph, name_of, name_of)
        self._restore_outputs(converted, taken)
        return converted

    def _name(self, code: re.Match[str]) -> str:
        number = int(code[1])
        return self._names[number] if number < len(self._names) else code[0]

    def _new(self, name: str) -> str:
        self._names.append(name)
        return f"#{len(self._names) - 1}#"

    def _coded(self, graph: onnx.GraphProto, outer: Mapping[str, str]) -> dict[str, str]:
        """Give all that a graph and its bodies name a code, and return the codes of the graph's own tensors."""
        own: dict[str, str] = {}
        for name in defined_names(graph):
            own.setdefault(name, self._new(name))
        known = {**outer, **own, "": ""}
        for node in graph.node:
            for attribute in node.attribute:
                for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                    self._coded(body, known)
        nodes = {node.name: self._new(node.name) for node in graph.node if node.name}
        self._node_codes |= nodes
        _rename(graph, lambda name: known.get(name, name), lambda name: nodes.get(name, name))
        return own

    def _restore_outputs(self, converted: onnx.ModelProto, taken: set[str]) -> None:
        graph = converted.graph
        inputs = {value.name for value in graph.input}
        stored = {tensor.name: tensor for tensor in graph.initializer}
        computed = {name for node in graph.node for name in node.output}
        for tensor in self._stored:
            if tensor.name in inputs:  # a weight with a default: the output follows the input
                continue
            if tensor.name in computed or (tensor.name in stored and not _equal(stored[tensor.name], tensor)):
                others = {tensor.name: free_name(tensor.name, taken)}
                for inner in (graph, *descendants(graph)):
                    _rename(inner, lambda name, others=others: others.get(name, name))  # type: ignore[misc]
                stored.pop(tensor.name, None)
            if tensor.name not in stored:
                graph.initializer.append(tensor)
        sparse = {tensor.values.name for tensor in graph.sparse_initializer}
        graph.sparse_initializer.extend(tensor for tensor in self._sparse if tensor.values.name not in sparse)
        present = {value.name: value for value in graph.output} | {value.name: value for value in graph.input}
        values = [onnx.ValueInfoProto.FromString(present.get(v.name, v).SerializeToString()) for v in self._outputs]
        del graph.output[:]
        graph.output.extend(values)


def plain_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy without functions, in which every Constant holds a tensor, which converters and checks know."""
    plain = onnx.ModelProto()
    plain.CopyFrom(without_functions(model))
    for graph in (plain.graph, *descendants(plain.graph)):
        for node in graph.node:
            tensor = constant_tensor(node)
            if tensor is not None and node.attribute[0].name != "value":
                del node.attribute[:]
                node.attribute.append(onnx.helper.make_attribute("value", tensor))
    return plain


def _equal(first: onnx.TensorProto, second: onnx.TensorProto) -> bool:
    return first.data_type == second.data_type and np.array_equal(numpy_helper.to_array(first), numpy_helper.to_array(second))


def _rename(graph: onnx.GraphProto, tensor: Callable[[str], str], node: Callable[[str], str] = str) -> None:
    """Rename all tensors and nodes of a graph, but not those of its bodies."""
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = tensor(value.name)
    for sparse in graph.sparse_initializer:
        sparse.values.name = tensor(sparse.values.name)
    for annotation in graph.quantization_annotation:
        annotation.tensor_name = tensor(annotation.tensor_name)
        for entry in annotation.quant_parameter_tensor_names:
            entry.value = tensor(entry.value)
    for operation in graph.node:
        operation.name = node(operation.name)
        for names in (operation.input, operation.output):
            names[:] = [tensor(name) for name in names]
