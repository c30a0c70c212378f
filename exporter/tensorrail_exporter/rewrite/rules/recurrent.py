"""LSTM(X, W, R, B, …) -> LSTM(… MatMul(X, W₁) …, Wₙ, R, B, …), and likewise GRU.

The input projection W is contracted outside the time loop, for all time steps and directions at once, down to the rank
between input and output. The operator itself then runs on that rank, with the output cores as its W. Initial states,
sequence lengths, recurrent weights, biases and peepholes are not changed. A format without such a rank (`ttm`) computes the
inputs of all gates outside the loop; W is then an identity matrix that the graph computes.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from tensorrail_exporter.formats.contraction import LayerSpec, Step, split_at_boundary
from tensorrail_exporter.graphs.fold import is_standard
from tensorrail_exporter.rewrite.negligible import without_negligible
from tensorrail_exporter.rewrite.rules import scan
from tensorrail_exporter.rewrite.rules.emit import Site

OPS: tuple[str, ...] = ("LSTM", "GRU")

TORCH_FROM_ONNX = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
"""Positions of torch's gates (i, f, g, o) and (r, z, n) among ONNX's (i, o, f, c) and (z, r, h)."""


def weight_input(node: gs.Node) -> int:
    """Return 1: the second input is the weight of the input projection."""
    return 1


def why_not(node: gs.Node) -> str | None:
    """Return the reason why this recurrent layer stays dense, or None."""
    weight = node.inputs[1]
    if not isinstance(weight, gs.Constant):
        return f"its input weight {weight.name!r} is computed in the graph, not a constant"
    directions, gates = len(scan.directions(node)), len(TORCH_FROM_ONNX[node.op])
    if len(weight.shape) != 3 or weight.shape[0] != directions or weight.shape[1] % gates:
        return f"expected an input weight of shape ({directions}, {gates} · hidden, inputs), got {list(weight.shape)}"
    return None


def layer(node: gs.Node) -> LayerSpec:
    """Return the input projection, of shape (directions · gates · hidden, I); X has time and batch before its features."""
    directions, rows, inputs = node.inputs[1].shape
    return LayerSpec("recurrent", (directions * rows, inputs), lead=2, size=(steps_of(node),), scan=scan.takes(node))


def steps_of(node: gs.Node) -> int:
    """Return the number of time steps, or 0 if it is not known."""
    axes = node.inputs[0].shape
    return axes[0] if axes and isinstance(axes[0], int) and axes[0] > 0 and not node.attrs.get("layout", 0) else 0


def weight(node: gs.Node) -> np.ndarray:
    """Return the weight (directions · gates · hidden, I) with the gates in torch's order."""
    values = np.asarray(node.inputs[1].values)
    return scan.in_order(values, TORCH_FROM_ONNX[node.op]).reshape(-1, values.shape[2])


def replace_weight(node: gs.Node, weight: np.ndarray, name: str) -> None:
    """Replace the node's weight by a new constant, given as (directions · gates · hidden, I) in torch's order."""
    node.inputs[1] = gs.Constant(name, as_onnx(node, weight))


def rewrite(site: Site, steps: tuple[Step, ...], layer: str) -> None:
    """Write the input's steps before the node, which gets the output cores as its input weight or becomes a Scan.

    If the recurrent weight is rewritten afterwards, all steps stand before the node, which is left without an input weight.
    """
    node = site.node
    dtype = node.inputs[1].dtype
    directions, rows, inputs = node.inputs[1].shape
    inner, matrix, cores = (steps, None, ()) if site.gates else split_at_boundary(steps)
    width = directions * rows if matrix is None else matrix.shape[1]
    transpose = _own_transpose(site) if width < inputs else None
    projected = site.variable(f"{layer}/projected", dtype)
    site.chain(node.inputs[0] if transpose is None else transpose.inputs[0], projected, inner, layer, dtype)
    if transpose is not None:
        turned = site.variable(f"{layer}/turned", dtype)
        site.append("Transpose", f"{layer}/turn", [projected], turned, dict(transpose.attrs))
        projected = turned
    if matrix is not None:
        node.inputs[0] = projected
        weight = without_negligible(np.asarray(matrix).astype(dtype))
        node.inputs[1] = site.constant(f"{layer}/{'+'.join(map(str, cores))}", as_onnx(node, weight))
    elif site.gates:
        node.inputs[0] = projected
        node.inputs[1] = gs.Variable.empty()
    elif site.scan:
        scan.rewrite(site, projected, TORCH_FROM_ONNX[node.op], layer)
    else:
        node.inputs[0] = projected
        node.inputs[1] = _identity(site, f"{layer}/identity", dtype)


def _own_transpose(site: Site) -> gs.Node | None:
    """Return the Transpose of batch and time that computes the input of this node only, or None.

    The projection works in either order, and transposing its few features takes less time than transposing the input.
    """
    (source,) = site.node.inputs[:1]
    producer = source.inputs[0] if len(source.inputs) == 1 else None
    unshared = len(source.outputs) == 1 and not any(source is out for out in site.graph.outputs)
    if producer is None or producer.op != "Transpose" or not is_standard(producer) or not unshared:
        return None
    swaps = list(producer.attrs.get("perm", ())) == [1, 0, 2]
    return producer if swaps and any(producer is node for node in site.graph.nodes) else None


def _identity(site: Site, name: str, dtype: np.dtype) -> gs.Tensor:
    """Return an identity matrix as the node's input weight.

    From opset 9 on the graph computes it instead of storing it; a runtime folds it once, when it loads the graph. It is
    computed in float32, which the EyeLike of every runtime supports.
    """
    node = site.node
    directions, rows, _ = node.inputs[1].shape
    if site.graph.opset < 9:
        return site.constant(name, as_onnx(node, np.eye(directions * rows, dtype=dtype)))
    order = np.argsort(TORCH_FROM_ONNX[node.op])
    size = directions * rows
    shape, gates, whole = (
        site.constant(f"{name}/{part}", np.array(sizes, np.int64))
        for part, sizes in (
            ("size", (size, size)),
            ("gates", (directions, len(order), -1, size)),
            ("whole", (directions, rows, size)),
        )
    )
    gate_order = site.constant(f"{name}/order", order.astype(np.int64))
    steps: list[tuple[str, list[gs.Tensor], dict[str, object]]] = [
        ("ConstantOfShape", [], {}),
        ("EyeLike", [], {"dtype": int(TensorProto.FLOAT)}),
        ("Reshape", [gates], {}),
        ("Gather", [gate_order], {"axis": 1}),
        ("Reshape", [whole], {}),
    ]
    if dtype != np.float32:
        steps.append(("Cast", [], {"to": int(helper.np_dtype_to_tensor_dtype(dtype))}))
    tensor: gs.Tensor = shape
    for op, inputs, attrs in steps:
        out = site.variable(f"{name}/{op.lower()}", dtype if op == "Cast" else np.dtype(np.float32))
        site.append(op, f"{name}/{op.lower()}_node", [tensor, *inputs], out, attrs)
        tensor = out
    return tensor


def as_onnx(node: gs.Node, weight: np.ndarray) -> np.ndarray:
    """Return a weight as (directions, gates · hidden, p), with the gates in ONNX's order."""
    by_direction = weight.reshape(len(scan.directions(node)), -1, weight.shape[1])
    return np.ascontiguousarray(scan.in_order(by_direction, np.argsort(TORCH_FROM_ONNX[node.op])))
