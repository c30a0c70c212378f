"""Parts of a network: some of its nodes, with the constants that they read, as a model of their own. Nothing is imported."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import onnx

_IR_VERSION = 4  # the first in which an initializer need not be an input


class Network:
    """The nodes of a model by the tensors that they make and read; what is read of `constants` may be changed.

    What a node's bodies read from the graph around them is read by the node.
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
        """Return whether a tensor's values stand in the model."""
        return name in self.constants or name in self.sparse

    def knows(self, name: str) -> bool:
        """Return whether a tensor is an input, a constant or made by a node of the graph, those of bodies left out."""
        return name in self.makers or name in self.inputs or self.is_stored(name)

    def above(self, tensors: Iterable[str], known: Collection[str] = ()) -> set[int]:
        """Return the places of the nodes that tensors are computed by, as far as they are not above `known` ones."""
        found: set[int] = set()
        waiting = list(tensors)
        while waiting:
            name = waiting.pop()
            place = self.makers.get(name)
            if place is not None and place not in found and name not in known:
                found.add(place)
                waiting.extend(self.reads[place])
        return found

    def part(self, places: Iterable[int], inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[str]) -> onnx.ModelProto:
        """Return some of the nodes as a model from `inputs` to `outputs`, whose types the runtime infers."""
        order = sorted(places)
        part = onnx.ModelProto(ir_version=max(self.model.ir_version, _IR_VERSION))
        part.opset_import.extend(self.model.opset_import)
        part.functions.extend(self.model.functions)
        part.graph.name = "part"
        part.graph.node.extend(self.nodes[place] for place in order)
        read = dict.fromkeys(name for place in order for name in sorted(self.reads[place])) | dict.fromkeys(outputs)
        part.graph.initializer.extend(self.constants[name] for name in read if name in self.constants)
        part.graph.sparse_initializer.extend(self.sparse[name] for name in read if name in self.sparse)
        part.graph.input.extend(inputs)
        part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        return part


def reads_of(node: onnx.NodeProto) -> frozenset[str]:
    """Return the names of the tensors that a node or its bodies read from the graph that the node stands in."""
    read = {name for name in node.input if name}
    for attribute in node.attribute:
        for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            made = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
            made |= {name for inner in body.node for name in inner.output}
            wanted = {value.name for value in body.output}.union(*(reads_of(inner) for inner in body.node))
            read |= wanted - made
    return frozenset(read)


def written_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield every node, each followed by the nodes of its bodies: in the order of `rewrite.sites.walk`."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from written_nodes(body)
