"""The recurrence of an LSTM or GRU alone, as a Scan over time, for steps that make the gates' inputs themselves.

ONNX's own nodes multiply their input by W, whatever it is. Where nothing is left to multiply by, W would be an identity of the
size of all gates: more work than the recurrence, and read from memory at every call. The Scan has one Gemm a step, or two, by
the recurrent weight, and element-wise nodes; each direction has one of its own.
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

_OPSET = 9  # the first in which a Scan has no batch axis of its own
_IR_VERSION = 4  # the first in which an initializer need not be an input, which a body's cannot be

_KNOWN = {"activations", "direction", "hidden_size", "input_forget", "layout", "linear_before_reset", "output_sequence"}
_GATES = {"LSTM": 4, "GRU": 3}
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}
_R, _B, _LENGTHS, _H, _C, _PEEPHOLES = range(2, 8)  # places among the node's inputs


def holds_scan(model: onnx.ModelProto) -> bool:
    """Return whether a Scan can be written into a file of this opset and IR version."""
    return opset_of(model) >= _OPSET and model.ir_version >= _IR_VERSION


def takes(node: gs.Node) -> bool:
    """Return whether the node is a plain one: time first, constant weights, no lengths, peepholes, clip or own activations."""
    attrs = node.attrs
    own = [_text(name) for name in attrs.get("activations", ())]
    plain = set(attrs) <= _KNOWN and own in ([], _ACTIVATIONS[node.op] * len(directions(node)))
    given = [place for place in range(len(node.inputs)) if not node.inputs[place].is_empty()]
    return (
        plain
        and _R in given
        and _text(attrs.get("direction", "forward")) in ("forward", "reverse", "bidirectional")
        and not attrs.get("layout", 0)
        and not attrs.get("input_forget", 0)
        and _LENGTHS not in given
        and _PEEPHOLES not in given
        and all(_is(node.inputs[place], shape) for place, shape in _shapes(node).items() if place in given)
    )


def in_order(values: np.ndarray, order: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return values (directions, gates · H, …) with the gates of each direction in this order."""
    gates = values.reshape(len(values), len(order), -1, *values.shape[2:])[:, list(order)]
    return np.asarray(gates.reshape(values.shape))


def directions(node: gs.Node) -> tuple[str, ...]:
    """Return the node's directions, one or two of `forward` and `reverse`."""
    name = _text(node.attrs.get("direction", "forward"))
    return ("forward", "reverse") if name == "bidirectional" else (name,)


def rewrite(site: Site, gates: gs.Tensor, order: Sequence[int], layer: str) -> None:
    """Run the node's recurrence on its gates' inputs (T, B, directions · gates · H), in torch's order.

    `order` says where torch's gates, i, f, g, o of an LSTM and r, z, n of a GRU, are among ONNX's.
    """
    node = site.node
    writer = _Writer(site, layer, np.dtype(node.inputs[1].dtype))
    count, rows, hidden = _shapes(node)[_R]
    recurrent = _values(site, _R, order, layer)
    biases = np.zeros((count, 2 * rows))
    if len(node.inputs) > _B and not node.inputs[_B].is_empty():
        biases = _values(site, _B, [*order, *(len(order) + gate for gate in order)], layer)
    outer, inner = biases[:, :rows].copy(), biases[:, rows:].copy()
    within = 2 * hidden if node.op == "GRU" and node.attrs.get("linear_before_reset", 0) else rows
    outer[:, :within] += inner[:, :within]  # what stays inside is gated together with its product
    inner[:, :within] = 0
    if outer.any():
        gates = writer.one("Add", [gates, writer.constant("bias", outer.reshape(-1))])
    found = []
    for k, (name, part) in enumerate(zip(directions(node), writer.split(gates, [rows] * count, axis=2), strict=True)):
        states = [writer.state(place, k, gates, hidden) for place in ((_H, _C) if node.op == "LSTM" else (_H,))]
        found.append(_scan(writer, node, part, states, recurrent[k].T, inner[k], backwards=name == "reverse"))
    outputs = list(node.outputs)
    for output, axis, made in zip(outputs, (1, 0, 0), zip(*found, strict=True), strict=False):
        if not output.is_empty():  # Y (T, directions, B, H), Y_h and Y_c (directions, B, H)
            writer.stack(list(made), axis, output)
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
    """Run one direction: gates (T, B, gates · H) and states (B, H) to all outputs (T, B, H), if wanted, and the last states."""
    body = gs.Graph(name=writer.name("body"), opset=writer.site.graph.opset)
    inside = writer.within(body)
    before = [inside.variable("state") for _ in states]
    gate = inside.variable("gate")
    after = (_lstm if node.op == "LSTM" else _gru)(inside, node, gate, before, weight, bias)
    body.inputs = [*before, gate]
    all_steps = [inside.one("Identity", [after[0]])] if not node.outputs[0].is_empty() else []
    body.outputs = [*after, *all_steps]
    way = [int(backwards)]
    attrs: dict[str, object] = {"body": body, "num_scan_inputs": 1, "scan_input_directions": way}
    if all_steps:
        attrs["scan_output_directions"] = way
    made = writer.several("Scan", [*states, gates], len(body.outputs), **attrs)
    return [*(made[len(states) :] or [None]), *made[: len(states)]]


