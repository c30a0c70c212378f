"""The recurrence of an LSTM or GRU as a Scan over time, for steps that compute the inputs of the gates themselves.

ONNX's own nodes always multiply their input by W. For such steps W would be an identity matrix of the size of all gates: more
work than the recurrence itself, and read from memory in every call. The Scan has one or two Gemms per time step, by the
recurrent weight, and element-wise nodes; a factored recurrent weight has its steps in their place. Every direction has its
own Scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from tensorrail_exporter.graphs.fold import folded, is_constant
from tensorrail_exporter.rewrite.rules.emit import Site
from tensorrail_exporter.rewrite.rules.writer import Writer
from tensorrail_runtime.errors import GraphError
from tensorrail_runtime.graphs.files import opset_of

_OPSET = 9  # the first opset whose Scan has no batch axis
_IR_VERSION = 4  # the first version in which an initializer need not be an input; those of a body cannot be

_KNOWN = {"activations", "direction", "hidden_size", "input_forget", "layout", "linear_before_reset", "output_sequence"}
_GATES = {"LSTM": 4, "GRU": 3}
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}
_W, _R, _B, _LENGTHS, _H, _C, _PEEPHOLES = range(1, 8)  # indices of the node's inputs


class Product(Protocol):
    """The product of a state and the recurrent weight of one direction."""

    @property
    def hidden(self) -> int:
        """The number of hidden units."""

    def plus(self, body: Writer, state: gs.Tensor, columns: slice, addend: gs.Tensor | None, name: str) -> gs.Tensor:
        """Write the sum of an addend and some columns of the product.

        Args:
            body: writes into the body of the Scan.
            state: the state (B, H).
            columns: which of the gates · H columns, with start and stop.
            addend: (B, columns) or (columns); None for none.
            name: what to call a constant of these columns.

        """


def holds_scan(model: onnx.ModelProto) -> bool:
    """Return whether the opset and IR version of a model allow a Scan."""
    return opset_of(model) >= _OPSET and model.ir_version >= _IR_VERSION


def why_no_scan(model: onnx.ModelProto, scan: bool) -> str:
    """Return why the cores of a recurrent weight cannot run in a model, and what to do; an empty string where they can.

    Args:
        model: the model.
        scan: whether a Scan may be written; it is not for a GPU.

    """
    if not scan:
        return "the cores of a recurrent weight run in a Scan, which is ruled out here, as on every GPU; allow a Scan on a CPU"
    if holds_scan(model):
        return ""
    found = f"opset {opset_of(model)} and IR version {model.ir_version}"
    return (
        f"the cores of a recurrent weight run in a Scan: expected opset {_OPSET} and IR version {_IR_VERSION} or later, got "
        f"{found}; convert the model"
    )


def takes(node: gs.Node) -> bool:
    """Return whether a Scan can replace the node."""
    return what_no_scan_has(node) is None


def what_no_scan_has(node: gs.Node) -> str | None:
    """Return what keeps a Scan from replacing the node, in words, or None.

    Time must be the first axis, the weights constant, the activations the default ones, and the node must have no sequence
    lengths, peepholes or clip.
    """
    attrs = node.attrs
    unknown = sorted(set(attrs) - _KNOWN)
    activations = [_text(name) for name in attrs.get("activations", ())]
    given = [place for place in range(len(node.inputs)) if not node.inputs[place].is_empty()]
    reasons = {
        f"the attribute {', '.join(unknown)}": bool(unknown),
        f"the activations {', '.join(activations)}": activations not in ([], _ACTIVATIONS[node.op] * len(directions(node))),
        "an unknown direction": _text(attrs.get("direction", "forward")) not in ("forward", "reverse", "bidirectional"),
        "the batch as first axis (layout 1)": bool(attrs.get("layout", 0)),
        "input_forget": bool(attrs.get("input_forget", 0)),
        "sequence lengths": _LENGTHS in given,
        "peepholes": _PEEPHOLES in given,
        "no recurrent weight": _R not in given,
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    shapes = {} if reason else _shapes(node)
    others = (place for place, shape in shapes.items() if place in given and not _is(node.inputs[place], shape))
    other = next(others, None)
    return (
        reason
        if other is None
        else f"an input {node.inputs[other].name!r} that is no constant of shape {_words(shapes[other])}"
    )


def in_order(values: np.ndarray, order: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return `values` (directions, gates · H, …) with the gates of each direction reordered."""
    gates = values.reshape(len(values), len(order), -1, *values.shape[2:])[:, list(order)]
    return np.asarray(gates.reshape(values.shape))


def directions(node: gs.Node) -> tuple[str, ...]:
    """Return the node's directions: `forward`, `reverse` or both."""
    name = _text(node.attrs.get("direction", "forward"))
    return ("forward", "reverse") if name == "bidirectional" else (name,)


def rewrite(site: Site, gates: gs.Tensor, order: Sequence[int], layer: str, products: Sequence[Product] | None = None) -> None:
    """Replace the node by one Scan per direction.

    Args:
        site: the node.
        gates: inputs of the gates (T, B, directions · gates · H), in torch's order.
        order: positions of torch's gates, i, f, g, o of an LSTM or r, z, n of a GRU, among ONNX's.
        layer: name of the layer, which starts the names of new tensors.
        products: the products of states and recurrent weight, one per direction; default: those of the node's weight.

    Raises:
        GraphError: the recurrent weight or the bias is not a constant of the expected shape.

    """
    node = site.node
    writer = Writer(site, layer, np.dtype(gates.dtype))
    count, rows, hidden = _shapes(node)[_R]
    products = products or [_Dense(weight.T) for weight in values(site, _R, order, layer)]
    biases = np.zeros((count, 2 * rows))
    if len(node.inputs) > _B and not node.inputs[_B].is_empty():
        biases = values(site, _B, [*order, *(len(order) + gate for gate in order)], layer)
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
        results.append(_scan(writer, node, part, states, products[k], inner[k], backwards=name == "reverse"))
    outputs = list(node.outputs)
    for output, axis, tensors in zip(outputs, (1, 0, 0), zip(*results, strict=True), strict=False):
        if not output.is_empty():  # Y (T, directions, B, H), Y_h and Y_c (directions, B, H)
            writer.stack(list(tensors), axis, output)
    node.outputs.clear()


