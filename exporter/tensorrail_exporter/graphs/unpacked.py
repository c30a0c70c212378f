"""Queries, keys and values that one product computes and several nodes take apart, as the outputs of one Split.

PyTorch's MultiheadAttention and timm's vision transformers give the outputs of the product an axis for the three parts, move it
to the front, and gather each part: Reshape -> [Unsqueeze] -> Transpose -> [Squeeze] -> Gather. A Split of the outputs gives the
same parts, which may then have different sizes: Split -> [Reshape to heads] -> [Transpose].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tensorrail_exporter.graphs.head_paths import Shapes, constant_value, same_axes
from tensorrail_exporter.graphs.io import inferred_shapes
from tensorrail_exporter.graphs.own_products import SIZES_AS_INPUT
from tensorrail_exporter.graphs.parts import Network
from tensorrail_runtime.graphs.files import opset_of

_PART, _ONE = "part", "1"


def unpacked(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which parts of a product are taken by a Split; the model itself if it has none of the other kind.

    Args:
        model: the model; it is not changed.

    """
    if opset_of(model) < SIZES_AS_INPUT:
        return model
    network, shapes = Network(model), Shapes()
    places = [place for place, node in enumerate(network.nodes) if node.op_type == "Reshape" and not node.domain]
    added: dict[int, list[onnx.NodeProto]] = {}
    tensors: list[onnx.TensorProto] = []
    removed: set[int] = set()
    for place in places:
        if len(network.readers.get(network.nodes[place].output[0], ())) != 1:
            continue
        shapes = shapes or inferred_shapes(model, data_prop=True)
        chain = _Chain(network, shapes, place)
        if chain.gathers:
            nodes, stored = _split(network, chain)
            added[place] = nodes
            tensors += stored
            removed.update(chain.places)
    if not removed:
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.node[:]
    for place, node in enumerate(model.graph.node):
        changed.graph.node.extend(added.get(place, ()) if place in added else [] if place in removed else [node])
    changed.graph.initializer.extend(tensors)
    made = {name for node in changed.graph.node for name in node.output}
    between = [value for value in changed.graph.value_info if value.name in made]
    kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in between]
    del changed.graph.value_info[:]
    changed.graph.value_info.extend(kept)
    return changed


