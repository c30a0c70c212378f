"""The recurrence of an LSTM or GRU as a Scan over time, for steps that compute the inputs of the gates themselves.

ONNX's own nodes always multiply their input by W. For such steps W would be an identity matrix of the size of all gates: more
work than the recurrence itself, and read from memory in every call. The Scan has one or two Gemms per time step, by the
recurrent weight, and element-wise nodes. Every direction has its own Scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tensorrail_exporter.graphs.fold import folded, is_constant
from tensorrail_exporter.rewrite.rules.emit import Site
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.graphs.files import opset_of

_OPSET = 9  # the first opset whose Scan has no batch axis
_IR_VERSION = 4  # the first version in which an initializer need not be an input; those of a body cannot be

_KNOWN = {"activations", "direction", "hidden_size", "input_forget", "layout", "linear_before_reset", "output_sequence"}
_GATES = {"LSTM": 4, "GRU": 3}
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}
_R, _B, _LENGTHS, _H, _C, _PEEPHOLES = range(2, 8)  # indices of the node's inputs


def holds_scan(model: onnx.ModelProto) -> bool:
    """Return whether the opset and IR version of a model allow a Scan."""
    return opset_of(model) >= _OPSET and model.ir_version >= _IR_VERSION


def takes(node: gs.Node) -> bool:
    """Return whether a Scan can replace the node.

    It can if time is the first axis, the weights are constant, the activations are the default ones, and the node has no
    sequence lengths, peepholes or clip.
    """
    attrs = node.attrs
    activations = [_text(name) for name in attrs.get("activations", ())]
    standard = set(attrs) <= _KNOWN and activations in ([], _ACTIVATIONS[node.op] * len(directions(node)))
    given = [place for place in range(len(node.inputs)) if not node.inputs[place].is_empty()]
    return (
        standard
        and _R in given
        and _text(attrs.get("direction", "forward")) in ("forward", "reverse", "bidirectional")
        and not attrs.get("layout", 0)
        and not attrs.get("input_forget", 0)
        and _LENGTHS not in given
        and _PEEPHOLES not in given
        and all(_is(node.inputs[place], shape) for place, shape in _shapes(node).items() if place in given)
    )


def in_order(values: np.ndarray, order: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return `values` (directions, gates · H, …) with the gates of each direction reordered."""
    gates = values.reshape(len(values), len(order), -1, *values.shape[2:])[:, list(order)]
    return np.asarray(gates.reshape(values.shape))


def directions(node: gs.Node) -> tuple[str, ...]:
    """Return the node's directions: `forward`, `reverse` or both."""
    name = _text(node.attrs.get("direction", "forward"))
    return ("forward", "reverse") if name == "bidirectional" else (name,)


def rewrite(site: Site, gates: gs.Tensor, order: Sequence[int], layer: str) -> None:
    """Replace the node by one Scan per direction.

    Args:
        site: the node.
        gates: inputs of the gates (T, B, directions · gates · H), in torch's order.
        order: positions of torch's gates, i, f, g, o of an LSTM or r, z, n of a GRU, among ONNX's.
        layer: name of the layer, which starts the names of new tensors.

    Raises:
        GraphError: the recurrent weight or the bias is not a constant of the expected shape.

    """
    node = site.node
    writer = _Writer(site, layer, np.dtype(node.inputs[1].dtype))
    count, rows, hidden = _shapes(node)[_R]
    recurrent = _values(site, _R, order, layer)
    biases = np.zeros((count, 2 * rows))
    if len(node.inputs) > _B and not node.inputs[_B].is_empty():
        biases = _values(site, _B, [*order, *(len(order) + gate for gate in order)], layer)
    outer, inner = biases[:, :rows].copy(), biases[:, rows:].copy()
    # With linear_before_reset the reset gate multiplies the last bias too, which therefore stays in the loop.
    movable = 2 * hidden if node.op == "GRU" and node.attrs.get("linear_before_reset", 0) else rows
    outer[:, :movable] += inner[:, :movable]
    inner[:, :movable] = 0
    if outer.any():
        gates = writer.add("Add", [gates, writer.constant("bias", outer.reshape(-1))])
    results = []
    for k, (name, part) in enumerate(zip(directions(node), writer.split(gates, [rows] * count, axis=2), strict=True)):
        states = [writer.state(place, k, gates, hidden) for place in ((_H, _C) if node.op == "LSTM" else (_H,))]
        results.append(_scan(writer, node, part, states, recurrent[k].T, inner[k], backwards=name == "reverse"))
    outputs = list(node.outputs)
    for output, axis, tensors in zip(outputs, (1, 0, 0), zip(*results, strict=True), strict=False):
        if not output.is_empty():  # Y (T, directions, B, H), Y_h and Y_c (directions, B, H)
            writer.stack(list(tensors), axis, output)
    node.outputs.clear()


