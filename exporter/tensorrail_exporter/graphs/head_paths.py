"""Follows the outputs of a product through the nodes that divide them into heads, to the node that uses the heads.

A product gives heads · d values side by side. Reshape makes axes of them, of the heads and of the d values of a head; Transpose
moves these axes, scalars scale, and a later Reshape may put the heads together with the batch, or side by side again. The walk
keeps where both axes are, and which numbers in the shapes of Reshape nodes are d or heads · d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tensorrail_exporter.graphs.own_products import STANDARD
from tensorrail_exporter.graphs.parts import Network

Shapes = dict[str, list[int | str]]

_OF_SHAPES = ("Shape", "Slice", "Gather", "Concat", "Unsqueeze", "Squeeze", "Cast", "Identity")


@dataclass(frozen=True)
class Layout:
    """Where the values of heads are in a tensor."""

    tensor: str
    axis: int
    """The axis of the values of a head, or of all heads side by side."""
    size: int
    """How many values it has."""
    heads: int = 0
    """The number of heads; 0 while it is not known."""
    head_axis: int = -1
    """The axis of the heads; -1 while they are side by side."""
    merged: bool = False
    """Whether the axis of the heads is also that of the batch, with the head as the faster index."""


@dataclass(frozen=True)
class Edit:
    """A number in the shape of a Reshape that changes with the size of heads."""

    place: int
    """The Reshape node."""
    position: int
    """Which number of its shape."""
    apart: bool
    """Whether it is the size d of a head; otherwise it is heads · d."""


class Path:
    """The way of the values of heads through a graph.

    Attributes:
        layout: where the values are at the end of the way.
        layouts: where they are in each tensor on it.
        edits: the numbers that change with the size.
        frozen: nodes that read the size of heads from a shape for something else, such as the scale of scores, which keeps the
            size of the dense network; with that size.
        end: the node that uses the heads; -1 if there is none.
        reason: why there is none.
        known: whether all numbers that change with the size are known.

    """

    def __init__(self, network: Network, shapes: Shapes, start: Layout) -> None:
        self.network, self.shapes = network, shapes
        self.outputs = {value.name for value in network.graph.output}
        self.layout, self.layouts = start, [start]
        self.edits: list[Edit] = []
        self.frozen: dict[int, int] = {}
        self.reshapes: set[int] = set()
        self.sized: set[int] = set()  # Reshapes whose numbers are computed from the shape of a tensor on the way
        self.computed: list[tuple[int, int, bool]] = []  # numbers of Reshapes that are computed from elsewhere
        self.end, self.reason, self.known = -1, "", True
        while self.end < 0 and not self.reason:
            self._step()
        if not self.reason and not self.sized <= self.reshapes:
            self.reason = f"the shape of {start.tensor!r}, with the size of heads in it, is used elsewhere"
        for place, position, apart in self.computed:  # inference knows their values
            pieces = pieces_of(network, shapes, network.nodes[place].input[1])
            if (position, position + 1) not in [(begin, end) for _, begin, end in pieces]:
                self.reason = self.reason or "the size of heads is computed in the graph from another shape"
                self.known = False
                continue
            self.edits.append(Edit(place, position, apart))

    def _step(self) -> None:
        name = self.layout.tensor
        place = self._reader(name)
        if place is None:
            return
        node = self.network.nodes[place]
        if node.op_type == "MatMul" or (self.layout.head_axis < 0 and node.op_type in ("Gemm", *ATTENTIONS)):
            self.end = place
            return
        steps = {"Reshape": self._reshaped, "Transpose": self._transposed, "Mul": self._scaled, "Div": self._scaled}
        step = steps.get(node.op_type if node.domain in STANDARD else "")
        moved = step(place, node) if step is not None else None
        if moved is None:
            self.reason = self.reason or f"{name!r} is read by {node.op_type}, with which heads of another size may not agree"
            return
        self.layout = moved
        self.layouts.append(moved)

    def _reader(self, name: str) -> int | None:
        """Return the only node that reads a tensor, besides nodes for shapes of Reshapes on the way."""
        readers = []
        for place in self.network.readers.get(name, ()):
            if self.network.nodes[place].op_type != "Shape":
                readers.append(place)
            elif (fed := _reshapes_fed(self.network, place)) is not None:
                self.sized |= fed
            elif (takers := self._size_takers(place)) is not None:
                self.frozen.update(dict.fromkeys(takers, self.layout.size))
            else:
                self.reason = f"the shape of {name!r}, with the size of heads in it, is used elsewhere"
                return None
        if len(readers) != 1 or name in self.outputs or list(self.network.nodes[readers[0]].input).count(name) != 1:
            self.reason = f"{name!r} is read by several nodes, or is an output of the graph"
            return None
        return readers[0]

    def _size_takers(self, place: int) -> list[int] | None:
        """Return the nodes that take the size of heads alone from a shape; None if something else reads the shape."""
        layout, network = self.layout, self.network
        rank, takers = len(self.shapes.get(layout.tensor, ())), network.readers.get(network.nodes[place].output[0], [])
        if layout.head_axis < 0 or layout.axis != rank - 1 or network.nodes[place].attribute:  # Shape with start or end
            return None
        for taker in takers:
            node = network.nodes[taker]
            values = [constant_value(network, name) for name in node.input[1:3]]
            numbers = [int(one.reshape(-1)[0]) if one is not None and one.size == 1 else None for one in values]
            sliced = node.op_type == "Slice" and len(numbers) == 2 and numbers[0] in (-1, rank - 1)
            whole = sliced and numbers[1] is not None and numbers[1] >= rank
            if not whole and not (node.op_type == "Gather" and numbers[0] in (-1, rank - 1)):
                return None
        return takers

    def _transposed(self, place: int, node: onnx.NodeProto) -> Layout | None:
        perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        if perm is None:
            return None
        head_axis = self.layout.head_axis
        if head_axis < 0 and perm[-1] != len(perm) - 1:
            return None
        moved = perm.index(head_axis) if head_axis >= 0 else -1
        return replace(self.layout, tensor=node.output[0], axis=perm.index(self.layout.axis), head_axis=moved)

    def _scaled(self, place: int, node: onnx.NodeProto) -> Layout | None:
        other = node.input[1] if node.input[0] == self.layout.tensor else node.input[0]
        factor = constant_value(self.network, other)
        shape = self.shapes.get(other) if factor is None else list(factor.shape)
        if shape not in ([], [1]) or (node.op_type == "Div" and other == node.input[0]):
            return None
        return replace(self.layout, tensor=node.output[0])

    def _reshaped(self, place: int, node: onnx.NodeProto) -> Layout | None:
        before, after = self.shapes.get(node.input[0]), self.shapes.get(node.output[0])
        if before is None or after is None or node.input[0] != self.layout.tensor:
            self.reason = f"the shape of {node.output[0]!r} is unknown"
            return None
        moved = _regrouped(self.layout, before, after, node.output[0])
        if moved is None:
            self.reason = f"the Reshape to {node.output[0]!r} does not keep heads together"
            return None
        self.reshapes.add(place)
        number = self._number(node, moved.axis)
        if number is None:
            if place not in self.sized or not self._is_of_shape(node, moved.axis):
                self.computed.append((place, moved.axis, moved.head_axis >= 0))
        elif number == moved.size:
            self.edits.append(Edit(place, moved.axis, moved.head_axis >= 0))
        elif number != -1 and not (number == 0 and self.layout.axis == moved.axis):
            return None
        return moved

    def _is_of_shape(self, node: onnx.NodeProto, position: int) -> bool:
        """Return whether a number of the shape of a Reshape comes from the shape of a tensor alone, and so grows with it."""
        pieces = pieces_of(self.network, self.shapes, node.input[1])
        name = next((one for one, begin, end in pieces if begin <= position < end), "")
        while (place := self.network.makers.get(name)) is not None:
            maker = self.network.nodes[place]
            if maker.op_type == "Shape" or maker.op_type not in _OF_SHAPES or maker.op_type == "Concat":
                return maker.op_type == "Shape"
            name = maker.input[0]
        return False

    def _number(self, node: onnx.NodeProto, position: int) -> int | None:
        """Return a number of the shape of a Reshape; None for one that is computed."""
        for name, begin, end in pieces_of(self.network, self.shapes, node.input[1]):
            if begin <= position < end:
                values = constant_value(self.network, name)
                return None if values is None else int(values.reshape(-1)[position - begin])
        return None


def same_axes(one: Sequence[int | str], other: Sequence[int | str]) -> bool:
    """Return whether axes are known to have the same sizes: by their numbers or names, which an empty text is not."""
    return list(one) == list(other) and "" not in one


ATTENTIONS = ("MultiHeadAttention", "Attention")
"""Operators that take query, key and value with the values of all heads side by side."""


def constant_value(network: Network, name: str) -> np.ndarray | None:
    """Return the value of a stored tensor or of a Constant node; None for anything else."""
    tensor = network.constants.get(name)
    if tensor is None and name in network.makers:
        node = network.nodes[network.makers[name]]
        if node.op_type == "Constant" and node.domain in STANDARD:
            value = helper.get_attribute_value(node.attribute[0])
            if not isinstance(value, onnx.TensorProto):
                return np.asarray(value) if isinstance(value, int | float | list) else None
            tensor = value
    return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))


def pieces_of(network: Network, shapes: Shapes, name: str) -> list[tuple[str, int, int]]:
    """Return the tensors that a shape is put together from, each with its first number and the one behind its last."""
    place = network.makers.get(name)
    joined = place is not None and network.nodes[place].op_type == "Concat"
    names = list(network.nodes[place].input) if place is not None and joined else [name]
    pieces, begin = [], 0
    for one in names:
        values, shape = constant_value(network, one), shapes.get(one)
        length = values.size if values is not None else shape[0] if shape else None
        if not isinstance(length, int):
            break
        pieces.append((one, begin, begin + length))
        begin += length
    return pieces


def _regrouped(layout: Layout, before: Sequence[int | str], after: Sequence[int | str], name: str) -> Layout | None:
    """Return the layout behind a Reshape; None if it does not keep heads together."""
    last = len(after) - 1
    if layout.head_axis < 0:
        size = after[-1]
        if size == layout.size:
            return replace(layout, tensor=name, axis=last)
        if not isinstance(size, int) or size < 1 or layout.size % size or last < 1:
            return None
        heads = layout.size // size
        if layout.heads not in (0, heads):
            return None
        merged = after[-2] != heads  # the rows of the batch lie before the heads in the same axis
        if merged and not same_axes(before[:-2], after[:-2]):
            return None
        return Layout(name, last, size, heads, last - 1, merged)
    behind = len(before) - 1 - layout.head_axis  # axes behind that of the heads
    side_by_side = layout.axis == len(before) - 1 and behind == 1
    if side_by_side and after[-1] == layout.heads * layout.size and list(after[-2:]) != list(before[-2:]):
        return Layout(name, last, layout.heads * layout.size, layout.heads)
    if layout.axis < layout.head_axis or len(after) < behind + 1 or list(after[-behind:]) != list(before[-behind:]):
        return None
    head_axis = len(after) - 1 - behind
    apart = after[head_axis] == layout.heads
    if not apart and head_axis:  # the heads must go with all axes before them
        return None
    axis = layout.axis + len(after) - len(before)
    return Layout(name, axis, layout.size, layout.heads, head_axis, merged=not apart)


def _reshapes_fed(network: Network, place: int) -> set[int] | None:
    """Return the Reshapes that take their shape from a node; None if something else reads it."""
    fed: set[int] = set()
    outputs = {value.name for value in network.graph.output}
    waiting, seen = [place], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for name in network.nodes[current].output:
            if name in outputs:
                return None
            for reader in network.readers.get(name, ()):
                node = network.nodes[reader]
                if node.op_type == "Reshape" and node.input[0] != name:
                    fed.add(reader)
                elif node.op_type in _OF_SHAPES:
                    waiting.append(reader)
                else:
                    return None
    return fed