def _lstm(
    body: _Writer, node: gs.Node, gate: gs.Tensor, states: Sequence[gs.Tensor], weight: np.ndarray, _: np.ndarray
) -> list[gs.Tensor]:
    h, c = states
    hidden = len(weight)
    sums = body.one("Gemm", [h, body.constant("recurrent", weight), gate])
    pair, candidate, out = body.split(sums, [2 * hidden, hidden, hidden], axis=1)
    into, forget = body.split(body.one("Sigmoid", [pair]), [hidden] * 2, axis=1)
    kept, new = body.one("Mul", [forget, c]), body.one("Mul", [into, body.one("Tanh", [candidate])])
    c = body.one("Add", [kept, new])
    return [body.one("Mul", [body.one("Sigmoid", [out]), body.one("Tanh", [c])]), c]


def _gru(
    body: _Writer, node: gs.Node, gate: gs.Tensor, states: Sequence[gs.Tensor], weight: np.ndarray, bias: np.ndarray
) -> list[gs.Tensor]:
    (h,) = states
    hidden = len(weight)
    pair, last = body.split(gate, [2 * hidden, hidden], axis=1)
    if node.attrs.get("linear_before_reset", 0):
        sums = body.one("Gemm", [h, body.constant("recurrent", weight), body.constant("recurrent_bias", bias)])
        two, one = body.split(sums, [2 * hidden, hidden], axis=1)
        reset, update = body.split(body.one("Sigmoid", [body.one("Add", [pair, two])]), [hidden] * 2, axis=1)
        new = body.one("Tanh", [body.one("Add", [last, body.one("Mul", [reset, one])])])
    else:
        sums = body.one("Gemm", [h, body.constant("recurrent", weight[:, : 2 * hidden]), pair])
        reset, update = body.split(body.one("Sigmoid", [sums]), [hidden] * 2, axis=1)
        seen = body.one("Mul", [reset, h])
        new = body.one("Tanh", [body.one("Gemm", [seen, body.constant("candidate", weight[:, 2 * hidden :]), last])])
    return [body.one("Add", [new, body.one("Mul", [update, body.one("Sub", [h, new])])])]


class _Writer:
    """Writes nodes into a graph or a body under the layer's name."""

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

    def several(self, op: str, inputs: list[gs.Tensor], count: int, **attrs: object) -> list[gs.Variable]:
        outputs = [self.variable(op.lower()) for _ in range(count)]
        self.site.graph.nodes.append(gs.Node(op, self.name(f"{op.lower()}_node"), attrs, inputs, outputs))
        return outputs

    def one(self, op: str, inputs: list[gs.Tensor], **attrs: object) -> gs.Variable:
        return self.several(op, inputs, 1, **attrs)[0]

    def split(self, tensor: gs.Tensor, sizes: Sequence[int], axis: int) -> list[gs.Tensor]:
        if len(sizes) == 1:
            return [tensor]
        if self.site.graph.opset < 13:
            return [*self.several("Split", [tensor], len(sizes), axis=axis, split=list(sizes))]
        lengths = self.integers("sizes" + "_".join(map(str, sizes)), sizes)
        return [*self.several("Split", [tensor, lengths], len(sizes), axis=axis)]

    def state(self, place: int, direction: int, gates: gs.Tensor, hidden: int) -> gs.Tensor:
        """Return the initial state (B, H) of one direction: the node's own input, or zeros for every sample."""
        inputs = self.site.node.inputs
        if len(inputs) > place and not inputs[place].is_empty():
            return self.one("Gather", [inputs[place], self.integers(f"direction{direction}", np.array(direction))], axis=0)
        whole = _Writer(self.site, self.layer, np.dtype(np.int64))
        batch = whole.one("Gather", [whole.one("Shape", [gates]), self.integers("second", [1])])
        shape = whole.one("Concat", [batch, self.integers("hidden", [hidden])], axis=0)
        return self.one("ConstantOfShape", [shape], value=gs.Constant("zero", np.zeros(1, self.dtype)))

    def stack(self, tensors: list[gs.Tensor], axis: int, output: gs.Tensor) -> None:
        """Give the output the directions' tensors along a new axis."""
        wide = [self.unsqueezed(tensor, axis) for tensor in tensors]
        if len(wide) == 1:
            wide[0].inputs[0].outputs = [output]
        else:
            self.site.append("Concat", f"{self.layer}/directions", wide, output, {"axis": axis})

    def unsqueezed(self, tensor: gs.Tensor, axis: int) -> gs.Tensor:
        if self.site.graph.opset < 13:
            return self.one("Unsqueeze", [tensor], axes=[axis])
        return self.one("Unsqueeze", [tensor, self.integers(f"axis{axis}", [axis])])


def _shapes(node: gs.Node) -> dict[int, tuple[int, ...]]:
    """Return the shapes that R and B have beside the node's input weight (directions, gates · H, I)."""
    count, rows, _ = node.inputs[1].shape
    return {_R: (count, rows, rows // _GATES[node.op]), _B: (count, 2 * rows)}


def _is(tensor: gs.Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is made of constants and, as far as is known, has this shape."""
    return is_constant(tensor) and (tensor.shape is None or tuple(tensor.shape) == shape)


def _values(site: Site, place: int, order: Sequence[int], layer: str) -> np.ndarray:
    """Return R or B of the node with its gates (directions, gates · H, …) in this order; `GraphError` for a wrong shape."""
    tensor, shape = site.node.inputs[place], _shapes(site.node)[place]
    try:
        made = folded(tensor, site.graph.opset, f"{layer}/{tensor.name}")
    except GraphError as error:
        raise GraphError(f"layer {layer}: {error}") from None
    if made is None or tuple(made.shape) != shape:
        found = "computed in the graph" if made is None else f"of shape {list(made.shape)}"
        raise GraphError(f"layer {layer}: {tensor.name!r} is {found}: expected a constant of shape {list(shape)}")
    return in_order(np.asarray(made.values), order)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
