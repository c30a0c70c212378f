"""Extracts some nodes of a model, with the constants that they read, as a separate model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import onnx

_IR_VERSION = 4  # the first version in which initializers need not be inputs


class Network:
    """Indexes the nodes of a model by their inputs and outputs. The values in `constants` may be replaced.

    Tensors that the bodies of a node read from the graph count as inputs of the node.

    Args:
        model: the model; it is not copied.

    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.model, self.graph = model, graph
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self.reads: list[frozenset[str]] = [reads_of(node) for node in self.nodes]
        self.readers: dict[str, list[int]] = {}
        for place, names in enumerate(self.reads):
            for name in names:
                self.readers.setdefault(name, []).append(place)
        self.makers = {name: place for place, node in enumerate(self.nodes) for name in node.output if name}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.sparse = {tensor.values.name: tensor for tensor in graph.sparse_initializer}
        self.inputs = {value.name: value for value in graph.input if not self.is_stored(value.name)}

    def is_stored(self, name: str) -> bool:
        """Return whether a tensor is an initializer."""
        return name in self.constants or name in self.sparse

    def knows(self, name: str) -> bool:
        """Return whether a tensor is an input, an initializer or the output of a node of the graph, outside of bodies."""
        return name in self.makers or name in self.inputs or self.is_stored(name)

    def above(self, tensors: Iterable[str], known: Collection[str] = ()) -> set[int]:
        """Return the nodes that are needed to compute some tensors from others.

        Args:
            tensors: the tensors to compute.
            known: tensors whose values are given; default: none.

        Returns:
            The indices of the nodes.

        """
        needed: set[int] = set()
        waiting = list(tensors)
        while waiting:
            name = waiting.pop()
            place = self.makers.get(name)
            if place is not None and place not in needed and name not in known:
                needed.add(place)
                waiting.extend(self.reads[place])
        return needed

    def part(self, places: Iterable[int], inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[str]) -> onnx.ModelProto:
        """Return some of the nodes as a model.

        Args:
            places: the indices of the nodes.
            inputs: the inputs of the model.
            outputs: the names of its outputs; ONNX Runtime infers their types.

        Returns:
            The model, with the constants that the nodes read.

        """
        order = sorted(places)
        submodel = onnx.ModelProto(ir_version=max(self.model.ir_version, _IR_VERSION))
        submodel.opset_import.extend(self.model.opset_import)
        submodel.functions.extend(self.model.functions)
        submodel.graph.name = "part"
        submodel.graph.node.extend(self.nodes[place] for place in order)
        read = dict.fromkeys(name for place in order for name in sorted(self.reads[place])) | dict.fromkeys(outputs)
        submodel.graph.initializer.extend(self.constants[name] for name in read if name in self.constants)
        submodel.graph.sparse_initializer.extend(self.sparse[name] for name in read if name in self.sparse)
        submodel.graph.input.extend(inputs)
        submodel.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        return submodel


def reads_of(node: onnx.NodeProto) -> frozenset[str]:
    """Return the names of the tensors that a node and its bodies read from the graph that contains the node."""
    read = {name for name in node.input if name}
    for attribute in node.attribute:
        for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            local = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
            local |= {name for inner in body.node for name in inner.output}
            used = {value.name for value in body.output}.union(*(reads_of(inner) for inner in body.node))
            read |= used - local
    return frozenset(read)


def written_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield every node, followed by the nodes of its bodies, in the same order as `rewrite.sites.walk`."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from written_nodes(body)