def _scan(
    writer: _Writer,
    node: gs.Node,
    gates: gs.Tensor,
    states: Sequence[gs.Tensor],
    weight: np.ndarray,
    bias: np.ndarray,
    *,
    backwards: bool,
) -> list[gs.Tensor | None]:
    """Write the Scan of one direction, from gates (T, B, gates · H) and states (B, H).

    Returns:
        The outputs of all time steps (T, B, H), or None if the node does not have that output, and the last states.

    """
    body = gs.Graph(name=writer.name("body"), opset=writer.site.graph.opset)
    inside = writer.within(body)
    before = [inside.variable("state") for _ in states]
    gate = inside.variable("gate")
    after = (_lstm if node.op == "LSTM" else _gru)(inside, node, gate, before, weight, bias)
    body.inputs = [*before, gate]
    all_steps = [inside.add("Identity", [after[0]])] if not node.outputs[0].is_empty() else []
    body.outputs = [*after, *all_steps]
    direction = [int(backwards)]
    attrs: dict[str, object] = {"body": body, "num_scan_inputs": 1, "scan_input_directions": direction}
    if all_steps:
        attrs["scan_output_directions"] = direction
    outputs = writer.add_with_outputs("Scan", [*states, gates], len(body.outputs), **attrs)
    return [*(outputs[len(states) :] or [None]), *outputs[: len(states)]]


def _lstm(
    body: _Writer, node: gs.Node, gate: gs.Tensor, states: Sequence[gs.Tensor], weight: np.ndarray, _: np.ndarray
) -> list[gs.Tensor]:
    h, c = states
    hidden = len(weight)
    sums = body.add("Gemm", [h, body.constant("recurrent", weight), gate])
    pair, candidate, out = body.split(sums, [2 * hidden, hidden, hidden], axis=1)
    admit, forget = body.split(body.add("Sigmoid", [pair]), [hidden] * 2, axis=1)
    kept, new = body.add("Mul", [forget, c]), body.add("Mul", [admit, body.add("Tanh", [candidate])])
    c = body.add("Add", [kept, new])
    return [body.add("Mul", [body.add("Sigmoid", [out]), body.add("Tanh", [c])]), c]


def _gru(
    body: _Writer, node: gs.Node, gate: gs.Tensor, states: Sequence[gs.Tensor], weight: np.ndarray, bias: np.ndarray
) -> list[gs.Tensor]:
    (h,) = states
    hidden = len(weight)
    pair, last = body.split(gate, [2 * hidden, hidden], axis=1)
    if node.attrs.get("linear_before_reset", 0):
        sums = body.add("Gemm", [h, body.constant("recurrent", weight), body.constant("recurrent_bias", bias)])
        pair_sums, last_sums = body.split(sums, [2 * hidden, hidden], axis=1)
        reset, update = body.split(body.add("Sigmoid", [body.add("Add", [pair, pair_sums])]), [hidden] * 2, axis=1)
        new = body.add("Tanh", [body.add("Add", [last, body.add("Mul", [reset, last_sums])])])
    else:
        sums = body.add("Gemm", [h, body.constant("recurrent", weight[:, : 2 * hidden]), pair])
        reset, update = body.split(body.add("Sigmoid", [sums]), [hidden] * 2, axis=1)
        gated = body.add("Mul", [reset, h])
        new = body.add("Tanh", [body.add("Gemm", [gated, body.constant("candidate", weight[:, 2 * hidden :]), last])])
    return [body.add("Add", [new, body.add("Mul", [update, body.add("Sub", [h, new])])])]