class _Chain:
    """The nodes that take the outputs of a product apart; without `gathers` if they are others."""

    def __init__(self, network: Network, shapes: Shapes, place: int) -> None:
        self.network, self.shapes, self.places = network, shapes, [place]
        self.gathers: dict[int, int] = {}  # the node that takes a part, by the part
        node = network.nodes[place]
        self.source = str(node.input[0])
        before, after = shapes.get(self.source), shapes.get(node.output[0])
        self.axes: list[str] = []
        self.sizes: list[int] = []  # of the axes behind that of the parts
        if before is None or after is None or not same_axes(before[:-1], after[: len(before) - 1]):
            return
        behind = after[len(before) :]
        parts = after[len(before) - 1]
        if not isinstance(parts, int) or parts < 2 or len(behind) not in (1, 2) or not all(isinstance(n, int) for n in behind):
            return
        self.sizes, self.parts = [int(size) for size in behind], parts
        self.leading = [f"lead{k}" for k in range(len(before) - 1)]
        self.axes = [*self.leading, _PART, *(f"inner{k}" for k in range(len(behind)))]
        self.name = str(node.output[0])
        outputs = {value.name for value in network.graph.output}
        while self.axes and self.name not in outputs:
            readers = network.readers.get(self.name, [])
            if len(readers) != 1 or network.nodes[readers[0]].op_type == "Split":
                self._take(readers)
                return
            if not self._move(readers[0]):
                return

    def _move(self, place: int) -> bool:
        """Follow the axes through a node; return whether that can be."""
        node = self.network.nodes[place]
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Transpose" and "perm" in attributes:
            self.axes = [self.axes[axis] for axis in attributes["perm"]]
        elif node.op_type in ("Unsqueeze", "Squeeze"):
            given = constant_value(self.network, node.input[1]) if len(node.input) > 1 else np.array(attributes.get("axes", []))
            if given is None or given.size != 1:
                return False
            axis = int(given.reshape(-1)[0])
            if node.op_type == "Unsqueeze":
                self.axes.insert(axis % (len(self.axes) + 1), _ONE)
            elif self.axes.pop(axis) != _ONE:
                return False
        else:
            return False
        self.places.append(place)
        self.name = str(node.output[0])
        return True

    def _take(self, readers: Sequence[int]) -> None:
        """Find the nodes that take one part each."""
        by_reader = [self._parts_of(place) for place in readers]
        parts = [part for own in by_reader for part in own]
        outputs = {value.name for value in self.network.graph.output}
        if not all(by_reader) or any(tensor in outputs for _, _, tensor in parts):
            return  # something else reads the product, or a part is an output of the graph
        found: dict[int, int] = {}
        for index, place, tensor in parts:
            last = place if tensor is None else self._squeezed(tensor)
            if last is None or not 0 <= index < self.parts:
                return
            found[index] = last
            self.places += {place, last}
        rest = [name for name in self.axes if name != _PART]
        if len(found) == len(parts) == self.parts and _ONE not in rest:
            self.axes, self.gathers = rest, found

    def _parts_of(self, place: int) -> list[tuple[int, int, str | None]]:
        """Return the parts that a node takes: which, the node, and its output if that still has the axis of the parts."""
        node = self.network.nodes[place]
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        values = [constant_value(self.network, name) for name in node.input[1:]]
        numbers = [int(value.reshape(-1)[0]) if value is not None and value.size == 1 else None for value in values]
        own, rank = self.axes.index(_PART), len(self.axes)
        if node.input[0] == self.name and node.op_type == "Gather" and numbers[0] is not None and values[0] is not None:
            taken = attributes.get("axis", 0) % rank == own and values[0].ndim == 0
            return [(numbers[0] % self.parts, place, None)] if taken else []
        if node.op_type == "Slice" and len(numbers) in (3, 4):
            begin, end, axis = numbers[:3]
            if begin is None or axis is None or end != begin + 1 or axis % rank != own or numbers[3:] not in ([], [1]):
                return []
            return [(begin, place, node.output[0])]
        if node.op_type == "Split" and attributes.get("axis", 0) % rank == own and len(node.output) == self.parts:
            return [(k, place, out) for k, out in enumerate(node.output)]
        return []

    def _squeezed(self, tensor: str) -> int | None:
        """Return the node that removes the axis of the parts from one part."""
        readers = self.network.readers.get(tensor, [])
        node = self.network.nodes[readers[0]] if len(readers) == 1 else None
        if node is None or node.op_type != "Squeeze" or len(node.input) < 2:
            return None
        axes = constant_value(self.network, node.input[1])
        own = axes is not None and axes.size == 1 and int(axes.reshape(-1)[0]) % len(self.axes) == self.axes.index(_PART)
        return readers[0] if own else None


def _split(network: Network, chain: _Chain) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return the nodes and stored tensors that give the same parts."""
    name, width = f"{chain.source}/parts", int(np.prod(chain.sizes))
    order = [*chain.leading, *(f"inner{k}" for k in range(len(chain.sizes)))]
    perm = [order.index(axis) for axis in chain.axes]
    tensors = [numpy_helper.from_array(np.full(chain.parts, width, np.int64), f"{name}/sizes")]
    outputs, nodes = [], []
    for part, place in sorted(chain.gathers.items()):
        current = str(network.nodes[place].output[0])
        if perm != sorted(perm):
            apart = f"{name}{part}/moved"
            nodes.append(helper.make_node("Transpose", [apart], [current], name=apart, perm=perm))
            current = apart
        if len(chain.sizes) > 1:
            apart, shape = f"{name}{part}/heads", f"{name}{part}/shape"
            tensors.append(numpy_helper.from_array(np.array([0] * len(chain.leading) + chain.sizes, np.int64), shape))
            nodes.append(helper.make_node("Reshape", [apart, shape], [current], name=apart))
            current = apart
        outputs.append(current)
    nodes.append(helper.make_node("Split", [chain.source, f"{name}/sizes"], outputs, name=name, axis=len(chain.leading)))
    return nodes[::-1], tensors