def _scan(
    writer: Writer,
    node: gs.Node,
    gates: gs.Tensor,
    states: Sequence[gs.Tensor],
    product: Product,
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
    after = (_lstm if node.op == "LSTM" else _gru)(inside, node, gate, before, product, bias)
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
    body: Writer, node: gs.Node, gate: gs.Tensor, states: Sequence[gs.Tensor], product: Product, _: np.ndarray
) -> list[gs.Tensor]:
    h, c = states
    hidden = product.hidden
    sums = product.plus(body, h, slice(0, 4 * hidden), gate, "recurrent")
    pair, candidate, out = body.split(sums, [2 * hidden, hidden, hidden], axis=1)
    admit, forget = body.split(body.add("Sigmoid", [pair]), [hidden] * 2, axis=1)
    kept, new = body.add("Mul", [forget, c]), body.add("Mul", [admit, body.add("Tanh", [candidate])])
    c = body.add("Add", [kept, new])
    return [body.add("Mul", [body.add("Sigmoid", [out]), body.add("Tanh", [c])]), c]


def _gru(
    body: Writer, node: gs.Node, gate: gs.Tensor, states: Sequence[gs.Tensor], product: Product, bias: np.ndarray
) -> list[gs.Tensor]:
    (h,) = states
    hidden = product.hidden
    pair, last = body.split(gate, [2 * hidden, hidden], axis=1)
    if node.attrs.get("linear_before_reset", 0):
        addend = body.constant("recurrent_bias", bias) if bias.any() else None
        sums = product.plus(body, h, slice(0, 3 * hidden), addend, "recurrent")
        pair_sums, last_sums = body.split(sums, [2 * hidden, hidden], axis=1)
        reset, update = body.split(body.add("Sigmoid", [body.add("Add", [pair, pair_sums])]), [hidden] * 2, axis=1)
        new = body.add("Tanh", [body.add("Add", [last, body.add("Mul", [reset, last_sums])])])
    else:
        sums = product.plus(body, h, slice(0, 2 * hidden), pair, "recurrent")
        reset, update = body.split(body.add("Sigmoid", [sums]), [hidden] * 2, axis=1)
        gated = body.add("Mul", [reset, h])
        new = body.add("Tanh", [product.plus(body, gated, slice(2 * hidden, 3 * hidden), last, "candidate")])
    return [body.add("Add", [new, body.add("Mul", [update, body.add("Sub", [h, new])])])]


@dataclass(frozen=True)
class _Dense:
    """The product with a dense recurrent weight (H, gates · H)."""

    weight: np.ndarray

    @property
    def hidden(self) -> int:
        return len(self.weight)

    def plus(self, body: Writer, state: gs.Tensor, columns: slice, addend: gs.Tensor | None, name: str) -> gs.Tensor:
        return product_plus(body, state, body.constant(name, self.weight[:, columns]), addend)


def product_plus(body: Writer, state: gs.Tensor, weight: gs.Constant, addend: gs.Tensor | None) -> gs.Tensor:
    """Write the product with a matrix, plus an addend if there is one."""
    return body.add("MatMul", [state, weight]) if addend is None else body.add("Gemm", [state, weight, addend])


def _shapes(node: gs.Node) -> dict[int, tuple[int, ...]]:
    """Return the shapes of W, R and B that match the first weight that is known; 0 for the number of inputs: any."""
    known = next(node.inputs[place] for place in (_W, _R) if isinstance(node.inputs[place], gs.Constant))
    count, rows = known.shape[:2]
    return {_W: (count, rows, 0), _R: (count, rows, rows // _GATES[node.op]), _B: (count, 2 * rows)}


def _is(tensor: gs.Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is constant and has this shape, or an unknown one."""
    return is_constant(tensor) and (tensor.shape is None or _agree(tensor.shape, shape))


def _agree(actual: Sequence[object], shape: tuple[int, ...]) -> bool:
    return len(actual) == len(shape) and all(size in (0, own) for own, size in zip(actual, shape, strict=True))


def _words(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(str(size or 'inputs') for size in shape)}]"


def values(site: Site, place: int, order: Sequence[int], layer: str) -> np.ndarray:
    """Return W, R or B of the node, (directions, gates · H, …), with the gates in this order; check its shape."""
    tensor, shape = site.node.inputs[place], _shapes(site.node)[place]
    try:
        constant = folded(tensor, site.graph.opset, f"{layer}/{tensor.name}")
    except GraphError as error:
        raise GraphError(f"layer {layer}: {error}") from None
    if constant is None or not _agree(constant.shape, shape):
        actual = "computed in the graph" if constant is None else f"of shape {list(constant.shape)}"
        raise GraphError(f"layer {layer}: {tensor.name!r} is {actual}: expected a constant of shape {_words(shape)}")
    return in_order(np.asarray(constant.values), order)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
