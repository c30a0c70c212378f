"""The channels of a tensor, back to the layers that compute them: where a layer reads few of them, no others need exist.

Between a layer that reads channels and the layers that make them there may be any functions of single channels: activations,
batch norms, depthwise convolutions, pooling, sums and products of such tensors (as in gated units). If nothing else reads what
lies between, the rows of the weights before can be taken for the selected channels, and the outputs of the reader are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from tensorrail_exporter.graphs.fold import constant_value, folded, is_standard
from tensorrail_exporter.rewrite.rules.emit import Site
from tensorrail_runtime.errors import GraphError

_OF_ONE = frozenset((
    "Abs", "Cast", "Celu", "Ceil", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid",
    "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Tanh", "ThresholdedRelu",
))  # fmt: skip
_OF_SEVERAL = frozenset(("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "PRelu", "Sub", "Sum", "Where"))
_POOLS = frozenset(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool"))


@dataclass(frozen=True)
class ChannelConstant:
    """A constant input that has a value, a row or a matrix for each channel."""

    node: gs.Node
    place: int
    axis: int
    values: np.ndarray
    name: str


@dataclass
class Channels:
    """What computes the channels of a tensor.

    Attributes:
        axis: the axis of the channels, counted from the end.
        count: the number of channels.
        opset: the opset of the graph.
        makers: the layers whose weights have one row, or matrix, for each channel.
        constants: the constants that have channels.
        depthwise: the depthwise convolutions.
        tensors: the tensors that have these channels.

    """

    axis: int
    count: int
    opset: int
    makers: list[gs.Node] = field(default_factory=list)
    constants: list[ChannelConstant] = field(default_factory=list)
    depthwise: list[gs.Node] = field(default_factory=list)
    tensors: list[gs.Variable] = field(default_factory=list)

    def narrow(self, kept: Sequence[int], site: Site, layer: str) -> None:
        """Change the graph so that it computes these channels only.

        Args:
            kept: the channels, in the order in which they are read.
            site: the node that reads them.
            layer: name of the layer that reads them; weights of its makers get names that begin with it.

        """
        makers = {id(node) for node in self.makers}
        for constant in self.constants:
            name = f"{layer}/{constant.name}" if id(constant.node) in makers else f"{constant.name}/narrow"
            values = np.take(constant.values, kept, constant.axis)
            constant.node.inputs[constant.place] = gs.Constant(site.names.unique(name), values)
        for node in self.depthwise:
            node.attrs["group"] = len(kept)
        for tensor in self.tensors:
            tensor.name = site.names.unique(f"{tensor.name}/narrow")  # it no longer holds what the dense graph calls so
            if tensor.shape is not None:
                shape = list(tensor.shape)
                shape[self.axis] = len(kept)
                tensor.shape = shape

    def add(self, node: gs.Node, place: int, axis: int, tensor: gs.Tensor, values: np.ndarray) -> None:
        """Add a constant that has channels."""
        self.constants.append(ChannelConstant(node, place, axis, values, tensor.name))


def channels_of(site: Site) -> Channels | None:
    """Return what computes the channels that a layer reads; None if they are needed elsewhere, or made by other operators.

    Args:
        site: a Conv, Gemm or MatMul with a constant weight behind its data.

    """
    node = site.node
    weight, data = node.inputs[1], node.inputs[0]
    if not isinstance(weight, gs.Constant) or not isinstance(data, gs.Variable) or not is_standard(node):
        return None
    match node.op:
        case "Conv" if node.attrs.get("group", 1) == 1:
            axis, count = 1 - len(weight.shape), weight.shape[1]
        case "Gemm" if not node.attrs.get("transA", 0):
            axis, count = -1, weight.shape[1 if node.attrs.get("transB", 0) else 0]
        case "MatMul" if len(weight.shape) > 1:
            axis, count = -1, weight.shape[-2]
        case _:
            return None
    found = Channels(axis, count, site.graph.opset)
    return found if count > 1 and _collect(found, data, site) else None


def _collect(found: Channels, data: gs.Variable, site: Site) -> bool:
    """Fill in what computes the channels of a tensor; return False where that cannot be narrowed."""
    inside = {id(node) for node in site.graph.nodes}
    ends = {id(tensor) for tensor in site.graph.outputs}
    readers = {id(site.node)}
    seen: set[int] = set()  # tensors and nodes
    waiting = [data]
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if id(tensor) in ends or len(tensor.inputs) != 1 or id(tensor.inputs[0]) not in inside:
            return False
        found.tensors.append(tensor)
        node = tensor.inputs[0]
        if id(node) in seen:
            continue
        seen.add(id(node))
        before = _before(found, node)
        if before is None:
            return False
        if before:
            readers.add(id(node))
            waiting += before
    return bool(found.makers) and all(id(reader) in readers for tensor in found.tensors for reader in tensor.outputs)


def _before(found: Channels, node: gs.Node) -> list[gs.Variable] | None:
    """Add a node; return the tensors before it that have the same channels, none for a maker, or None if it mixes them."""
    outputs = [tensor for tensor in node.outputs if not tensor.is_empty()]
    if not is_standard(node) or len(outputs) != 1 or "broadcast" in node.attrs:  # which opsets before 7 have
        return None
    if node.op in _OF_ONE or node.op in _POOLS:
        if (node.op in _POOLS and found.axis == -1) or not all(map(_is_single, node.inputs[1:])):
            return None
        return _variables(node.inputs[:1])
    if node.op in _OF_SEVERAL:
        return _elementwise(found, node)
    if node.op == "BatchNormalization":
        return _normalized(found, node)
    if node.op == "Pad":
        return _padded(found, node)
    if node.op == "Conv" and node.attrs.get("group", 1) != 1:
        return _depthwise(found, node)
    return [] if _is_maker(found, node) else None


def _elementwise(found: Channels, node: gs.Node) -> list[gs.Variable] | None:
    if node.op == "PRelu" and found.opset < 7:  # whose slopes lie along the second axis
        return None
    before: list[gs.Variable] = []
    for place, tensor in enumerate(node.inputs):
        values = constant_value(tensor)
        if values is None:
            if tensor.is_empty() or not isinstance(tensor, gs.Variable):
                return None
            before.append(tensor)
            continue
        if values.ndim < -found.axis or values.shape[found.axis] == 1:
            continue  # the same for all channels
        if values.shape[found.axis] != found.count:
            return None
        found.add(node, place, values.ndim + found.axis, tensor, values)
    return before or None


def _normalized(found: Channels, node: gs.Node) -> list[gs.Variable] | None:
    """Add a batch norm, whose channels are the second axis."""
    shape = node.inputs[0].shape
    second = found.axis < -1 or (shape is not None and len(shape) == 2)
    values = [constant_value(tensor) for tensor in node.inputs[1:5]]
    if not second or found.opset < 9 or node.attrs.get("training_mode", 0):
        return None
    for place, (tensor, own) in enumerate(zip(node.inputs[1:5], values, strict=True), 1):
        if own is None or own.shape != (found.count,):
            return None
        found.add(node, place, 0, tensor, own)
    return _variables(node.inputs[:1])


def _padded(found: Channels, node: gs.Node) -> list[gs.Variable] | None:
    """Add a Pad that adds no channels."""
    values = [constant_value(tensor) for tensor in node.inputs[1:]]
    if len(values) > 2 or any(
        value is None and not tensor.is_empty() for value, tensor in zip(values, node.inputs[1:], strict=True)
    ):
        return None
    pads = np.asarray(values[0] if values and values[0] is not None else node.attrs.get("pads", ()))
    rank = len(pads) // 2
    if rank < -found.axis or pads[rank + found.axis] or pads[found.axis]:
        return None
    return _variables(node.inputs[:1])


def _depthwise(found: Channels, node: gs.Node) -> list[gs.Variable] | None:
    """Add a convolution with one kernel for each channel."""
    given = [tensor for tensor in node.inputs[1:] if not tensor.is_empty()]
    values = [constant_value(tensor) for tensor in given]
    weight = values[0]
    if weight is None or 1 - weight.ndim != found.axis or weight.shape[1] != 1 or node.attrs["group"] != found.count:
        return None
    for place, (tensor, own) in enumerate(zip(given, values, strict=True), 1):
        if own is None or len(own) != found.count:
            return None
        found.add(node, place, 0, tensor, own)
    found.depthwise.append(node)
    return _variables(node.inputs[:1])


def _is_maker(found: Channels, node: gs.Node) -> bool:
    """Add a layer whose weight has the channels as its outputs; return False for any other node."""
    weight = (
        _weight(node, found.opset) if len(node.inputs) > 1 and node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul") else None
    )
    if weight is None or not isinstance(node.inputs[0], gs.Variable):
        return False
    rank = weight.ndim
    match node.op:
        case "Conv" | "ConvTranspose" if found.axis == 1 - rank and node.attrs.get("group", 1) == 1:
            axis = 0 if node.op == "Conv" else 1
        case "Gemm" if found.axis == -1:
            axis = 0 if node.attrs.get("transB", 0) else 1
        case "MatMul" if found.axis == -1 and rank > 1:
            axis = rank - 1
        case _:
            return False
    bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    if weight.shape[axis] != found.count:
        return False
    found.add(node, 1, axis, node.inputs[1], weight)
    if bias is not None:
        values = constant_value(bias)
        if values is None:
            return False
        if values.ndim and values.shape[-1] != 1:  # others are the same for all channels
            if values.shape[-1] != found.count:
                return False
            found.add(node, 2, values.ndim - 1, bias, values)
    found.makers.append(node)
    return True


def _weight(node: gs.Node, opset: int) -> np.ndarray | None:
    """Return the weight of a layer, also if nodes of the graph compute it from constants; None if it has none."""
    if (values := constant_value(node.inputs[1])) is not None:
        return values
    try:
        constant = folded(node.inputs[1], opset, "weight")
    except GraphError:
        return None
    return None if constant is None else np.asarray(constant.values)


def _is_single(tensor: gs.Tensor) -> bool:
    """Return whether a further input is the same for all channels: absent, or a constant with one value."""
    value = constant_value(tensor)
    return tensor.is_empty() or (value is not None and value.size == 1)


def _variables(tensors: Sequence[gs.Tensor]) -> list[gs.Variable] | None:
    """Return the tensors if they are computed in the graph, else None."""
    found = [tensor for tensor in tensors if isinstance(tensor, gs.Variable) and not tensor.is_empty()]
    return found if len(found) == len(tensors) else None