class _Writer:
    """Writes nodes into a graph or a body; all new names start with that of the layer."""

    def __init__(self, site: Site, layer: str, dtype: np.dtype) -> None:
        self.site, self.layer, self.dtype = site, layer, dtype

    def within(self, body: gs.Graph) -> _Writer:
        return _Writer(replace(self.site, graph=body), self.layer, self.dtype)

    def name(self, what: str) -> str:
        return self.site.names.unique(f"{self.layer}/{what}")

    def variable(self, what: str) -> gs.Variable:
        return self.site.variable(f"{self.layer}/{what}", self.dtype)

    def constant(self, what: str, values: np.ndarray) -> gs.Constant:
        return self.site.constant(f"{self.layer}/{what}", values.astype(self.dtype))

    def integers(self, what: str, values: Sequence[int] | np.ndarray) -> gs.Constant:
        return self.site.constant(f"{self.layer}/{what}", np.array(values, np.int64))

    def add_with_outputs(self, op: str, inputs: list[gs.Tensor], count: int, **attrs: object) -> list[gs.Variable]:
        outputs = [self.variable(op.lower()) for _ in range(count)]
        self.site.graph.nodes.append(gs.Node(op, self.name(f"{op.lower()}_node"), attrs, inputs, outputs))
        return outputs

    def add(self, op: str, inputs: list[gs.Tensor], **attrs: object) -> gs.Variable:
        return self.add_with_outputs(op, inputs, 1, **attrs)[0]

    def split(self, tensor: gs.Tensor, sizes: Sequence[int], axis: int) -> list[gs.Tensor]:
        if len(sizes) == 1:
            return [tensor]
        if self.site.graph.opset < 13:
            return [*self.add_with_outputs("Split", [tensor], len(sizes), axis=axis, split=list(sizes))]
        lengths = self.integers("sizes" + "_".join(map(str, sizes)), sizes)
        return [*self.add_with_outputs("Split", [tensor, lengths], len(sizes), axis=axis)]

    def state(self, place: int, direction: int, gates: gs.Tensor, hidden: int) -> gs.Tensor:
        """Return the initial state (B, H) of one direction: from the node's input, or zeros."""
        inputs = self.site.node.inputs
        if len(inputs) > place and not inputs[place].is_empty():
            return self.add("Gather", [inputs[place], self.integers(f"direction{direction}", np.array(direction))], axis=0)
        of_integers = _Writer(self.site, self.layer, np.dtype(np.int64))
        batch = of_integers.add("Gather", [of_integers.add("Shape", [gates]), self.integers("second", [1])])
        shape = of_integers.add("Concat", [batch, self.integers("hidden", [hidden])], axis=0)
        return self.add("ConstantOfShape", [shape], value=gs.Constant("zero", np.zeros(1, self.dtype)))

    def stack(self, tensors: list[gs.Tensor], axis: int, output: gs.Tensor) -> None:
        """Stack the tensors of all directions along a new axis of the output."""
        unsqueezed = [self.unsqueezed(tensor, axis) for tensor in tensors]
        if len(unsqueezed) == 1:
            unsqueezed[0].inputs[0].outputs = [output]
        else:
            self.site.append("Concat", f"{self.layer}/directions", unsqueezed, output, {"axis": axis})

    def unsqueezed(self, tensor: gs.Tensor, axis: int) -> gs.Tensor:
        if self.site.graph.opset < 13:
            return self.add("Unsqueeze", [tensor], axes=[axis])
        return self.add("Unsqueeze", [tensor, self.integers(f"axis{axis}", [axis])])


def _shapes(node: gs.Node) -> dict[int, tuple[int, ...]]:
    """Return the shapes of R and B that match the node's input weight (directions, gates · H, I)."""
    count, rows, _ = node.inputs[1].shape
    return {_R: (count, rows, rows // _GATES[node.op]), _B: (count, 2 * rows)}


def _is(tensor: gs.Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is constant and has this shape, or an unknown one."""
    return is_constant(tensor) and (tensor.shape is None or tuple(tensor.shape) == shape)


def _values(site: Site, place: int, order: Sequence[int], layer: str) -> np.ndarray:
    """Return R or B of the node, (directions, gates · H, …), with the gates in this order; check its shape."""
    tensor, shape = site.node.inputs[place], _shapes(site.node)[place]
    try:
        constant = folded(tensor, site.graph.opset, f"{layer}/{tensor.name}")
    except GraphError as error:
        raise GraphError(f"layer {layer}: {error}") from None
    if constant is None or tuple(constant.shape) != shape:
        actual = "computed in the graph" if constant is None else f"of shape {list(constant.shape)}"
        raise GraphError(f"layer {layer}: {tensor.name!r} is {actual}: expected a constant of shape {list(shape)}")
    return in_order(np.asarray(constant.values), order)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
